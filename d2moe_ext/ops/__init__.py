"""One wrapper and one fake kernel for each native operator of ``torch.ops.d2moe_ext``."""

from d2moe_ext import _native  # noqa: F401  (registers the operators)
from d2moe_ext.ops.moe_forward import moe_down_forward, moe_forward, moe_gate_up_forward

__all__ = ["moe_down_forward", "moe_forward", "moe_gate_up_forward"]
