"""Calibration: what compression needs to know of a model's activations and gradients (design section 2.1).

Pass 1 runs the model forward and takes, per expert, the Gram matrices of its inputs, the tokens routed to it and
the router's weight; per layer, the energy of what each base's down projection really sees. Pass 2 runs one sequence
at a time forward and backward and takes the Fisher-weighted sums (eq. 4), and the Gram matrices of the loss
gradients where two-sided whitening is wanted. Sequences are cut free of their padding first, so padding enters no
statistic and no statistic depends on batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from d2moe_ext import ops
from d2moe_ext.adapters import ExpertsView, find_experts
from d2moe_ext.bases import assign_bases
from d2moe_ext.config import Merge, check_choice

Progress = Callable[[str, int, int], None]
LeftGram = Literal["diagonal", "full"]

# Inputs kept of each layer, on which experts that no token reached are run (design section 2.5).
POOLED_SAMPLE = 256


@dataclass
class LayerStats:
    """The statistics of one MoE layer. E experts, K bases, H hidden, I inter, R rows of gate and up.

    Attributes:
        expert_to_base: ``[E]`` int32.
        tokens: ``[E]`` int64, n[e]: (token, expert) pairs with a weight other than 0.
        gate_mass: ``[E]`` float64, the sum of the router's weights.
        gram_gate_up: ``[E, H, H]`` float64, ``Σ x xᵀ``.
        gram_down: ``[E, I, I]`` float64, ``Σ h hᵀ``; of an expert no token reached: over the pooled sample.
        down_energy: ``[K, I]`` float64, ``Σ_t (Σ_e g h[e])²`` over the experts of each base.
        pooled_sample: ``[n, H]``, some of the layer's inputs.
        fisher_weighted: for ``gate_up`` ``[K, R, H]`` and ``down`` ``[K, H, I]``, float32: ``Σ_e F[e]∘W[e]``.
        fisher_sum: likewise ``Σ_e F[e]``.
        left_gram: for ``gate_up`` and ``down``, ``Σ δδᵀ`` float64: ``[E, out, out]``, or its diagonal ``[E, out]``.
    """

    expert_to_base: Tensor
    tokens: Tensor
    gate_mass: Tensor
    gram_gate_up: Tensor
    gram_down: Tensor
    down_energy: Tensor
    pooled_sample: Tensor
    fisher_weighted: dict[str, Tensor] = field(default_factory=dict)
    fisher_sum: dict[str, Tensor] = field(default_factory=dict)
    left_gram: dict[str, Tensor] = field(default_factory=dict)

    def gram_tokens(self, expert: int) -> int:
        """How many rows an expert's down Gram was summed over."""
        return int(self.tokens[expert]) or len(self.pooled_sample)

    @property
    def gate_up_energy(self) -> Tensor:
        """``[K, H]`` float64: ``‖X_j‖²`` over the pairs of each base's experts, from the Grams' diagonals."""
        energy = torch.zeros_like(self.gram_gate_up[: len(self.down_energy), 0])
        return energy.index_add_(0, self.expert_to_base.long(), self.gram_gate_up.diagonal(dim1=1, dim2=2))


@dataclass
class CalibrationStats:
    """What :func:`calibrate` returns: statistics per MoE layer, by the experts' path in the model.

    ``merge``, ``num_bases`` and ``left_gram`` say what they were taken for; ``compress`` refuses others.
    """

    layers: dict[str, LayerStats]
    merge: Merge
    num_bases: int
    left_gram: LeftGram | None
    num_tokens: int


