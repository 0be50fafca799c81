"""Sequential calibration: each layer is fitted on what the compressed layers before it really pass on (design section 2.5).

With x̂ the input that a layer gets behind the compressed prefix and x the one it got in the original model, for the same
token,

    min over Ŵ of  Σ_t ‖B^½ (W x_t − Ŵ x̂_t)‖²   is, but for a constant,  ‖B^½ (W' − Ŵ) Ĝ^½‖²   with
    W' = W C Ĝ⁻¹,  C = Σ x x̂ᵀ,  Ĝ = Σ x̂ x̂ᵀ.

So a layer is compressed as ever, with W' for W and Ĝ for G; C and Ĝ both get the same multiple of Ĝ's shrinkage target, so
that W' tends to W where there are few tokens. Gate and up come first: down is then fitted on what the compressed ones make
of x̂, and so makes up for its own layer too. Ranks, left Grams and base sparsity are those of the original statistics, and
the original model says which experts a token is counted for.

Cost in time: the alternations twice (once for global ranks), one forward pass of the original and one as far as each layer.
In memory, for one layer at a time: its activations, its new Grams and a second copy of its weights. The original's
activations of all layers are kept in main memory, in the model's dtype, each until its layer is done: ``2·L·T·H`` bytes in
16 bits, where the Grams take ``8·L·E·(H² + I²)``. To run the original again for each layer instead, its weights would have
to stay beside the compressed ones: for Mixtral-8x7B and the command line's 65,536 tokens 37 GB at ratio 0.6, not 17 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from d2moe_ext import ops
from d2moe_ext.adapters import ExpertGating, ExpertsView, RoutedCall
from d2moe_ext.calibration import POOLED_SAMPLE, Progress, pairs_of
from d2moe_ext.experts import D2MoEExperts
from d2moe_ext.layer_compression import RIDGE, DeltaReport, LayerCompressor
from d2moe_ext.reference.whitened_svd import ridged_gram

# Tokens' worth of Ĝ's shrinkage target in the targets. With the 32 of the Grams the targets learn the calibration text's own
# ways, which cost 9 % more out of domain on pydoc_moe at 0.75 and gained nothing in it (selection text, seed 0, 2026-11-22).
TARGET_SHRINKAGE = 256
# Rows of a cross product that are held in float64 at once.
_CHUNK = 4096


@dataclass(frozen=True)
class Arrivals:
    """What reached the experts of one layer, in the order of the calls: ``[T, H]``, ``[T, k]`` ids, ``[T, k]`` weights."""

    hidden_states: list[Tensor]
    top_k_index: list[Tensor]
    top_k_weights: list[Tensor]

    def keep(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        # A copy in main memory: the model may go on to write to what it passed.
        self.hidden_states.append(hidden_states.detach().to("cpu", copy=True))
        self.top_k_index.append(top_k_index.to("cpu", copy=True))
        self.top_k_weights.append(top_k_weights.detach().to("cpu", copy=True))


class _Reached(Exception):
    """Ends a forward pass at the layer that is looked at."""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode; gives the device that token ids go to."""
    training = model.training
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        model.train(training)


@contextmanager
def _native(module: nn.Module) -> Iterator[None]:
    """Its compressed layers run through the operators."""
    layers = [m for m in module.modules() if isinstance(m, D2MoEExperts)]
    backends = [layer.backend for layer in layers]
    for layer in layers:
        layer.backend = "native"
    try:
        yield
    finally:
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend


@torch.no_grad()
def original_arrivals(
    model: nn.Module, stacks: Sequence[Tensor], views: Sequence[ExpertsView], report: Progress
) -> dict[str, Arrivals]:
    """What reaches every layer of the uncompressed model, by ``view.name``; one forward pass.

    Raises:
        ValueError: a layer that runs more than once in a forward pass, so that it would come before itself.
    """
    kept = {view.name: Arrivals([], [], []) for view in views}
    with ExitStack() as stack, _evaluating(model) as device:
        for view in views:
            stack.enter_context(view.intercept(kept[view.name].keep, observe=True))
        for done, ids in enumerate(stacks, 1):
            model(input_ids=ids.to(device), use_cache=False)
            report("Original activations", done, len(stacks))
    for name, arrivals in kept.items():
        if len(arrivals.hidden_states) not in (0, len(stacks)):
            raise ValueError(
                f"compress: sequential needs layers that run once in a forward pass, got {name}, which ran "
                f"{len(arrivals.hidden_states)} times in {len(stacks)}."
            )
    return kept


