from d2moe_ext import _native  # noqa: F401
from d2moe_ext.hf import patch_model, unpatch_model  # (also registers the quantization method "d2moe")

__all__ = ["patch_model", "unpatch_model"]