class _Accumulators:
    """Makes the large sums: in memory beside the weights, or in memory-mapped files that the system pages in and out."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.made = folder, 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ValueError(f"calibrate: offload_folder must be empty or new, got {folder}.")

    def zeros(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.folder is None:
            return torch.zeros(shape, dtype=dtype, device=device)
        if device.type != "cpu":
            raise ValueError(f"calibrate: offload_folder needs the experts' weights on the CPU, got {device}.")
        self.made += 1
        path = self.folder / f"{self.made:06d}.bin"
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def _empty(view: ExpertsView, num_bases: int, accumulators: _Accumulators) -> LayerStats:
    layout = view.layout
    experts, hidden, inter = layout.num_experts, layout.hidden_size, layout.intermediate_size
    weight = view.down_weight(0)
    double: dict[str, Any] = {"dtype": torch.float64, "device": weight.device}
    return LayerStats(
        expert_to_base=assign_bases(view, num_bases),
        tokens=torch.zeros(experts, dtype=torch.int64, device=weight.device),
        gate_mass=torch.zeros(experts, **double),
        gram_gate_up=accumulators.zeros(experts, hidden, hidden, **double),
        gram_down=accumulators.zeros(experts, inter, inter, **double),
        down_energy=torch.zeros(num_bases, inter, **double),
        pooled_sample=torch.empty(0, hidden, dtype=weight.dtype, device=weight.device),
    )


def sequences_of(batches: Iterable[Any], caller: str = "calibrate") -> list[Tensor]:
    """Batches as ``[n, L]`` stacks of equally long, unpadded sequences.

    Args:
        batches: each a ``[B, L]`` integer tensor, or a mapping with ``input_ids`` and optionally ``attention_mask``.
        caller: whom an error names.

    Raises:
        ValueError: a batch of another form, or none at all.
    """
    stacks: list[Tensor] = []
    for batch in batches:
        ids, mask = (batch, None) if isinstance(batch, Tensor) else (batch["input_ids"], batch.get("attention_mask"))
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"{caller}: a batch must be integer token ids [B, L], got {ids.dtype} {list(ids.shape)}.")
        if mask is None or bool(mask.bool().all()):
            stacks.append(ids)
        else:
            stacks += [row[keep][None] for row, keep in zip(ids, mask.bool(), strict=True) if bool(keep.any())]
    if not stacks:
        raise ValueError(f"{caller}: batches must hold at least one sequence, got none.")
    return stacks


def pairs_of(expert: int, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens routed to an expert and their weights; a pair of weight 0 was only padded to that expert."""
    token, slot = torch.where((top_k_index == expert) & (top_k_weights != 0))
    return token, top_k_weights[token, slot]


class _ForwardPass:
    """Stands in for a layer's experts in pass 1: computes their output and adds to the statistics."""

    def __init__(self, view: ExpertsView, stats: LayerStats) -> None:
        self.view, self.stats = view, stats

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        stats, missing = self.stats, POOLED_SAMPLE - len(self.stats.pooled_sample)
        if missing > 0:
            stats.pooled_sample = torch.cat([stats.pooled_sample, hidden_states[:missing]])
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for base in range(len(stats.down_energy)):
            gated_sum = hidden_states.new_zeros(len(hidden_states), self.view.layout.intermediate_size).float()
            for expert in torch.nonzero(stats.expert_to_base == base).flatten().tolist():
                token, weight = pairs_of(expert, top_k_index, top_k_weights)
                if len(token):
                    activated, result = self._expert(expert, hidden_states[token], weight)
                    gated_sum.index_add_(0, token, activated.float() * weight.float()[:, None])
                    output.index_add_(0, token, result)
            stats.down_energy[base] += gated_sum.double().square().sum(0)
        return output.to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        view, stats = self.view, self.stats
        activated = view.apply_gate(linear(x, view.gate_up_weight(expert), view.gate_up_bias(expert)))
        result = view.post_expert_norm(linear(activated, view.down_weight(expert), view.down_bias(expert)))
        stats.tokens[expert] += len(x)
        stats.gate_mass[expert] += weight.double().sum()
        ops.gram_update_(stats.gram_gate_up[expert], x)
        ops.gram_update_(stats.gram_down[expert], activated)
        return activated, result.float() * weight.float()[:, None]

    def finish(self) -> None:
        """Give experts that no token reached a down Gram, and refuse activations that are not finite."""
        view, stats = self.view, self.stats
        for expert in torch.nonzero(stats.tokens == 0).flatten().tolist():
            x = stats.pooled_sample
            activated = view.apply_gate(linear(x, view.gate_up_weight(expert), view.gate_up_bias(expert)))
            ops.gram_update_(stats.gram_down[expert], activated)
        for name, gram in (("gate and up", stats.gram_gate_up), ("down", stats.gram_down)):
            finite = gram.diagonal(dim1=1, dim2=2).isfinite().all(1)
            if not bool(finite.all()):
                expert = int(torch.nonzero(~finite)[0])
                raise ValueError(
                    f"calibrate: activations must be finite, got NaN or infinity into {name} of expert {expert} of {view.name}."
                )


