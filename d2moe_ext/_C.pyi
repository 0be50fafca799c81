"""What the native module declares; its operators are in ``torch.ops.d2moe_ext``."""

from typing import Any

def build_info() -> dict[str, Any]: ...
