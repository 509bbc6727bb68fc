"""The time line of commands: ticks at a fixed rate, steps of so many ticks, moved so that images
come just in time.

Free of ROS and of clocks: times are given. `PolicyStream` owns the grid; others only read it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque

from ceed_vla.errors import ConfigError

SLEW = 0.02  # largest change of the time between two ticks, in periods
UNSURE = 0.0015  # images that are expected to come with less slack than this are not waited for [s]
_SLACK = 0.004  # wanted between the arrival of images and the last moment to use them [s]
_LATE = 0.004  # how far the grid is delayed when images are missed [s]
_DEAD_BAND = 0.001  # deviation from `_SLACK` at which the grid stays [s]
_GAIN = 0.5  # share of a surprise that the drift takes over
_FASTEST_DRIFT = 0.006  # from one chunk to the next [s]


class StepGrid:
    """Numbers ticks, of which `rate` come in a second, and says where in a step of `action_dt` [s]
    they are.

    A step begins at the tick that is the last of the step before; its own ticks are 1 to
    `ticks_per_step`. That need not be a whole number (30 steps a second at 100 Hz): then it begins
    between two ticks. A tick may be moved by `slew` periods; 0 where the ticks come from elsewhere,
    such as /clock. `ConfigError`: A rate that is too low for the steps.
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
        self.period = self.nominal  # until the next tick but one, nearly always the same [s]
        self._rate = rate
        self._slew = slew
        self._shift = 0.0  # how much earlier the ticks shall come [s]
        self._drift = 0.0  # of the cameras against the steps, from one chunk to the next [s]
        self._expected = math.nan  # what `align` is told next, unless cameras drift otherwise [s]
        self.images: deque[float] = deque(maxlen=9)  # when sets of new images were complete [s]
        self._origin = 0.0  # time of tick 0 [s]
        self._tick = 0  # the newest tick
        self._first = 0.0  # tick at which the step that runs began

    def count(self, now: float, dt: float) -> None:
        """Number the tick at `now` [s], `dt` after the last one [s]; the ticks of a longer gap are
        left out.

        The grid lies on its earliest ticks: a late one does not move it.
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
        """Tick of the step that runs."""
        return self._tick - self._first

    @property
    def overdue(self) -> bool:
        """Whether the step that runs should have ended before this tick."""
        return self.part > self.ticks_per_step + 1e-6

    @property
    def at_end(self) -> bool:
        """Whether the next tick belongs to the next step."""
        return self.part > self.ticks_per_step - 1 + 1e-6

    def begin_now(self) -> None:
        """Let the step that runs end with this tick."""
        self._first = self._tick - self.ticks_per_step

    def begin_step(self) -> bool:
        """Go on to the next step. Returns whether a whole step was missed; then the next one begins
        late.
        """
        self._first += self.ticks_per_step
        missed = self.part >= self.ticks_per_step
        if missed:
            self._first = self._tick - 1
        return missed

    def remaining(self, now: float) -> float:
        """Steps until the first command of the next step."""
        left = (
            math.floor(self._first + self.ticks_per_step + 1e-6)
            + 1
            - (now - self._origin) * self._rate
        )
        return max(left / self.ticks_per_step, 0.0)

    def until_images(self, now: float) -> float:
        """Time until the next images are expected [s]; a little more than a tick if they are late
        or unknown.
        """
        if len(self.images) > 1:
            gaps = [later - earlier for earlier, later in itertools.pairwise(self.images)]
            due = self.images[-1] + statistics.median(gaps) - now
            if due > 0.0:
                return due
        return 1.1 / self._rate

    def delay(self) -> None:
        """Move the grid back: the request could wait no longer, and the images that were expected
        have not come.
        """
        if self._slew and len(self.images) > 1:
            self._learn(-_LATE)
            self._move(0.0, -_LATE)

    def align(self, slack: float, until_images: float) -> None:
        """Move the grid so that images come shortly before it is too late for them.

        `slack` is how much before they came this time [s], `until_images` the time between images
        [s].
        """
        if not self._slew or not 0.0 <= slack < until_images + UNSURE:
            self._expected = math.nan  # the answer is needed sooner than that
            return
        # what is left of the last move was not made
        surprise = slack - self._expected - self._shift
        if not math.isnan(surprise):
            self._learn(surprise - until_images * round(surprise / until_images))
        error = slack - _SLACK
        error -= until_images if error > 0.5 * until_images else 0.0  # the next images were nearer
        self._move(slack, error if abs(error) > _DEAD_BAND else 0.0)

    def _learn(self, surprise: float) -> None:
        """How far the cameras come off the steps by themselves: chunks last no whole number of
        their periods.
        """
        self._drift = min(max(self._drift + _GAIN * surprise, -_FASTEST_DRIFT), _FASTEST_DRIFT)

    def _move(self, slack: float, earlier: float) -> None:
        """Move the grid by so much and the drift until the next chunk; what is left of the `slack`
        is expected [s].
        """
        self._shift = self._drift + earlier
        self._expected = slack - earlier
