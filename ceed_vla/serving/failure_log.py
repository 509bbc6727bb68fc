"""Logs failures that may repeat at any rate in a bounded number of lines."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable

from ceed_vla.errors import CeedVLAError
from ceed_vla.texts import short

_PERIOD = 10.0  # shortest time between two lines about failures of a known kind [s]
_MOST_KINDS = 20  # largest number of kinds that get a line of their own
_FRAMES = 12  # innermost calls of a traceback that are shown


class FailureLog:
    """Logs one line for a `CeedVLAError`, and a traceback for any other failure of a new kind.

    Failures of known kinds share a line every `_PERIOD` seconds. A kind is a type of exception at a
    line of code; `clock` returns steady time [s].
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._kinds: set[tuple[object, ...]] = set()
        self._told = float("-inf")
        self._untold = 0

    def add(self, error: Exception) -> None:
        ours = isinstance(error, CeedVLAError)
        text = " ".join(short(error if ours else f"{type(error).__name__}: {error}").split())
        frames = traceback.extract_tb(error.__traceback__)
        kind = (type(error), *((frame.filename, frame.lineno) for frame in frames[-1:]))
        fresh = kind not in self._kinds and len(self._kinds) < _MOST_KINDS
        if not fresh and self._clock() - self._told < _PERIOD:
            self._untold += 1
            return
        if fresh:
            self._kinds.add(kind)
        before = f" ({self._untold} more since the last line)" if self._untold else ""
        self._told = self._clock()
        self._untold = 0
        if fresh and not ours:
            calls = "".join(traceback.format_list(frames[-_FRAMES:])).rstrip()
            self._logger.error("Inference failed: %s%s\n%s", text, before, calls)
        else:
            self._logger.warning("Inference failed: %s%s", text, before)
