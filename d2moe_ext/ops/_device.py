from __future__ import annotations

from torch import Tensor


def check_same_device(op: str, first: tuple[str, Tensor], **others: Tensor | None) -> None:
    """The fake kernels' device check: tensors of which only some are on the meta device come here, not to the CPU's.

    Without it an operator that works in place would leave its tensors as they were and say nothing.
    """
    name, tensor = first
    for other_name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise RuntimeError(f"{op}: {other_name} must be on {tensor.device} like {name}, got {other.device}")
