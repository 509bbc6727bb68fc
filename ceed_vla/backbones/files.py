"""Small files (tokenizers, image settings) as tensors: a processor's state carries them where a checkpoint goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ceed_vla.errors import CheckpointError


def read_files(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The given files of `folder` that exist: name -> uint8 (bytes,)."""
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return {name: torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for name, data in found.items()}


def write_files(files: Mapping[str, Tensor], folder: Path) -> None:
    """Write files into an existing folder.

    Raises:
        CheckpointError: A name that is no plain file name.
    """
    for name, data in files.items():
        if name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointError(
                f"The checkpoint holds a file called {name!r}; only plain names are written."
            )
        (folder / name).write_bytes(data.cpu().numpy().tobytes())
