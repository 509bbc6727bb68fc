"""Exported policies, which run with numpy and onnxruntime, without torch.

    policy = EdgePolicy("outputs/student-export")
    result = policy.decode({"observation.images.front": image, ...}, "put the cube in the bin")

onnxruntime is imported when the class is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ceed_vla.extras import require_module

if TYPE_CHECKING:
    from ceed_vla.edge.policy import EdgePolicy as EdgePolicy

__all__ = ["EdgePolicy"]


def __getattr__(name: str) -> Any:
    """Import onnxruntime when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_module("ceed_vla.edge", "onnxruntime")
    from ceed_vla.edge.policy import EdgePolicy

    return EdgePolicy
