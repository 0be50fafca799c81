"""Every operator again in plain torch, written as its formula; what the native ones are tested against."""

from d2moe_ext.reference.column_select import column_select
from d2moe_ext.reference.fisher_merge import fisher_merge_
from d2moe_ext.reference.gram_update import gram_update_
from d2moe_ext.reference.moe_forward import moe_down_forward, moe_forward, moe_gate_up_forward
from d2moe_ext.reference.whitened_svd import whitened_svd

__all__ = [
    "column_select",
    "fisher_merge_",
    "gram_update_",
    "moe_down_forward",
    "moe_forward",
    "moe_gate_up_forward",
    "whitened_svd",
]