class _ObservedLinear(torch.autograd.Function):
    """``linear`` that hands its input and its output's gradient to ``observe`` and saves no weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None, observe: Callable) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.observe = weight, observe
        return linear(x, weight(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.observe(x, gradient)
        return gradient @ ctx.weight(), None, None, None


class _BackwardPass:
    """Stands in for a layer's experts in pass 2: a differentiable forward whose backward adds to the statistics."""

    def __init__(
        self,
        view: ExpertsView,
        stats: LayerStats,
        merge: Merge,
        left_gram: LeftGram | None,
        accumulators: _Accumulators,
    ) -> None:
        self.view, self.stats, self.merge, self.left_gram = view, stats, merge, left_gram
        layout, bases, zeros = view.layout, len(stats.down_energy), accumulators.zeros
        for name, weight in (("gate_up", view.gate_up_weight(0)), ("down", view.down_weight(0))):
            device = weight.device
            if merge.startswith("fisher"):
                stats.fisher_weighted[name] = zeros(bases, *weight.shape, dtype=torch.float32, device=device)
                stats.fisher_sum[name] = zeros(bases, *weight.shape, dtype=torch.float32, device=device)
            if left_gram is not None:
                shape = (layout.num_experts,) + (len(weight),) * (2 if left_gram == "full" else 1)
                stats.left_gram[name] = zeros(*shape, dtype=torch.float64, device=device)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # The embedding is frozen, so the first layer's input starts the graph.
        x = hidden_states if hidden_states.requires_grad else hidden_states.detach().requires_grad_()
        output = torch.zeros_like(x, dtype=torch.float32)
        for expert in torch.unique(top_k_index).tolist():
            if not 0 <= expert < self.view.layout.num_experts:
                continue
            token, weight = pairs_of(expert, top_k_index, top_k_weights)
            if len(token):
                result = self._expert(expert, x[token]).float() * weight.float()[:, None]
                output = output.index_add(0, token, result)
        return output.to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        view = self.view
        gate_up = _ObservedLinear.apply(
            x, lambda: view.gate_up_weight(expert), view.gate_up_bias(expert), self._observe("gate_up", expert)
        )
        down = _ObservedLinear.apply(
            view.apply_gate(gate_up),
            lambda: view.down_weight(expert),
            view.down_bias(expert),
            self._observe("down", expert),
        )
        return view.post_expert_norm(down)

    def finish(self) -> None:
        """Refuse gradients that are not finite."""
        for sums in (self.stats.fisher_weighted, self.stats.left_gram):
            for name, total in sums.items():
                if not bool(total.isfinite().all()):
                    raise ValueError(
                        f"calibrate: loss gradients must be finite, got NaN or infinity at {name} of {self.view.name}."
                    )

    def _observe(self, name: str, expert: int) -> Callable[[Tensor, Tensor], None]:
        stats = self.stats
        weight = self.view.gate_up_weight if name == "gate_up" else self.view.down_weight

        def observe(x: Tensor, delta: Tensor) -> None:
            if self.merge.startswith("fisher"):
                # F[e] = (1/n[e]) Σ (∂ℓ/∂W)² (eq. 4); fisher_frequency weighs by n[e]·F[e].
                scale = 1.0 if self.merge == "fisher_frequency" else 1.0 / int(stats.tokens[expert])
                base = int(stats.expert_to_base[expert])
                gradient = delta.float().T @ x.float()
                sums = stats.fisher_weighted[name][base], stats.fisher_sum[name][base]
                ops.fisher_merge_(*sums, weight(expert).detach(), gradient, scale)
            if self.left_gram == "full":
                ops.gram_update_(stats.left_gram[name][expert], delta)
            elif self.left_gram == "diagonal":
                stats.left_gram[name][expert] += delta.double().square().sum(0)

        return observe


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter with a gradient, put back at the end."""
    training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


def _silent(stage: str, done: int, total: int) -> None:
    pass


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    merge: Merge = "frequency",
    num_bases: int = 1,
    left_gram: LeftGram | None = "diagonal",
    offload_folder: Path | str | None = None,
    progress: Progress | None = None,
) -> CalibrationStats:
    """Take the statistics compression needs (paper, section 3; design section 2.1).

    Args:
        model: a causal language model with MoE layers, uncompressed.
        batches: each a ``[B, L]`` tensor of token ids, or a mapping with ``input_ids`` and ``attention_mask``.
        merge: the merge they are for. ``fisher`` and ``fisher_frequency`` keep two sums as large as a base; statistics
            taken for either also serve ``frequency`` and ``mean``.
        num_bases: bases per projection; experts are clustered by their weights.
        left_gram: what ``decomposition="two_sided"`` needs: Gram matrices of the loss gradients, ``full`` or ``diagonal``;
            ``None`` for other decompositions. Without it and without Fisher there is no backward pass.
        offload_folder: an empty or new folder for the large sums, ``8·E·(H² + I²)`` bytes a layer and more, as
            memory-mapped files; they must stay until the model is compressed. CPU only.
        progress: called with a stage's name, what is done and the total.

    Raises:
        ValueError: no MoE layer, no sequence, an activation or gradient that is not finite (by layer), or an
            ``offload_folder`` that is not empty.
    """
    check_choice("merge", merge, Merge)
    if left_gram is not None:
        check_choice("left_gram", left_gram, LeftGram)
    views = find_experts(model)
    stacks = sequences_of(batches)
    report = progress or _silent
    accumulators = _Accumulators(None if offload_folder is None else Path(offload_folder))
    stats = {view.name: _empty(view, num_bases, accumulators) for view in views}
    with _frozen(model):
        _run_forward(model, [_ForwardPass(view, stats[view.name]) for view in views], stacks, report)
        if merge.startswith("fisher") or left_gram is not None:
            passes = [_BackwardPass(view, stats[view.name], merge, left_gram, accumulators) for view in views]
            _run_backward(model, passes, stacks, report)
    return CalibrationStats(stats, merge, num_bases, left_gram, sum(stack.numel() for stack in stacks))


def _run_forward(model: nn.Module, passes: list[_ForwardPass], stacks: list[Tensor], report: Progress) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        with ExitStack() as stack:
            for forward_pass in passes:
                stack.enter_context(forward_pass.view.intercept(forward_pass))
            for done, ids in enumerate(stacks, 1):
                model(input_ids=ids.to(device), use_cache=False)
                report("Gram matrices", done, len(stacks))
        for forward_pass in passes:
            forward_pass.finish()


def _run_backward(model: nn.Module, passes: list[_BackwardPass], stacks: list[Tensor], report: Progress) -> None:
    device = next(model.parameters()).device
    sequences = [row[None] for stack in stacks for row in stack if len(row) > 1]
    with ExitStack() as stack, torch.enable_grad():
        for backward_pass in passes:
            stack.enter_context(backward_pass.view.intercept(backward_pass))
        for done, ids in enumerate(sequences, 1):
            ids = ids.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            # Summed, not averaged, and without auxiliary losses (design section 2.1).
            cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum").backward()
            report("Fisher information", done, len(sequences))
    for backward_pass in passes:
        backward_pass.finish()
