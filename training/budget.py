"""Divide a budget of minutes into steps on grounding frames, steps on actions, takeover rounds.

The duration of a step is measured before training, with the frames and on the machine of the run,
and corrected during training. The schedule is logged before training starts.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ceed_vla.errors import ConfigError
from ceed_vla.wording import counted

# kinds of steps; STEP in runs with a single kind
GROUNDING = "grounding"
ACTION = "action"
STEP = "step"
GROUNDING_SHARE = 0.2  # of the time, if there are grounding frames
TAKEOVER_SHARE = 0.1  # of the time, for each round
MOST_SPENT = 0.95  # share of the time for both
BATCH, SMALL_BATCH = 32, 16  # frames of a step on actions
FEWEST = 600  # steps on actions; if fewer fit, the small batch allows more of them
# steps on actions, in the runs of docs/tutorials/first-policy.md that learnt their task
ENOUGH = 900
FEW_STEPS = 1 / 3  # share of the requested steps below which a run warns
FEWEST_EPISODES = 100  # with fewer demonstrations the runs of docs/tutorials/first-policy.md failed
OVERHEAD = 1.15  # factor for work outside a probe: the optimisers' updates, the log, saved states
SHORTEST = 1e-6  # [s] of a step
_PROBES = 3  # steps of each kind; the first one is discarded


@dataclass(frozen=True)
class Speeds:
    """Seconds of a step.

    Attributes:
        grounding: Of a step on twice `batch` grounding frames; 0 without such frames [s].
        action: Of a step on `batch` frames with actions and its grounding frames [s].
        batch: Frames.
    """

    grounding: float
    action: float
    batch: int = BATCH

    def scaled(self, batch: int) -> Speeds:
        """The estimated speeds with another batch size."""
        factor = batch / self.batch
        return Speeds(self.grounding * factor, self.action * factor, batch)


@dataclass(frozen=True)
class Schedule:
    """How a training run uses its minutes.

    Attributes:
        minutes: The budget.
        grounding_steps: Steps on grounding frames alone, before the others.
        steps: Steps on actions.
        batch_size: Frames of a step on actions.
        rounds: Takeover rounds.
        speeds: Durations of its steps.
        frames: Frames with actions.
        episodes: Demonstrated episodes.
    """

    minutes: float
    grounding_steps: int
    steps: int
    batch_size: int
    rounds: int
    speeds: Speeds
    frames: int
    episodes: int

    @property
    def enough(self) -> bool:
        """Whether these steps and episodes were enough for a task of one object in our runs."""
        return self.steps * self.batch_size >= ENOUGH * BATCH and self.episodes >= FEWEST_EPISODES

    @property
    def expectation(self) -> str:
        """A sentence on the expected result, based on our measurements."""
        if self.enough:
            return (
                "The task of docs/tutorials/first-policy.md was learnt with as many steps and "
                "episodes; other tasks may need more."
            )
        return f"This has rarely been enough for a task of one object: {self.advice}."

    @property
    def advice(self) -> str:
        """What to change if it is not `enough`; else empty."""
        found = []
        if self.steps * self.batch_size < ENOUGH * BATCH:
            action = self.speeds.scaled(BATCH).action * ENOUGH / 60
            spent = _spent(bool(self.grounding_steps), self.rounds)
            minutes = math.ceil(action / (1 - spent))
            found.append(
                f"allow about {minutes} minutes" if minutes > self.minutes else "set more --steps"
            )
        if self.episodes < FEWEST_EPISODES:
            found.append(f"record {FEWEST_EPISODES} episodes or more")
        return "; ".join(found)

    def __str__(self) -> str:
        seen = self.steps * self.batch_size / max(1, self.frames)
        parts = [f"about {counted(self.steps, 'step')} of {counted(self.batch_size, 'frame')}"]
        if self.grounding_steps:
            parts.insert(0, f"{counted(self.grounding_steps, 'grounding step')}")
        if self.rounds:
            parts.append(counted(self.rounds, "takeover round"))
        return (
            f"{self.minutes:g} minutes on this machine: {', '.join(parts)} "
            f"({self.speeds.action:.2f} s each); every frame is seen about "
            f"{seen:.1f} times"
        )


def _spent(grounded: bool, rounds: int) -> float:
    """Share of the time for all but steps on actions."""
    return (GROUNDING_SHARE if grounded else 0.0) + TAKEOVER_SHARE * rounds


def divide(
    minutes: float,
    speeds: Speeds,
    *,
    grounded: bool,
    frames: int,
    episodes: int,
    rounds: int = 0,
    grounding_steps: int | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
) -> Schedule:
    """Divide a budget; arguments that are None are chosen, the others stay.

    Args:
        minutes: The budget, above 0.
        speeds: Durations of a step on this machine.
        grounded: Whether there are grounding frames.
        frames: Frames with actions.
        episodes: Demonstrated episodes.
        rounds: Takeover rounds, each of which takes `TAKEOVER_SHARE` of the time.
        grounding_steps: Steps on grounding frames; by default `GROUNDING_SHARE` of the time.
        batch_size: Frames of a step on actions.
        steps: Most steps on actions.

    Returns:
        The schedule.

    Raises:
        ConfigError: The takeover rounds leave no time for steps on actions.
    """
    if _spent(grounded, rounds) > MOST_SPENT:
        most = int((MOST_SPENT - _spent(grounded, 0)) / TAKEOVER_SHARE)
        raise ConfigError(
            f"rounds is {rounds}; each takes {TAKEOVER_SHARE:.0%} of max_minutes, so at most "
            f"{most} leave time for steps on actions. Set fewer --rounds, or --steps instead of "
            "--max_minutes."
        )
    seconds = 60 * minutes
    available = seconds * (1 - TAKEOVER_SHARE * rounds)
    share = GROUNDING_SHARE * seconds if grounded else 0.0
    if batch_size is None:
        batch_size = (
            BATCH if available - share >= FEWEST * speeds.scaled(BATCH).action else SMALL_BATCH
        )
    scaled = speeds.scaled(batch_size)
    if not grounded:
        grounding_steps = 0
    elif grounding_steps is None:
        grounding_steps = max(1, int(share / max(scaled.grounding, SHORTEST)))
    left = available - grounding_steps * scaled.grounding
    fitting = max(1, int(left / max(scaled.action, SHORTEST)))
    steps = fitting if steps is None else min(steps, fitting)
    return Schedule(minutes, grounding_steps, steps, batch_size, rounds, scaled, frames, episodes)


class StepTimer:
    """Mean seconds of a step, by its kind; the first step of a kind is discarded."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps: dict[str, int] = defaultdict(int)

    def add(self, kind: str, seconds: float) -> None:
        self._steps[kind] += 1
        if self._steps[kind] > 1:
            self._seconds[kind] += seconds

    def means(self) -> dict[str, float]:
        """Mean seconds of a step, for kinds with two steps or more."""
        counts = {kind: steps - 1 for kind, steps in self._steps.items() if steps > 1}
        return {kind: self._seconds[kind] / count for kind, count in counts.items()}


def probe(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each kind of step, `OVERHEAD` included, from a few steps without an update."""
    timer = StepTimer()
    for kind, take in steps.items():
        for _ in range(_PROBES):
            began = time.monotonic()
            take()
            timer.add(kind, OVERHEAD * (time.monotonic() - began))
    return timer.means()
