from d2moe_ext import _native  # noqa: F401
