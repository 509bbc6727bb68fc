"""LeRobot processor steps whose state is files of a published model, for example its tokenizer."""

from __future__ import annotations

import abc
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ceed_vla.errors import CheckpointError
from ceed_vla.files import plain_name, read_bytes
from ceed_vla.limited.tokenizers import MOST_BYTES

# Read local files only, and never run code from them (auto_map).
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def read_files(folder: Path, names: Iterable[str] = TOKENIZER_FILES) -> dict[str, Tensor]:
    """Read the files `names` of `folder` that exist: name -> uint8 (bytes,)."""
    files = {name: folder / name for name in names if (folder / name).exists()}
    found = {
        name: read_bytes(file, CheckpointError, most=MOST_BYTES) for name, file in files.items()
    }
    return {
        name: torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for name, data in found.items()
    }


class FilesStep(abc.ABC):
    """Mix-in of processor steps that store files in the checkpoint, so that it needs no other
    folder and no hub.
    """

    _files: Mapping[str, Tensor] = {}

    @abc.abstractmethod
    def _open(self, folder: Path) -> None:
        """Load the files in `folder`."""

    def use(self, files: Mapping[str, Tensor], source: str) -> None:
        """Use files.

        Args:
            files: Name -> contents, uint8 (bytes,).
            source: Where the files come from, for error messages.

        Raises:
            CheckpointError: A name is not a plain file name, a value is not bytes, or a file cannot
                be read.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                if data.dtype != torch.uint8 or data.ndim != 1:
                    raise CheckpointError(
                        f"The file {name!r} is {data.dtype}; it must be uint8 bytes. Copy it again."
                    )
                Path(folder, plain_name(name, "A file in the checkpoint")).write_bytes(
                    data.cpu().numpy().tobytes()
                )
            try:
                self._open(Path(folder))
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(folder, source)) from error
        self._files = dict(files)

    def check_files(self) -> None:
        """Raise `CheckpointError` if there are none."""
        if not self._files:
            raise CheckpointError(
                "The preprocessor came without its files; copy the checkpoint again."
            )

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._files)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.use(state, "The checkpoint's preprocessor")
