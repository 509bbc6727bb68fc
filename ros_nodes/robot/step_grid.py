"""The time grid of commands: ticks at a fixed rate, grouped into steps, and moved so that images
arrive just in time.

Free of ROS and of clocks: callers pass all times. `PolicyStream` owns the grid; other classes only
read it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque

from ceed_vla.errors import ConfigError

SLEW = 0.02  # largest change of the time between two ticks [periods]
UNSURE = 0.0015  # images are not waited for if their expected slack is below this [s]
_SLACK = 0.004  # target time between the arrival of images and the last moment to use them [s]
_LATE = 0.004  # delay of the grid when images are missed [s]
_DEAD_BAND = 0.001  # deviation from `_SLACK` up to which the grid stays [s]
_GAIN = 0.5  # share of a surprise that is added to the drift
_FASTEST_DRIFT = 0.006  # largest drift from one chunk to the next [s]


class StepGrid:
    """Counts ticks at `rate` [Hz], and locates them in steps of `action_dt` [s].

    A step begins at the last tick of the previous step; its own ticks are 1 to `ticks_per_step`.
    That number need not be whole (30 steps a second at 100 Hz); a step then begins between two
    ticks. A tick may be moved by up to `slew` periods; 0 if the ticks have another source, such as
    /clock. `ConfigError`: The rate is too low for the steps.
    """

    def __init__(self, rate: float, action_dt: float, slew: float = SLEW) -> None:
        ticks = rate * action_dt
        if ticks < 1 - 1e-6:
            raise ConfigError(
                f"command_rate is {rate:g} Hz; it must be at least the {1 / action_dt:g} steps per "
                "second of the robot's file."
            )
        self.action_dt = action_dt
        self.ticks_per_step = float(round(ticks)) if abs(ticks - round(ticks)) < 1e-6 else ticks
        self.nominal = 1.0 / rate  # time between two ticks [s]
        self.period = self.nominal  # from the next tick to the one after it, usually the same [s]
        self._rate = rate
        self._slew = slew
        self._shift = 0.0  # time by which later ticks should come earlier [s]
        self._drift = 0.0  # of the cameras against the steps, from one chunk to the next [s]
        self._expected = math.nan  # slack at the next `align` if the drift does not change [s]
        self.images: deque[float] = deque(maxlen=9)  # times at which sets of images were complete
        self._origin = 0.0  # time of tick 0 [s]
        self._tick = 0  # the newest tick
        self._first = 0.0  # tick at which the running step began

    def count(self, now: float, dt: float) -> None:
        """Count the tick at `now` [s], `dt` [s] after the last tick; skip ticks of a longer gap.

        The grid follows its earliest ticks: a late tick does not move it.
        """
        if dt <= 0.0 or self._tick == 0:
            self._origin = now - 1.0 / self._rate
            self._tick = 1
            return
        limit = self._slew / self._rate
        shift = min(max(self._shift, -limit), limit)
        self._shift -= shift
        self._origin -= shift
        self.period = 1.0 / self._rate - shift
        self._tick = max(self._tick + 1, math.floor((now - self._origin) * self._rate + 1e-6))
        self._origin = min(self._origin, now - self._tick / self._rate)

    @property
    def part(self) -> float:
        """Tick of the running step."""
        return self._tick - self._first

    @property
    def overdue(self) -> bool:
        """Whether the running step should have ended before this tick."""
        return self.part > self.ticks_per_step + 1e-6

    @property
    def at_end(self) -> bool:
        """Whether the next tick belongs to the next step."""
        return self.part > self.ticks_per_step - 1 + 1e-6

    def begin_now(self) -> None:
        """Let the running step end with this tick."""
        self._first = self._tick - self.ticks_per_step

    def begin_step(self) -> bool:
        """Advance to the next step.

        Returns whether a whole step was missed; the next step then begins late.
        """
        self._first += self.ticks_per_step
        missed = self.part >= self.ticks_per_step
        if missed:
            self._first = self._tick - 1
        return missed

    def remaining(self, now: float) -> float:
        """Return the number of steps until the first command of the next step."""
        left = (
            math.floor(self._first + self.ticks_per_step + 1e-6)
            + 1
            - (now - self._origin) * self._rate
        )
        return max(left / self.ticks_per_step, 0.0)

    def until_images(self, now: float) -> float:
        """Return the time until the next images are expected [s]; slightly more than a tick if they
        are late or unknown.
        """
        if len(self.images) > 1:
            gaps = [later - earlier for earlier, later in itertools.pairwise(self.images)]
            due = self.images[-1] + statistics.median(gaps) - now
            if due > 0.0:
                return due
        return 1.1 / self._rate

    def delay(self) -> None:
        """Move the grid back: the request was due before the expected images arrived."""
        if self._slew and len(self.images) > 1:
            self._learn(-_LATE)
            self._move(0.0, -_LATE)

    def align(self, slack: float, until_images: float) -> None:
        """Move the grid so that images arrive shortly before the last moment to use them.

        Args:
            slack: Time from the arrival of the images to that moment, in this chunk [s].
            until_images: Time between images [s].
        """
        if not self._slew or not 0.0 <= slack < until_images + UNSURE:
            self._expected = math.nan  # the answer is needed earlier than that
            return
        # the part of the last move that is still outstanding
        surprise = slack - self._expected - self._shift
        if not math.isnan(surprise):
            self._learn(surprise - until_images * round(surprise / until_images))
        error = slack - _SLACK
        error -= until_images if error > 0.5 * until_images else 0.0  # the next images were closer
        self._move(slack, error if abs(error) > _DEAD_BAND else 0.0)

    def _learn(self, surprise: float) -> None:
        """Update the drift of the cameras against the steps; a chunk's length is not a whole number
        of image periods.
        """
        self._drift = min(max(self._drift + _GAIN * surprise, -_FASTEST_DRIFT), _FASTEST_DRIFT)

    def _move(self, slack: float, earlier: float) -> None:
        """Move the grid by `earlier` plus the drift until the next chunk, for which the rest of the
        `slack` is expected [s].
        """
        self._shift = self._drift + earlier
        self._expected = slack - earlier
