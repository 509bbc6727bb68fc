"""Joins action chunks into one stream of steps (token real-time chunking), without clocks, threads
or ROS.

While a chunk runs, the policy decodes the next chunk from the newest observation that is still in
time for the step at which the next chunk takes over. The steps that are consumed before the next
chunk is ready are its *frozen steps*: it repeats the running chunk up to there, so the two join
without a jump:

    running chunk     | 0 1 2 3 4 5 6 7 |
    request in step 1       ^                    the answer is expected to take 2.3 steps
    next chunk                | 0 1 2 3 4 5 6 7 |      0, 1 = steps 2, 3 of the running one
                                    ^ takes over here, after `replan_steps` 4; the rest is decoded

A policy's first step begins where its observation was taken. Requests are sent at any time of a
step, so step 0 of the next chunk is the step that begins closest to the request: the next step, or
in the first half of the running step this one, which then is frozen too. The delay is counted in
steps of the step grid between request and answer, so it needs no clock.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ConfigError

_DELAYS = 32  # latest answers from which the delay of the next one is estimated


@dataclass(frozen=True)
class ChunkRequest:
    """The request of one chunk."""

    id: int  # the answer carries the same id
    # tokens (n,) of the running chunk for the warm start; None without one
    previous: NDArray[np.int64] | None
    shift_steps: int  # steps of `previous` that are consumed
    # Steps that will be consumed before the answer is expected. The new chunk begins with them;
    # they equal the next steps of `previous`. 0 if no chunk runs.
    frozen_steps: int
    # time from the request until the answer is needed [s]; None if no chunk runs
    deadline_s: float | None
    begun: bool = False  # whether step 0 of the new chunk is the running step


@dataclass(frozen=True)
class Target:
    """The action of one step of the grid, or the reason why it has none."""

    # "chunk", or the reason for a hold without an action: "stopped" (not started), "waiting" (the
    # first chunk has not arrived) or "starved" (the running chunk ended before the next arrived).
    source: str
    action: NDArray[np.float32] | None = None  # (A,)
    chunk_id: int | None = None  # id of the request whose chunk has the action
    index: int = -1  # step of that chunk
    seam: bool = False  # whether this is the first step taken from its chunk


@dataclass
class StreamCounters:
    """Counts of events since construction."""

    switched: int = 0  # chunks that took over
    late: int = 0  # chunks that took over after more steps than were frozen; their seam may jump
    missed: int = 0  # chunks that arrived after all their steps had passed
    starved: int = 0  # steps that held because the running chunk had ended


class ChunkStream:
    """Selects the action of each step, and decides when the next chunk is due.

    Call `request` whenever a request can be sent, then `offer` with its answer or `cancel`. Call
    `target` at every boundary between steps.

    Args:
        chunk_steps: ``m``.
        replan_steps: Steps ``h`` from the request of a chunk until the next one takes over, in
            [1, m].
        action_dt: Duration of a step [s].
        delay_steps: Initial estimate of the steps consumed between a request and its answer, at
            least 0.
        least_lead: Smallest number of steps before a boundary by which a request for it must be
            sent.

    Attributes:
        started: Whether the stream runs.
        grace: Share of a step by which an answer may be late and still replace that step (`redo`),
            in [0, 1).
        margin: Time between an answer and the boundary that needs it [s].
        quantile: Quantile of the latest delays that is expected as the next delay, in (0, 1].

    `ConfigError`: `replan_steps` is outside [1, m].
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
        """Set the chunk length, `replan_steps` and the initial delay; call it before `start`."""
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
        """Id of the request whose answer is pending; None if none is."""
        return self._next.request.id if self._next else None

    @property
    def arrived(self) -> bool:
        """Whether the answer to the pending request has arrived."""
        return self._next is not None and self._next.actions is not None

    @property
    def partial(self) -> bool:
        """Whether the rest of the running chunk is still to come."""
        return self._running is not None and not self._running.whole

    @property
    def delay_steps(self) -> float:
        """Expected delay of the next answer [steps]."""
        if not self._delays:
            return self._first_delay
        ordered = sorted(self._delays)
        # the smallest delay that covers the quantile
        return ordered[math.ceil(self.quantile * len(ordered)) - 1]

    @property
    def lead(self) -> float:
        """Number of steps before a boundary by which a request must be sent to be in time."""
        return max(self.delay_steps + self.margin / self.action_dt, self._least_lead)

    def start(self) -> None:
        """Begin without a chunk: hold until the first chunk arrives; its request is due at once."""
        self.stop()
        self.started = True

    def stop(self) -> None:
        """Drop the running chunk and any pending answer; hold until `start`."""
        self.started = False
        self._replan_now = False
        self._seam = False  # the next step is the first one of its chunk
        self._moving = False  # the running step belongs to a chunk
        self._running: _Chunk | None = None
        self._next: _Chunk | None = None
        self._consumed = 0  # steps taken from chunks
        self._boundaries = 0  # steps taken from chunks, plus steps that held

    def preempt(self) -> None:
        """Make a new chunk due at once and ignore the pending answer: the instruction changed."""
        self._next = None
        self._replan_now = True

    def request(self, remaining: float = 0.0, wait: float = 0.0) -> ChunkRequest | None:
        """Return the request that is due now, or None if none is due.

        Args:
            remaining: Steps until the next step is consumed, usually at most 1.
            wait: Steps until the next opportunity to send a request, with a newer observation.
        """
        if not self.started or self._next is not None:
            return None
        index, left = self._position()
        running = self._running
        lead = self.lead
        runs = left > 0 or self._moving
        # steps that are consumed until the chunk is ready
        frozen = max(math.ceil(lead - remaining - 1e-9), 0)
        if runs and not self._replan_now:
            since = index - (running.request.begun if running else 0)  # steps since its request
            frozen = max(frozen, self.replan_steps - since)
            # The running chunk must contain all frozen steps, and the answer must arrive before the
            # running chunk ends.
            if min(frozen, left) + remaining - lead >= wait:
                return None
        # At least one step of the new chunk must remain to be decoded.
        frozen = min(frozen, left, self.chunk_steps - 1)
        # The policy's first step begins where its observation was taken.
        begun = self._moving and index > 0 and remaining > 0.5 and frozen < self.chunk_steps - 1
        request = ChunkRequest(
            id=next(self._ids),
            previous=running.tokens if running else None,
            shift_steps=index - begun,
            frozen_steps=begun + frozen if running and running.tokens is not None else 0,
            deadline_s=(
                (frozen + remaining + self.grace) * self.action_dt - self.margin if runs else None
            ),
            begun=begun,
        )
        position = self._boundaries + 1 - remaining
        self._next = _Chunk(request, self._consumed - begun, position, begun + frozen)
        self._replan_now = False
        return request

    def cancel(self, request_id: int) -> None:
        """Drop a request that was not sent or that failed; a new one is due at once."""
        if self.pending == request_id:
            self._next = None
            self._replan_now = True

    def offer(
        self,
        request_id: int,
        actions: NDArray[np.float32],
        tokens: NDArray[np.int64] | None = None,
        remaining: float = 0.0,
        *,
        whole: bool = True,
    ) -> bool:
        """Accept the answer to a request; its chunk takes over at the next boundary.

        Args:
            request_id: Id of the request.
            actions: Actions (m, A); if not `whole`, the first k actions (k, A).
            tokens: Tokens (n,); None for policies without tokens.
            remaining: As in `request`.
            whole: Whether the answer is complete; otherwise another answer follows.

        Returns:
            False if the request is no longer pending.

        `ConfigError`: The actions do not have the shape (m, A), or are not finite.
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
        if chunk is None or chunk.request.id != request_id or chunk.whole:
            return False
        chunk.actions = actions
        chunk.tokens = tokens
        chunk.whole = whole
        # If the chunk already runs, its first steps moved the grid, and its delay is unknown.
        if whole and chunk is self._next:
            self._delays.append(max(self._boundaries + 1 - remaining - chunk.position, 0.0))
        return True

    def target(self) -> Target:
        """Return the target of the step that begins now, and consume that step."""
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
        return Target("chunk", self._running.actions[index], self._running.request.id, index, seam)

    def redo(self) -> Target | None:
        """Repeat the running step from a chunk that arrived just after the step began.

        Returns:
            The step's new target; None if no such chunk has arrived.
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
        """Id of the running chunk's request, 0 if none runs, and its remaining actions (k, A)."""
        if self._running is None or self._running.actions is None:
            return 0, np.empty((0, 0), np.float32)
        return self._running.request.id, self._running.actions[self._position()[0] :]

    def _position(self) -> tuple[int, int]:
        """Index of the next step of the running chunk, and the number of its remaining steps."""
        if self._running is None or self._running.actions is None:
            return 0, 0
        steps = len(self._running.actions)
        index = min(self._consumed - self._running.start, steps)
        return index, steps - index

    def _take_over(self) -> None:
        """Make the chunk that arrived the running chunk, at its next step."""
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
    """A requested chunk; its step 0 is the step that begins closest to the request."""

    request: ChunkRequest
    # Steps consumed before its step 0. Steps that hold do not move the arm and do not count.
    start: int
    position: float  # time of the request on the step grid [steps]
    # steps that are consumed until the answer is expected, even if the policy cannot freeze them
    frozen_steps: int
    actions: NDArray[np.float32] | None = None  # None until the answer arrives
    tokens: NDArray[np.int64] | None = None
    whole: bool = False  # whether the actions are complete
