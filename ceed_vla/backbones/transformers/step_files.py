"""LeRobot steps that carry files of a published model, such as its tokenizer's, as their state."""

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

# Nothing is fetched, and a file that names classes of its own (auto_map) does not get to run them.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def read_files(folder: Path, names: Iterable[str] = TOKENIZER_FILES) -> dict[str, Tensor]:
    """The given files of `folder` that exist: name -> uint8 (bytes,)."""
    files = {name: folder / name for name in names if (folder / name).exists()}
    found = {
        name: read_bytes(file, CheckpointError, most=MOST_BYTES) for name, file in files.items()
    }
    return {
        name: torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for name, data in found.items()
    }


class FilesStep(abc.ABC):
    """Beside a step's class as a base: its files lie in the checkpoint, which then needs no folder
    and no hub.
    """

    _files: Mapping[str, Tensor] = {}

    @abc.abstractmethod
    def _open(self, folder: Path) -> None:
        """Read what the step uses of the files in `folder`."""

    def use(self, files: Mapping[str, Tensor], source: str) -> None:
        """Take files as bytes: name -> uint8 (bytes,); messages call them `source`.

        `CheckpointError` for a name that is no plain one, or no file's bytes.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                if data.dtype != torch.uint8 or data.ndim != 1:
                    raise CheckpointError(
                        f"The file {name!r} is {data.dtype}; it must be bytes. Copy it again."
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
                "The pre-processor came without its files; copy the checkpoint again."
            )

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._files)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.use(state, "The checkpoint's pre-processor")
