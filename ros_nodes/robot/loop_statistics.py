"""Counters and percentiles of the control loop, free of ROS."""

from __future__ import annotations

import math
from collections import Counter, deque

import numpy as np
from numpy.typing import NDArray

from ceed_vla.serving.predictor import Response

MISSED = 1.5  # gap between commands that counts as a missed tick [periods]


class Latest(deque[float]):
    """The latest `size` values of a quantity."""

    def __init__(self, size: int) -> None:
        super().__init__(maxlen=size)

    def percentile(self, share: float) -> float:
        """Return the `share` percentile; NaN without values."""
        return float(np.percentile(self, share)) if self else math.nan

    @property
    def mean(self) -> float:
        """The mean; NaN without values."""
        return sum(self) / len(self) if self else math.nan


class LoopStatistics:
    """Counts and timings of the loop since activation.

    Distributions cover the last 20 s of commands and the last 200 chunks.
    """

    def __init__(self, period: float) -> None:
        self.period = period  # nominal time between commands [s]
        self.ticks = 0  # commands sent
        self.missed = 0  # gaps of more than `MISSED` periods between two commands of one motion
        self.slips = 0  # times that the step grid was set back because a whole step was missed
        self.jitter = Latest(2000)  # |period - nominal| of every command [s]
        self.decode = Latest(200)  # time of every chunk, as the policy's side measured it [s]
        self.network = Latest(200)  # of it, the time outside the server that has the policy [s]
        self.images = Latest(200)  # time of decoding and scaling the images of every chunk [s]
        # from the stamp of the oldest image to the first command computed from it [s]
        self.to_command = Latest(200)
        self.beyond_decode = Latest(200)  # the same without the chunk's decoding [s]
        self.forwards = Latest(200)  # model calls of every chunk
        self.exit_reasons: Counter[str] = Counter()  # rule -> chunks that it ended
        self.deadline_misses = 0  # chunks that arrived after their deadline
        self.errors = 0  # requests that ended in an error
        self.last_error = ""
        # largest change of a joint between two commands where a new chunk took over [rad]
        self.seam_step = 0.0
        self.inner_step = 0.0  # the same elsewhere [rad]
        self._last_sent: float | None = None
        self._last_positions: NDArray[np.float64] | None = None
        self._rated: tuple[float, int] | None = None  # time [s] and `ticks` of the last `rate`

    def sent(self, now: float, positions: NDArray[np.float64], seam: bool) -> None:
        """Record a command sent at `now` [s]; `seam`: it is the first one of its chunk."""
        self.ticks += 1
        if self._last_sent is not None:
            gap = now - self._last_sent
            self.jitter.append(abs(gap - self.period))
            self.missed += gap > MISSED * self.period
        if self._last_positions is not None:
            step = float(np.abs(positions - self._last_positions).max())
            if seam:
                self.seam_step = max(self.seam_step, step)
            else:
                self.inner_step = max(self.inner_step, step)
        self._last_sent, self._last_positions = now, positions

    def paused(self) -> None:
        """Record that commands stop on purpose, so that the next gap does not count."""
        self._last_sent = self._last_positions = None

    def answered(self, response: Response) -> None:
        """Record a chunk or an error."""
        if response.error is not None:
            self.errors += 1
            self.last_error = response.error
            return
        self.images.append(response.seen.seconds)
        self.decode.append(response.seconds.get("total", math.nan))
        if "network" in response.seconds:
            self.network.append(response.seconds["network"])
        if response.exit_reason:
            self.forwards.append(response.forwards)
            self.exit_reasons[response.exit_reason] += 1

    def rate(self, now: float) -> float:
        """Return the commands per second since the last call [Hz]."""
        (start, ticks), self._rated = self._rated or (now, 0), (now, self.ticks)
        return (self.ticks - ticks) / (now - start) if now > start else 0.0
