"""Description of a checkpoint's early-exit layers, from their file; depth and drafts read it."""

from __future__ import annotations

from pathlib import Path

from ceed_vla.errors import CheckpointError
from ceed_vla.fields import short
from ceed_vla.files import regular
from ceed_vla.folders import EXITS
from ceed_vla.weights import opened


def described_exits(folder: Path) -> tuple[str, list[int]]:
    """Kind and depths of the early-exit layers in a checkpoint folder; ("", []) without any.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = folder / EXITS
    if not file.exists(follow_symlinks=False):
        return "", []
    with opened(regular(file)) as tensors:
        metadata = tensors.metadata() or {}
    depths = metadata.get("depths", "").split(",")
    if not all(depth.isascii() and depth.isdecimal() and len(depth) < 6 for depth in depths):
        raise CheckpointError(
            f"The depths in {file} are {short(metadata.get('depths'))}; they must be numbers, "
            "joined by commas. Copy the checkpoint again."
        )
    return metadata.get("kind", ""), [int(depth) for depth in depths]
