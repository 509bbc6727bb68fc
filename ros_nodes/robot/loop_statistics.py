"""Counters and percentiles of the control loop, free of ROS."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ros_nodes.robot.predictor import Response

MISSED = 1.5  # periods without a command that count as a missed tick


class Window:
    """The last `size` values of something."""

    def __init__(self, size: int) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        """Add one."""
        self._values.append(value)

    def percentile(self, share: float) -> float:
        """The `share` percentile, NaN without values."""
        return float(np.percentile(self._values, share)) if self._values else math.nan

    @property
    def mean(self) -> float:
        """NaN without values."""
        return sum(self._values) / len(self._values) if self._values else math.nan


@dataclass
class LoopStatistics:
    """What the loop did since activation; windows hold the last 20 s of commands and the last 200 chunks.

    Attributes:
        period: Nominal time between commands [s].
        ticks: Commands sent.
        missed: Gaps of more than `MISSED` periods between two commands of one motion.
        slips: Times that the step grid was set back because a whole step was missed.
        jitter: |period - nominal| of every command [s].
        decode: Time of every chunk, as the policy's side measured it [s].
        to_command: From the oldest image of an observation to the first command computed from it [s].
        beyond_decode: The same without the chunk's decoding [s].
        forwards: Model calls of every chunk.
        exit_reasons: Rule -> chunks that it ended.
        deadline_misses: Chunks that came after their deadline.
        errors: Requests that ended in an error.
        last_error: The last one.
        seam_step: Largest change of a joint between two commands at a step where a new chunk took over [rad].
        inner_step: The same elsewhere.
    """

    period: float
    ticks: int = 0
    missed: int = 0
    slips: int = 0
    jitter: Window = field(default_factory=lambda: Window(2000))
    decode: Window = field(default_factory=lambda: Window(200))
    to_command: Window = field(default_factory=lambda: Window(200))
    beyond_decode: Window = field(default_factory=lambda: Window(200))
    forwards: Window = field(default_factory=lambda: Window(200))
    exit_reasons: Counter[str] = field(default_factory=Counter)
    deadline_misses: int = 0
    errors: int = 0
    last_error: str = ""
    seam_step: float = 0.0
    inner_step: float = 0.0
    _last_sent: float | None = None
    _last_positions: NDArray[np.float64] | None = None
    _rate_ticks: int = 0
    _rate_start: float | None = None

    def sent(self, now: float, positions: NDArray[np.float64], seam: bool) -> None:
        """A command left at `now` [s]; `seam`: it is the first after a new chunk took over."""
        self.ticks += 1
        self._rate_ticks += 1
        if self._last_sent is not None:
            gap = now - self._last_sent
            self.jitter.add(abs(gap - self.period))
            self.missed += gap > MISSED * self.period
        if self._last_positions is not None:
            step = float(np.abs(positions - self._last_positions).max())
            if seam:
                self.seam_step = max(self.seam_step, step)
            else:
                self.inner_step = max(self.inner_step, step)
        self._last_sent, self._last_positions = now, positions

    def paused(self) -> None:
        """No command is sent now on purpose: the gap that follows is none."""
        self._last_sent = self._last_positions = None

    def answered(self, response: Response) -> None:
        """A chunk or an error came."""
        if response.error is not None:
            self.errors += 1
            self.last_error = response.error
            return
        self.decode.add(response.seconds.get("total", math.nan))
        if response.exit_reason:
            self.forwards.add(response.forwards)
            self.exit_reasons[response.exit_reason] += 1

    def rate(self, now: float) -> float:
        """Commands per second since the last call [Hz]."""
        start, ticks = self._rate_start, self._rate_ticks
        self._rate_start, self._rate_ticks = now, 0
        return ticks / (now - start) if start is not None and now > start else 0.0
