"""What counting needs to know of a model, read off the model itself; one on the meta device will do."""

from __future__ import annotations

from typing import Any

from d2moe_ext.adapters import find_experts
from d2moe_ext.budget import LayerShapes, ModelShapes

# The names configurations give to the router's top k.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "top_k")


def experts_per_token(model: Any) -> int:
    """The router's top k, from the model's configuration.

    Raises:
        ValueError: the configuration names none of the known options.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _TOP_K_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise ValueError(f"The model's config must give its experts per token as one of {', '.join(_TOP_K_NAMES)}, got none.")


def _lookup_parameters(model: Any) -> int:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embedding is None or (head is not None and getattr(head, "weight", None) is embedding.weight):
        return 0
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return 0 if tied else int(embedding.weight.numel())


def model_shapes(model: Any) -> ModelShapes:
    """Count an uncompressed model.

    Raises:
        ValueError: it has no MoE layer this package knows, or says nowhere how many experts a token takes.
    """
    top_k = experts_per_token(model)
    layers, removed = [], set()
    for view in find_experts(model):
        layout = view.layout
        layers.append(
            LayerShapes(
                name=view.name,
                num_experts=layout.num_experts,
                hidden_size=layout.hidden_size,
                intermediate_size=layout.intermediate_size,
                experts_per_token=top_k,
                gated=layout.gated,
                interleaved=layout.interleaved,
                has_bias=layout.has_bias,
            )
        )
        removed |= {id(parameter) for parameter in view.parameters()}
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    dtype = next(iter(view.parameters())).dtype
    # On the meta device tying has not happened yet, so a tied head still counts as its own tensor.
    tied = _untied_head(model)
    return ModelShapes(
        layers=tuple(layers),
        total_parameters=sum(p.numel() for p in parameters.values()) - tied,
        lookup_parameters=_lookup_parameters(model),
        other_tensors=len(parameters.keys() - removed) - bool(tied),
        element_size=dtype.itemsize,
    )


def _untied_head(model: Any) -> int:
    """Parameters of a head that will be tied to the embedding and is not yet."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not tied or embedding is None or head is None or head.weight is embedding.weight:
        return 0
    return int(head.weight.numel())
