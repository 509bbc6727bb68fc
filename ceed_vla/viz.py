"""Recordings for Rerun's viewer: what a policy saw, what it decoded, and how fast (extra `viz`)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.extras import require
from ceed_vla.files import replacing
from ceed_vla.outputs import MADE_BY, claim_file

SUFFIX = ".rrd"


def check_rerun(option: str, text: str) -> Path:
    """The file that an option names, before anything runs.

    Raises:
        ConfigError: Rerun is not installed, or the file may not be written.
    """
    _rerun(option)
    return claim_file(option, text, SUFFIX)


def _rerun(option: str) -> Any:
    require(f"--{option}", "viz")
    return importlib.import_module("rerun")


class RerunLog(AbstractContextManager["RerunLog"]):
    """Writes a recording; entities are paths such as "ceed/front".

    Args:
        path: The file; it is replaced when everything is written.
    """

    def __init__(self, path: Path) -> None:
        self._rerun = _rerun("rerun")
        self._parts = ExitStack()
        written = self._parts.enter_context(replacing(path))
        # The identifier of the application is the mark by which a file is ours.
        self._stream = self._rerun.RecordingStream(MADE_BY)
        self._stream.save(str(written))

    def at(self, seconds: float, step: int | None = None) -> None:
        """Set the time of what follows [s], and its control step, if there are steps."""
        self._stream.set_time("time", duration=seconds)
        if step is not None:
            self._stream.set_time("step", sequence=step)

    def image(self, entity: str, pixels: NDArray[np.uint8]) -> None:
        """An image (H, W, 3)."""
        self._stream.log(entity, self._rerun.Image(pixels))

    def scalars(self, entity: str, values: Sequence[float] | NDArray[Any]) -> None:
        """One or several numbers, drawn over time."""
        self._stream.log(entity, self._rerun.Scalars(np.asarray(values, dtype=np.float64)))

    def tensor(self, entity: str, values: NDArray[Any], names: Sequence[str]) -> None:
        """An array with the names of its dimensions."""
        self._stream.log(entity, self._rerun.Tensor(values, dim_names=names))

    def text(self, entity: str, text: str) -> None:
        self._stream.log(entity, self._rerun.TextLog(text))

    def __exit__(self, *failure: Any) -> None:
        self._stream.flush()
        self._stream.disconnect()
        self._parts.__exit__(*failure)
