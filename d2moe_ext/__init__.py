"""D2-MoE compression of Mixture-of-Experts language models, and native operators that run them.

Importing the package loads the native extension and registers the quantization method ``"d2moe"`` with transformers, so that
``from_pretrained`` loads compressed models.
"""

from d2moe_ext import _native  # noqa: F401 (a missing or stale build is refused before anything else)
from d2moe_ext._version import __version__
from d2moe_ext.calibration import CalibrationStats, calibrate
from d2moe_ext.compress import CompressionReport
from d2moe_ext.config import CompressionConfig
from d2moe_ext.evaluate import perplexity, set_dynamic
from d2moe_ext.hf import compress, patch_model, unpatch_model

__all__ = [
    "CalibrationStats",
    "CompressionConfig",
    "CompressionReport",
    "__version__",
    "calibrate",
    "compress",
    "patch_model",
    "perplexity",
    "set_dynamic",
    "unpatch_model",
]
