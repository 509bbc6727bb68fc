"""What the file of a checkpoint's exits says, without the model; depth and drafts ask for it."""

from __future__ import annotations

from pathlib import Path

from ceed_vla.errors import CheckpointError
from ceed_vla.fields import short
from ceed_vla.files import regular
from ceed_vla.folders import EXITS
from ceed_vla.weights import opened


def described_exits(folder: Path) -> tuple[str, list[int]]:
    """Kind and depths of the exits in a checkpoint folder, ("", []) without any.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = folder / EXITS
    if not file.exists(follow_symlinks=False):
        return "", []
    with opened(regular(file)) as tensors:
        said = tensors.metadata() or {}
    depths = said.get("depths", "").split(",")
    if not all(depth.isascii() and depth.isdecimal() and len(depth) < 6 for depth in depths):
        raise CheckpointError(
            f"{file} says depths {short(said.get('depths'))}; copy the checkpoint again."
        )
    return said.get("kind", ""), [int(depth) for depth in depths]
