"""What an axis of early exit says of itself."""

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
    """A module that an axis adds to a policy, in a file of its own beside the weights.

    Attributes:
        file: Its name in a checkpoint.
        load: Attaches the module of a checkpoint folder, if it has one, to a backbone.
        save: Writes the module of a backbone into a folder, or removes the file without one.
        modules: The modules of a backbone, which move and change type with it.
        detach: Takes the module away from a backbone whose weights are about to change.
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
        name: That of its folder.
        bench_rows: Decoders that `ceed-vla bench` shows of it, of a policy's configuration and
            checkpoint folder.
        saved: The module that it adds to a policy.
    """

    name: str
    bench_rows: Callable[[Any, Path], list[str]] = _nothing
    saved: SavedModule | None = None
