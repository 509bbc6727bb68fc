"""Runs one task after the other, with a result for each. Free of ROS and of clocks."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.mode import Mode, State
from ceed_vla.texts import instruction_problem, short, shown

LONGEST = 86_400.0  # largest time limit [s]
MOST_QUEUED = 8
MOST_TEXT = 10_000  # characters of a message on ~/task
# Time after a task in which no other begins [s]: the hold was sent, and the arm is at rest.
PAUSE = 0.5
PATIENCE = 5.0  # time for which a task waits for fresh and settled inputs [s]
# In these states the arm does not move, and does not move again by itself.
ENDED = (Mode.UNCONFIGURED, Mode.INACTIVE, Mode.DISABLED, Mode.STOPPED)


class Outcome(StrEnum):
    """How a task ended."""

    SUCCESS = "success"  # the topic of the parameter success_topic said so
    TIME_LIMIT = "time_limit"
    CANCELLED = "cancelled"
    FAILED = "failed"  # motion was forbidden: an outage, a stop, a conflict, an operator
    REFUSED = "refused"  # it did not start


@dataclass(frozen=True)
class Task:
    """What to do, and for how long.

    Attributes:
        id: Chosen by who asks; the result has it.
        instruction: For the policy.
        time_limit: Longest time [s]; 0: none.
    """

    id: str
    instruction: str
    time_limit: float = 0.0

    def __post_init__(self) -> None:
        problem = instruction_problem(self.instruction)
        if not self.instruction.strip():
            problem = "it is empty"
        if problem:
            raise ConfigError(f"The task's instruction is invalid: {problem}.")
        if not 0.0 <= self.time_limit <= LONGEST:  # NaN, too
            raise ConfigError(
                f"The task's time_limit is {self.time_limit}; it must lie in [0, {LONGEST:g}] s."
            )


@dataclass(frozen=True)
class TaskResult:
    """How a task ended.

    Attributes:
        id: Of the task.
        instruction: Of the task.
        outcome: One of `Outcome`.
        reason: In words.
        seconds: Time since its start [s].
    """

    id: str
    instruction: str
    outcome: str
    reason: str
    seconds: float

    def json(self) -> str:
        """The result as a JSON object."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Refusal:
    """Why a task does not begin.

    Attributes:
        reason: In words.
        passing: Whether it may begin a little later.
    """

    reason: str
    passing: bool = False


class Controls(Protocol):
    """What a task does with the robot."""

    @property
    def state(self) -> State:
        """The present state."""

    def begin(self, instruction: str) -> Refusal | None:
        """Give the policy an instruction and allow motion; return why that is refused."""

    def end(self) -> None:
        """Forbid motion: the arm holds at the next command."""