def carried_over(weight: Tensor, cross: Tensor, gram: Tensor, anchor: Tensor) -> Tensor:
    """``W (C + A)(Ĝ + A)⁻¹``: what W does to x, as well as it can be done to x̂.

    Args:
        weight: ``[out, in]``.
        cross: ``[in, in]`` float64, ``Σ x x̂ᵀ``.
        gram: ``[in, in]`` float64, ``Σ x̂ x̂ᵀ``.
        anchor: ``[in, in]`` float64, positive definite: the larger, the nearer to W.

    Returns:
        ``[out, in]`` in the dtype of ``weight``, in which the factors will be stored too.
    """
    factor = torch.linalg.cholesky(gram + anchor)
    return torch.cholesky_solve((weight.double() @ (cross + anchor)).T, factor).T.to(weight.dtype)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """``Σ_t x_t y_tᵀ`` of ``[T, n]``, float64."""
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for rows, columns in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        total += rows.double().T @ columns.double()
    return total


class TargetView(ExpertsView):
    """A layer's view with W' in the place of those weights that were carried over."""

    def __init__(self, view: ExpertsView) -> None:
        super().__init__(view.name, view.module, view.block)
        self.original, self.layout = view, view.layout
        self.carried: dict[tuple[str, int], Tensor] = {}

    def gate_up_weight(self, expert: int) -> Tensor:
        carried = self.carried.get(("gate_up", expert))
        return self.original.gate_up_weight(expert) if carried is None else carried

    def down_weight(self, expert: int) -> Tensor:
        carried = self.carried.get(("down", expert))
        return self.original.down_weight(expert) if carried is None else carried

    def gate_up_bias(self, expert: int) -> Tensor | None:
        return self.original.gate_up_bias(expert)

    def down_bias(self, expert: int) -> Tensor | None:
        return self.original.down_bias(expert)

    def gating(self) -> ExpertGating:
        return self.original.gating()

    def parameters(self) -> list[nn.Parameter]:
        return self.original.parameters()

    def _routed_call(self) -> tuple[nn.Module, str, Callable[[RoutedCall], Callable[..., Tensor]]]:
        return self.original._routed_call()


class LayerFit:
    """One layer's targets, and its Grams behind the compressed prefix.

    Args:
        layer: the layer as it would be compressed on the original's activations: its view, statistics, plan and class.
        original: what reached it in the original model.
        prefix: ``[T, H]``, what reaches it behind the compressed prefix, token by token.
        shrinkage: tokens' worth of the shrinkage target in the targets.
    """

    def __init__(self, layer: LayerCompressor, original: Arrivals, prefix: Tensor, shrinkage: float = TARGET_SHRINKAGE) -> None:
        self.layer, self.shrinkage = layer, shrinkage
        self.target = TargetView(layer.view)
        self.x = _gathered(original.hidden_states, prefix[:0]).to(prefix.device)
        self.prefix_x = prefix
        nowhere = torch.zeros(0, 1, dtype=torch.int64, device=prefix.device)
        index = _gathered(original.top_k_index, nowhere).to(prefix.device)
        weights = _gathered(original.top_k_weights, nowhere).to(prefix.device)
        stats = layer.stats
        self.tokens = [pairs_of(expert, index, weights)[0] for expert in range(len(stats.tokens))]
        self.stats = replace(
            stats,
            tokens=torch.tensor([len(token) for token in self.tokens], device=stats.tokens.device),
            gram_gate_up=torch.zeros_like(stats.gram_gate_up),
            pooled_sample=prefix[:POOLED_SAMPLE],
        )
        for expert, token in enumerate(self.tokens):
            ops.gram_update_(self.stats.gram_gate_up[expert], prefix[token])

    def settled(self, group: str) -> tuple[LayerCompressor, list[float]]:
        """A compressor of the targets as they stand, with the base of ``gate_up`` or ``down`` fitted and rounded, and the
        error after each refit."""
        compressor = type(self.layer)(self.target, self.stats, self.layer.config, self.layer.plan)
        bases = compressor.bases
        compressor.bases = {group: bases[group]}
        errors = [compressor.alternate() for _ in range(compressor.config.alternations)]
        compressor.round_bases()
        compressor.bases = bases | compressor.bases
        return compressor, errors

    def carry_gate_up(self) -> None:
        """``W'`` of gate and up, from the layer's inputs."""
        grams = self.stats.gram_gate_up
        pooled = grams.sum(0) / max(int(self.stats.tokens.sum()), 1) * self.shrinkage
        anchor = ridged_gram(pooled, len(pooled), RIDGE, pooled)
        for expert, token in enumerate(self.tokens):
            if len(token):
                weight, cross = self.layer.view.gate_up_weight(expert), _cross(self.x[token], self.prefix_x[token])
                self.target.carried["gate_up", expert] = carried_over(weight, cross, grams[expert], anchor)

    def carry_down(self, compressed: D2MoEExperts) -> None:
        """``W'`` and ``Ĝ`` of down, from what the gate and up of ``compressed`` make of the layer's inputs."""
        view, stats = self.layer.view, self.stats
        stats.gram_down = torch.zeros_like(stats.gram_down)
        for expert, token in enumerate(self.tokens):
            if not len(token):
                token = torch.arange(len(stats.pooled_sample), device=self.x.device)
            h = view.apply_gate(linear(self.x[token], view.gate_up_weight(expert), view.gate_up_bias(expert)))
            prefix_h = view.apply_gate(compressed.gate_up_rows(self.prefix_x[token], torch.full_like(token, expert)[:, None]))
            gram = stats.gram_down[expert]
            ops.gram_update_(gram, prefix_h)
            mean = float(gram.diagonal().mean())
            if mean > 0:  # else no token, or an expert whose gate is shut for all of them
                anchor = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (mean / len(token) * self.shrinkage)
                weight = view.down_weight(expert)
                self.target.carried["down", expert] = carried_over(weight, _cross(h, prefix_h), gram, anchor)


