"""Joins action chunks into one stream of steps: token real-time chunking, free of clocks, threads and ROS.

While a chunk runs, the next one is decoded from the newest observation. The steps that will be consumed before it
is ready are its *frozen prefix*, so the new chunk agrees with the running one up to the step at which it takes over:

    running chunk   | 0 1 2 3 4 5 6 7 |
    request at index 4, frozen_steps 2  ^
    next chunk              | 0 1 2 3 4 5 6 7 |      0, 1 = steps 4, 5 of the running one
                                  ^ takes over here when its answer took two steps; the rest is decoded

At every boundary of the step grid a node calls, in this order::

    plan = stream.plan()          # a new chunk is due
    if plan and not worker.submit(request(plan)):
        stream.cancel(plan.id)
    target = stream.target()      # consumes one step

and between boundaries ``stream.offer(response.id, ...)`` or ``stream.cancel(response.id)`` as answers arrive.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """A chunk to ask for.

    Attributes:
        id: Names the request; the answer repeats it.
        previous: Tokens (n,) int64 of the running chunk for the warm start; None without one.
        shift_steps: Steps of `previous` that are consumed.
        frozen_steps: Steps that will be consumed before the answer is expected: the first ones of the new chunk, equal
            to the next ones of `previous`. 0 if nothing runs.
        deadline_s: Time until the answer is needed, from the boundary of the request [s]; None if nothing runs.
    """

    id: int
    previous: NDArray[np.int64] | None
    shift_steps: int
    frozen_steps: int
    deadline_s: float | None


@dataclass(frozen=True)
class Target:
    """What one step of the grid does.

    Attributes:
        source: "chunk", or why there is no action and the arm holds: "stopped" (not started), "waiting" (for the
            first chunk) or "starved" (the running chunk ended before the next one came).
        action: (A,) of the step; None unless `source` is "chunk".
        chunk_id: The plan that the action comes from; None without one.
        index: Step of that chunk.
        seam: Whether this is the first step taken from its chunk.
    """

    source: str
    action: NDArray[np.float32] | None = None
    chunk_id: int | None = None
    index: int = -1
    seam: bool = False


@dataclass
class StreamCounters:
    """What happened since construction.

    Attributes:
        planned: Chunks asked for.
        switched: Chunks that took over.
        late: Chunks that took over after more steps than were frozen: their seam may jump.
        missed: Chunks that arrived when all their steps were past.
        stale: Answers that nobody waited for any more.
        cancelled: Requests without an answer.
        starved: Steps held because the running chunk had ended.
        waited: Steps held before the first chunk.
    """

    planned: int = 0
    switched: int = 0
    late: int = 0
    missed: int = 0
    stale: int = 0
    cancelled: int = 0
    starved: int = 0
    waited: int = 0


class ChunkStream:
    """Which action each step executes, when the next chunk is due, and how many steps it will take.

    Args:
        chunk_steps: Steps ``m`` of a chunk.
        replan_steps: Steps ``h`` after which the next chunk is due, in [1, m].
        action_dt: Duration of a step [s].
        delay_steps: First estimate of the steps consumed between a request and its answer, at least 1.
        delay_window: Past answers that the estimate looks at.
        delay_quantile: Quantile of their delays that it takes, in (0, 1].
        deadline_margin_s: Time between the end of decoding and the boundary that needs it [s].

    Raises:
        ConfigError: A value outside its range.
    """

    _running: _Chunk | None
    _pending: _Pending | None
    _arrived: _Chunk | None
    _seam: bool

    def __init__(
        self,
        chunk_steps: int,
        replan_steps: int,
        action_dt: float,
        *,
        delay_steps: int = 1,
        delay_window: int = 16,
        delay_quantile: float = 0.9,
        deadline_margin_s: float = 0.01,
    ) -> None:
        if chunk_steps < 1 or not 1 <= replan_steps <= chunk_steps:
            raise ConfigError(
                f"replan_steps is {replan_steps} for chunks of {chunk_steps} steps; "
                f"it must lie in [1, {max(chunk_steps, 1)}]."
            )
        if not (0 < action_dt < math.inf and 0 <= deadline_margin_s < action_dt):
            raise ConfigError(
                f"action_dt is {action_dt} s with a deadline margin of {deadline_margin_s} s; "
                "the duration must be positive and the margin shorter."
            )
        if delay_steps < 1 or delay_window < 1 or not 0 < delay_quantile <= 1:
            raise ConfigError(
                f"delay_steps {delay_steps} and delay_window {delay_window} must be at least 1, "
                f"delay_quantile {delay_quantile} must lie in (0, 1]."
            )
        self.chunk_steps, self.replan_steps, self.action_dt = chunk_steps, replan_steps, action_dt
        self.counters = StreamCounters()
        self._margin, self._quantile = deadline_margin_s, delay_quantile
        self._first_delay = delay_steps
        self._delays: deque[int] = deque(maxlen=delay_window)
        self._ids = itertools.count(1)
        self._started = False
        self._forget()

    @property
    def started(self) -> bool:
        """Whether the stream is started."""
        return self._started

    @property
    def pending(self) -> int | None:
        """Id of the plan that is waited for."""
        return self._pending.plan.id if self._pending else None

    @property
    def delay_steps(self) -> int:
        """Steps that the next answer is expected to take, in [1, chunk_steps]."""
        if not self._delays:
            return min(self._first_delay, self.chunk_steps)
        ordered = sorted(self._delays)
        rank = math.ceil(self._quantile * len(ordered))  # the smallest delay that covers the quantile
        return min(max(ordered[rank - 1], 1), self.chunk_steps)

    def start(self) -> None:
        """Begin without a chunk: hold until the first one arrives, and ask for it at the next boundary."""
        self._forget()
        self._started = True

    def stop(self) -> None:
        """Forget the running chunk and any answer under way; hold until `start`."""
        self._forget()
        self._started = False

    def hurry(self) -> None:
        """Ask for a new chunk at the next boundary and ignore the answer under way: the instruction changed."""
        self._pending = self._arrived = None
        self._hurry = True

    def plan(self) -> Plan | None:
        """The chunk to ask for at this boundary, or None if none is due. Call before `target`."""
        self._take_over()
        if not self._started or self._pending is not None or not self._is_due():
            return None
        index, left = self._position()
        # At least one step of the new chunk must be left to decode.
        frozen = min(self.delay_steps, left, self.chunk_steps - 1)
        running = self._running
        plan = Plan(
            id=next(self._ids),
            previous=running.tokens if running else None,
            shift_steps=index,
            frozen_steps=frozen if running and running.tokens is not None else 0,
            deadline_s=frozen * self.action_dt - self._margin if frozen else None,
        )
        self._pending = _Pending(plan, self._consumed, self._boundaries, frozen)
        self._hurry = False
        self.counters.planned += 1
        return plan

    def cancel(self, plan_id: int) -> None:
        """The request was not sent, or failed: it is due again at the next boundary."""
        if self._pending is not None and self._pending.plan.id == plan_id:
            self._pending = None
            self._hurry = True
            self.counters.cancelled += 1

    def offer(
        self, plan_id: int, actions: NDArray[np.float32], tokens: NDArray[np.int64] | None = None
    ) -> bool:
        """Take an answer, actions (m, A) and tokens (n,); it takes over at the next boundary.

        Returns:
            False if nobody waits for it any more.

        Raises:
            ConfigError: Actions that are no finite (m, A).
        """
        if actions.ndim != 2 or len(actions) != self.chunk_steps or not np.isfinite(actions).all():
            raise ConfigError(
                f"The chunk has shape {actions.shape}, finite: {bool(np.isfinite(actions).all())}; "
                f"expected ({self.chunk_steps}, A) finite actions."
            )
        if self._pending is None or self._arrived is not None or self._pending.plan.id != plan_id:
            self.counters.stale += 1
            return False
        self._arrived = _Chunk(plan_id, actions, tokens, self._pending.consumed)
        return True

    def target(self) -> Target:
        """What the step that begins now does; consumes it."""
        self._take_over()
        self._boundaries += 1
        if not self._started:
            return Target("stopped")
        if self._running is None:
            self.counters.waited += 1
            return Target("waiting")
        index, left = self._position()
        if not left:
            self.counters.starved += 1
            return Target("starved")
        self._consumed += 1
        seam, self._seam = self._seam, False
        return Target("chunk", self._running.actions[index], self._running.id, index, seam)

    # ---- internals ----------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._running = self._pending = self._arrived = None
        self._consumed = 0  # steps taken from chunks
        self._boundaries = 0  # the same with the steps that were held
        self._hurry = self._seam = False

    def _position(self) -> tuple[int, int]:
        """Next step of the running chunk, and how many it has left."""
        if self._running is None:
            return 0, 0
        index = min(self._consumed - self._running.start, self.chunk_steps)
        return index, self.chunk_steps - index

    def _is_due(self) -> bool:
        index, left = self._position()
        return self._hurry or not left or index >= self.replan_steps or left <= self.delay_steps

    def _take_over(self) -> None:
        """Make the chunk that arrived the running one, at the step that is next in it."""
        if self._arrived is None or self._pending is None:
            return
        pending, arrived = self._pending, self._arrived
        self._pending = self._arrived = None
        self._delays.append(self._boundaries - pending.boundaries)
        taken = self._consumed - pending.consumed
        if taken >= self.chunk_steps:
            self.counters.missed += 1
            return
        self.counters.switched += 1
        self.counters.late += taken > pending.frozen_steps
        self._running, self._seam = arrived, True


@dataclass(frozen=True)
class _Chunk:
    """A chunk whose step 0 is the step that was next when it was asked for.

    `start` counts the steps consumed until then: steps that are held move nothing, so they do not count.
    """

    id: int
    actions: NDArray[np.float32]
    tokens: NDArray[np.int64] | None
    start: int


@dataclass(frozen=True)
class _Pending:
    plan: Plan
    consumed: int
    boundaries: int
    frozen_steps: int