class TaskRunner:
    """Runs tasks.

    Args:
        controls: The robot.
        queued: Number of tasks that may wait; 0: a second task is refused.

    Attributes:
        task: The task that runs; None if none does.
    """

    def __init__(self, controls: Controls, queued: int) -> None:
        self.task: Task | None = None
        self._controls = controls
        self._queued = queued
        self._waiting: deque[tuple[Task, float]] = deque()  # with the time of their arrival [s]
        self._began = -math.inf
        self._ended = -math.inf  # time of the last task's end [s]
        self._results: deque[TaskResult] = deque()
        self._latest = -math.inf  # newest time [s]

    @property
    def waiting(self) -> int:
        """Number of tasks that wait."""
        return len(self._waiting)

    def elapsed(self, now: float) -> float:
        """Time since the start of the task that runs [s]; 0 without one."""
        return 0.0 if self.task is None else now - self._began

    def submit(self, task: Task, now: float) -> bool:
        """Start a task at the time `now` [s], or let it wait; if neither, it has a result at once.

        Returns:
            Whether it runs or waits.
        """
        self._follow(now)
        room = self._queued + (self.task is None)  # one may be about to begin
        if len(self._waiting) >= room:
            first = self.task or self._waiting[0][0]
            busy = f"the task {shown(short(first.instruction, 80))} runs"
            if self._waiting and self.task is not None:
                busy += f", and {len(self._waiting)} wait"
            self._finish(task, Outcome.REFUSED, busy, 0.0)
            return False
        self._waiting.append((task, now))
        self._start_next(now)
        return self.task is task or (task, now) in self._waiting

    def cancel(self, now: float, id: str = "") -> int:
        """Cancel a task, or all; return how many were cancelled."""
        chosen = [one for one in self._waiting if id in ("", one[0].id)]
        for one in chosen:
            self._waiting.remove(one)
            self._finish(one[0], Outcome.CANCELLED, "it was cancelled while it waited", 0.0)
        if self.task is not None and id in ("", self.task.id):
            self._end(Outcome.CANCELLED, "it was cancelled", now)
            return len(chosen) + 1
        return len(chosen)

    def forbid(self, now: float, why: str) -> None:
        """Let the task that runs fail, and cancel those that wait, because an operator forbade
        motion.
        """
        if self.task is not None:
            self._end(Outcome.FAILED, why, now)
        self.cancel_waiting(why)

    def solved(self, now: float) -> None:
        """Record that the task that runs is solved."""
        if self.task is not None:
            self._end(Outcome.SUCCESS, "it is solved", now)

    def advance(self, now: float) -> Iterator[TaskResult]:
        """End the task if its time is over or motion was forbidden, start the next one, and yield
        the results since the last call.
        """
        self._follow(now)
        task = self.task
        if task is not None:
            state = self._controls.state
            if task.time_limit and now - self._began >= task.time_limit:
                self._end(Outcome.TIME_LIMIT, f"its {task.time_limit:g} s are over", now)
            elif state.mode in ENDED:
                self._end(Outcome.FAILED, str(state), now)
        self._start_next(now)
        while self._results:
            yield self._results.popleft()

    def _start_next(self, now: float) -> None:
        """Start the next task that waits, if the robot can begin one now."""
        while self.task is None and self._waiting and now - self._ended >= PAUSE:
            task, arrived = self._waiting[0]
            refused = self._controls.begin(task.instruction)
            if refused is not None and refused.passing and now - arrived < PATIENCE:
                return
            self._waiting.popleft()
            if refused is not None:
                self._finish(task, Outcome.REFUSED, refused.reason, 0.0)
                continue
            self.task = task
            self._began = now

    def _end(self, outcome: Outcome, reason: str, now: float) -> None:
        """End the task that runs, and hold the arm."""
        assert self.task is not None
        self._controls.end()
        self._finish(self.task, outcome, reason, now - self._began)
        self.task = None
        self._ended = now
        if outcome is Outcome.FAILED:  # an operator must see to it before the next one
            self.cancel_waiting("the task before it failed")

    def cancel_waiting(self, why: str) -> None:
        """Cancel the tasks that wait."""
        for task, _ in self._waiting:
            self._finish(task, Outcome.CANCELLED, why, 0.0)
        self._waiting.clear()

    def _follow(self, now: float) -> None:
        """Move the stored times with the clock if it went back, as simulated time may."""
        back = self._latest - now
        self._latest = now
        if back > 0.0:
            self._began -= back
            self._ended -= back
            self._waiting = deque((task, arrived - back) for task, arrived in self._waiting)

    def _finish(self, task: Task, outcome: Outcome, reason: str, seconds: float) -> None:
        self._results.append(
            TaskResult(task.id, task.instruction, outcome, short(reason, 500), round(seconds, 3))
        )


def read_task(text: str) -> Task:
    """Return the task of a message on ``~/task``: an instruction, or a JSON object with
    ``instruction`` and optionally ``time_limit`` [s] and ``id``.

    `ConfigError`: It is neither.
    """
    fields = read_fields(text)
    if fields is None:
        return Task("", text)
    unknown = sorted(set(fields) - {"id", "instruction", "time_limit"})
    if unknown:
        raise ConfigError(
            f"The task has {shown(unknown[0])}; a task has id, instruction and time_limit."
        )
    limit = fields.get("time_limit", 0.0)
    texts = (fields.get("instruction"), fields.get("id", ""))
    if not all(isinstance(one, str) for one in texts):
        raise ConfigError("The task's instruction and id must be strings.")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or abs(limit) > 1e9:
        raise ConfigError(f"The task's time_limit is {shown(limit)}; give a number of seconds.")
    return Task(str(texts[1]), str(texts[0]), float(limit))


def read_fields(text: str) -> dict[str, Any] | None:
    """Return the fields of a JSON object; None if the text is an instruction.

    `ConfigError`: It is too long, or begins like an object and is none.
    """
    if len(text) > MOST_TEXT:
        raise ConfigError(f"The task has {len(text)} characters; at most {MOST_TEXT} are read.")
    if not text.lstrip().startswith("{"):
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The task {shown(text)} is no JSON ({short(error)}).") from error
    assert isinstance(fields, dict)  # it begins with a brace
    return fields