def _gathered(parts: list[Tensor], empty: Tensor) -> Tensor:
    return torch.cat(parts) if parts else empty


class SequentialCompressor:
    """The layers of a model, compressed one after the other in the order of their views.

    Args:
        model: uncompressed; its experts are replaced by the caller, each layer's before the next is compressed.
        stacks: ``[n, L]`` stacks of unpadded sequences (:func:`d2moe_ext.calibration.sequences_of`).
        views: of all its MoE layers.
        report: called with a stage's name, what is done and the total.
        shrinkage: tokens' worth of the shrinkage target in the targets.

    Raises:
        ValueError: a layer that runs more than once in a forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: Sequence[Tensor],
        views: Sequence[ExpertsView],
        report: Progress,
        shrinkage: float = TARGET_SHRINKAGE,
    ) -> None:
        self.model, self.stacks, self.report, self.shrinkage = model, stacks, report, shrinkage
        self.originals = original_arrivals(model, stacks, views, report)
        self.passes = len(views) * len(stacks)
        self.passed = 0

    @torch.no_grad()
    def compress(self, layer: LayerCompressor) -> tuple[D2MoEExperts, dict[str, DeltaReport], list[float]]:
        """One layer at its planned ranks: the experts, what truncation left out, and the error after each refit.

        Raises:
            RuntimeError: activations behind the compressed layers that are not finite, or what
                :meth:`LayerCompressor.run` raises.
        """
        fit = LayerFit(layer, self.originals.pop(layer.view.name), self._prefix(layer.view), self.shrinkage)
        fit.carry_gate_up()
        upper, upper_errors = fit.settled("gate_up")
        experts = upper.run()[0]
        with _native(experts):
            fit.carry_down(experts)
        lower, lower_errors = fit.settled("down")
        lower.bases["gate_up"] = upper.bases["gate_up"]
        experts, reports = lower.run()
        return experts, reports, [sum(pair) for pair in zip(upper_errors, lower_errors, strict=True)]

    def _prefix(self, view: ExpertsView) -> Tensor:
        """``[T, H]``: what reaches a layer's experts in the model as it stands."""
        calls: list[Tensor] = []

        def keep(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
            calls.append(hidden_states)
            raise _Reached

        with _evaluating(self.model) as device, _native(self.model), view.intercept(keep):
            for ids in self.stacks:
                with suppress(_Reached):
                    self.model(input_ids=ids.to(device), use_cache=False)
                self.passed += 1
                self.report("Compressed activations", self.passed, self.passes)
        prefix = _gathered(calls, view.down_weight(0).new_empty(0, view.layout.hidden_size))
        if not bool(prefix.isfinite().all()):
            raise RuntimeError(
                f"compress: activations behind the compressed layers must be finite, got NaN or infinity into {view.name}."
            )
        return prefix
