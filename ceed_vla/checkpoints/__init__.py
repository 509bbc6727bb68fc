"""Checkpoints: load, save and seal them.

A name is imported from its file on first use: loading needs torch and LeRobot, and a robot node
that only locates a checkpoint may have neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "load": "ceed_vla.checkpoints.policies",
    "save": "ceed_vla.checkpoints.policies",
    "seal": "ceed_vla.checkpoints.sealing",
    "pretrained_path": "ceed_vla.folders",
    "resolve_checkpoint": "ceed_vla.folders",
    "weights_hash": "ceed_vla.checkpoint_files",
}
__all__ = ["load", "pretrained_path", "resolve_checkpoint", "save", "seal", "weights_hash"]

if TYPE_CHECKING:
    from ceed_vla.checkpoint_files import weights_hash as weights_hash
    from ceed_vla.checkpoints.policies import load as load
    from ceed_vla.checkpoints.policies import save as save
    from ceed_vla.checkpoints.sealing import seal as seal
    from ceed_vla.folders import pretrained_path as pretrained_path
    from ceed_vla.folders import resolve_checkpoint as resolve_checkpoint


def __getattr__(name: str) -> Any:
    """Import the heavy parts when they are first used."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ceed_vla.checkpoints' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    """All names, also of parts that are not imported yet, so that shells can complete them."""
    return sorted({*globals(), *__all__})
