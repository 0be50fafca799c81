"""Compressed models in transformers: saving, ``from_pretrained``, and native operators in a loaded model.

Importing this package registers the quantization method ``"d2moe"``.
"""

from d2moe_ext.hf.compression import compress
from d2moe_ext.hf.patch import patch_model, unpatch_model
from d2moe_ext.hf.quantizer import D2MoEConfig, D2MoEQuantizer, mark_compressed, unmark_compressed

__all__ = [
    "D2MoEConfig",
    "D2MoEQuantizer",
    "compress",
    "mark_compressed",
    "patch_model",
    "unmark_compressed",
    "unpatch_model",
]
