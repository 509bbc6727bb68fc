"""Small files of a model: settings, and tokenizers as tensors, which a processor takes where a checkpoint goes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ceed_vla.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: No such file, or another content.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); is this a model's folder?"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); copy it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__} instead of settings; copy it again.")
    return values


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
