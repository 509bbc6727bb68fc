"""Joins action chunks into one stream of steps: token real-time chunking, free of clocks, threads
and ROS.

While a chunk runs, the next one is decoded, from the newest observation that is still in time for
the step at which it shall take over. The steps that are consumed before it is ready are its *frozen
prefix*, so the new chunk agrees with the running one up to there:

    running chunk     | 0 1 2 3 4 5 6 7 |
    request in step 1       ^                    the answer is expected to take 2.3 steps
    next chunk                | 0 1 2 3 4 5 6 7 |      0, 1 = steps 2, 3 of the running one
                                    ^ takes over here, after `replan_steps` 4; the rest is decoded

An answer that takes less than the rest of the running step freezes nothing. The delay is measured
on the step grid, in steps that were consumed between request and answer, so it needs no clock.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ConfigError

_DELAYS = 32  # answers that the expected delay looks back on


@dataclass(frozen=True)
class Plan:
    """A chunk to request."""

    id: int  # the answer repeats it
    # tokens (n,) of the running chunk for the warm start; None without one
    previous: NDArray[np.int64] | None
    shift_steps: int  # steps of `previous` that are consumed
    # Steps that will be consumed before the answer is expected: the first ones of the new chunk,
    # equal to the next ones of `previous`. 0 if nothing runs.
    frozen_steps: int
    # time until the answer is needed, from the request on [s]; None if nothing runs
    deadline_s: float | None


@dataclass(frozen=True)
class Target:
    """What one step of the grid does."""

    # "chunk", or why there is no action and the arm holds: "stopped" (not started), "waiting" (for
    # the first chunk) or "starved" (the running chunk ended before the next one came).
    source: str
    action: NDArray[np.float32] | None = None  # (A,)
    chunk_id: int | None = None  # the plan that the action comes from
    index: int = -1  # step of that chunk
    seam: bool = False  # this is the first step taken from its chunk


@dataclass
class StreamCounters:
    """What happened since construction."""

    switched: int = 0  # chunks that took over
    late: int = 0  # chunks that took over after more steps than were frozen: their seam may jump
    missed: int = 0  # chunks that arrived when all their steps were past
    starved: int = 0  # steps held because the running chunk had ended


class ChunkStream:
    """Which action each step executes, when the next chunk is due, and how many steps it will take.

    Call `plan` whenever a request could be sent; `offer` or `cancel` follows. `target` takes a step
    at a boundary.

    Args:
        chunk_steps: ``m``.
        replan_steps: Steps ``h`` after which the next chunk is due, in [1, m].
        action_dt: Duration of a step [s].
        delay_steps: First estimate of the steps consumed between a request and its answer, at least
            0.
        least_lead: Steps before a boundary after which no request can be sent for it any more.

    Attributes:
        started: Whether it runs.
        grace: Share of a step that an answer may come too late and still replace it (`redo`), in
            [0, 1).
        margin: Time between an answer and the boundary that needs it [s].
        quantile: Of the delays of the last answers, which is expected of the next one, in (0, 1].

    `ConfigError`: More steps than a chunk has, or none.
    """

    grace = 0.3
    margin = 0.001
    quantile = 0.5

    def __init__(
        self,
        chunk_steps: int,
        replan_steps: int,
        action_dt: float,
        *,
        delay_steps: float = 1.0,
        least_lead: float = 0.0,
    ) -> None:
        self.action_dt = action_dt
        self._least_lead = least_lead
        self.counters = StreamCounters()
        self._delays: deque[float] = deque(maxlen=_DELAYS)
        self._ids = itertools.count(1)
        self.fit(chunk_steps, replan_steps, delay_steps)
        self.stop()

    def fit(self, chunk_steps: int, replan_steps: int, delay_steps: float) -> None:
        """Take chunks of another length from now on; the arguments are the constructor's, before
        `start`.
        """
        if chunk_steps < 1 or not 1 <= replan_steps <= chunk_steps:
            raise ConfigError(
                f"replan_steps is {replan_steps} for chunks of {chunk_steps} steps; "
                f"it must lie in [1, {max(chunk_steps, 1)}]."
            )
        self.chunk_steps = chunk_steps
        self.replan_steps = replan_steps
        self._first_delay = delay_steps

    @property
    def pending(self) -> int | None:
        """Id of the plan whose answer is pending."""
        return self._next.plan.id if self._next else None

    @property
    def arrived(self) -> bool:
        """Whether its answer is here."""
        return self._next is not None and self._next.actions is not None

    @property
    def partial(self) -> bool:
        """Whether the rest of the running chunk is still to come."""
        return self._running is not None and not self._running.whole

    @property
    def delay_steps(self) -> float:
        """Steps that the next answer is expected to take."""
        if not self._delays:
            return self._first_delay
        ordered = sorted(self._delays)
        # the smallest that covers the quantile
        return ordered[math.ceil(self.quantile * len(ordered)) - 1]

    @property
    def lead(self) -> float:
        """Steps before a boundary by which a request must be sent to be answered in time."""
        return max(self.delay_steps + self.margin / self.action_dt, self._least_lead)

    def start(self) -> None:
        """Begin without a chunk: hold until the first one arrives; its request is due at once."""
        self.stop()
        self.started = True

    def stop(self) -> None:
        """Forget the running chunk and any answer under way; hold until `start`."""
        self.started = False
        self._replan_now = False
        self._seam = False  # the next step is the first one of its chunk
        self._moving = False  # the running step is one of a chunk
        self._running: _Chunk | None = None
        self._next: _Chunk | None = None
        self._consumed = 0  # steps taken from chunks
        self._boundaries = 0  # the same with the steps that were held

    def preempt(self) -> None:
        """Make a new chunk due at once and ignore the pending answer: the instruction changed."""
        self._next = None
        self._replan_now = True

    def plan(self, remaining: float = 0.0, wait: float = 0.0) -> Plan | None:
        """The chunk to ask for now, or None if none is due.

        `remaining` are the steps until the next one is consumed, at most 1 as a rule; `wait` those
        until the next chance to send a request, with a newer observation.
        """
        if not self.started or self._next is not None:
            return None
        index, left = self._position()
        lead = self.lead
        runs = left > 0 or self._moving
        # steps that are consumed until it is ready
        frozen = max(math.ceil(lead - remaining - 1e-9), 0)
        if runs and not self._replan_now:
            frozen = max(frozen, self.replan_steps - index)
            # What is frozen must be there, and the answer must come before the running chunk ends.
            if min(frozen, left) + remaining - lead >= wait:
                return None
        # At least one step of the new chunk must be left to decode.
        frozen = min(frozen, left, self.chunk_steps - 1)
        running = self._running
        plan = Plan(
            id=next(self._ids),
            previous=running.tokens if running else None,
            shift_steps=index,
            frozen_steps=frozen if running and running.tokens is not None else 0,
            deadline_s=(
                (frozen + remaining + self.grace) * self.action_dt - self.margin if runs else None
            ),
        )
        self._next = _Chunk(plan, self._consumed, self._boundaries + 1 - remaining, frozen)
        self._replan_now = False
        return plan

    def cancel(self, plan_id: int) -> None:
        """The request was not sent, or failed: it is due again at once."""
        if self.pending == plan_id:
            self._next = None
            self._replan_now = True

    def offer(
        self,
        plan_id: int,
        actions: NDArray[np.float32],
        tokens: NDArray[np.int64] | None = None,
        remaining: float = 0.0,
        *,
        whole: bool = True,
    ) -> bool:
        """Take an answer to a plan: actions (m, A), tokens (n,), None for policies without;
        `remaining` as in `plan`.

        It takes over at the next boundary. Of an answer that is not `whole` these are the first
        actions (k, A); the others follow. Returns False if the answer is no longer pending.
        `ConfigError`: Actions that are no finite (m, A).
        """
        fits = actions.ndim == 2 and (
            len(actions) == self.chunk_steps if whole else len(actions) < self.chunk_steps
        )
        if not fits or not np.isfinite(actions).all():
            raise ConfigError(
                f"The chunk has shape {actions.shape}, finite: {bool(np.isfinite(actions).all())}; "
                f"expected ({self.chunk_steps}, A) finite actions."
            )
        chunk = self._next or self._running
        if chunk is None or chunk.plan.id != plan_id or chunk.whole:
            return False
        chunk.actions = actions
        chunk.tokens = tokens
        chunk.whole = whole
        if whole and chunk is self._next:  # otherwise its first steps have moved the grid
            self._delays.append(max(self._boundaries + 1 - remaining - chunk.position, 0.0))
        return True

    def target(self) -> Target:
        """What the step that begins now does; consumes it."""
        self._take_over()
        self._boundaries += 1
        if not self.started:
            return Target("stopped")
        if self._running is None:
            return Target("waiting")
        index, left = self._position()
        self._moving = left > 0
        if not left:
            self.counters.starved += 1
            return Target("starved")
        self._consumed += 1
        seam = self._seam
        self._seam = False
        assert self._running.actions is not None
        return Target("chunk", self._running.actions[index], self._running.plan.id, index, seam)

    def redo(self) -> Target | None:
        """The step that began last, from a chunk that came too late for it by less than `grace`;
        None if none did.
        """
        chunk = self._next
        if chunk is None or chunk.actions is None or self._running is None:
            return None
        if self._consumed - chunk.start != chunk.frozen_steps + 1:
            return None
        self._consumed -= 1
        self._boundaries -= 1
        return self.target()

    @property
    def upcoming(self) -> tuple[int, NDArray[np.float32]]:
        """The plan that runs, 0 if none does, and its actions (k, A) that are still to come."""
        if self._running is None or self._running.actions is None:
            return 0, np.empty((0, 0), np.float32)
        return self._running.plan.id, self._running.actions[self._position()[0] :]

    def _position(self) -> tuple[int, int]:
        """Next step of the running chunk, and how many it has left."""
        if self._running is None or self._running.actions is None:
            return 0, 0
        steps = len(self._running.actions)
        index = min(self._consumed - self._running.start, steps)
        return index, steps - index

    def _take_over(self) -> None:
        """Make the chunk that arrived the running one, at the step that is next in it."""
        chunk = self._next
        if chunk is None or chunk.actions is None:
            return
        self._next = None
        taken = self._consumed - chunk.start
        if taken >= self.chunk_steps:
            self.counters.missed += 1
            return
        self.counters.switched += 1
        self.counters.late += taken > chunk.frozen_steps
        self._running = chunk
        self._seam = True


@dataclass
class _Chunk:
    """A chunk whose step 0 is the step that was next when it was requested."""

    plan: Plan
    start: int  # steps consumed until then: steps that are held move nothing, so they do not count
    position: float  # then, on the step grid
    # steps that are consumed until the answer is expected, whether the policy can freeze them or
    # not
    frozen_steps: int
    actions: NDArray[np.float32] | None = None  # None until the answer is here
    tokens: NDArray[np.int64] | None = None
    whole: bool = False  # whether these are all of them
