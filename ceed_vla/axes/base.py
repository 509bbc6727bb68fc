"""The description of an axis of early exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


def _nothing(config: Any, folder: Path) -> list[str]:
    return []


@dataclass(frozen=True)
class SavedModule:
    """A module that an axis adds to a policy, in a file of its own next to the weights.

    Attributes:
        file: Name of the file in a checkpoint.
        load: Attaches the module of a checkpoint folder, if it has one, to a backbone.
        save: Writes the module of a backbone into a folder; without a module, removes the file.
        modules: Returns the modules of a backbone, which change device and dtype with it.
        detach: Removes the module from a backbone whose weights are about to change.
    """

    file: str
    load: Callable[[Any, Path], None]
    save: Callable[[Any, Path], None]
    modules: Callable[[Any], Iterable[nn.Module]]
    detach: Callable[[Any], None]


@dataclass(frozen=True)
class Axis:
    """One axis of early exit; its decoders and exit rules register themselves.

    Attributes:
        name: Name of its folder.
        bench_rows: Maps a policy's configuration and checkpoint folder to the decoders of this axis
            that `ceed-vla bench` shows.
        saved: The module that it adds to a policy, if any.
    """

    name: str
    bench_rows: Callable[[Any, Path], list[str]] = _nothing
    saved: SavedModule | None = None
