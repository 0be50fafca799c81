"""The operators: one wrapper and one fake kernel each, over ``torch.ops.d2moe_ext``."""

from d2moe_ext import _native  # noqa: F401 (registers the operators that the wrappers name)
from d2moe_ext.ops.column_select import column_select
from d2moe_ext.ops.fisher_merge import fisher_merge_
from d2moe_ext.ops.gram_update import gram_update_
from d2moe_ext.ops.moe_forward import moe_down_forward, moe_forward, moe_gate_up_forward
from d2moe_ext.ops.whitened_svd import whitened_svd

__all__ = [
    "column_select",
    "fisher_merge_",
    "gram_update_",
    "moe_down_forward",
    "moe_forward",
    "moe_gate_up_forward",
    "whitened_svd",
]
