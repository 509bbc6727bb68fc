"""Chunks join without a jump for any delays: simulated boundaries, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.chunk_stream import ChunkRequest, ChunkStream, StreamCounters, Target

M, H, DT = 8, 4, 0.1
TICKS = 10  # per step


def stream(**changes: Any) -> ChunkStream:
    flow = ChunkStream(
        **{"chunk_steps": M, "replan_steps": H, "action_dt": DT, "delay_steps": 1, **changes}
    )
    flow.margin = flow.grace = 0.0
    return flow


@dataclass
class Robot:
    """Runs a stream with a policy whose actions count the executed steps.

    The actions of a chunk requested after ``c`` steps are c, c + 1, ..., so a stream that joins
    chunks at the right index executes exactly 0, 1, 2, ...

    Attributes:
        wait: Steps between two opportunities to request, a whole number of ticks.
        late: Ticks from a boundary to the first opportunity.
    """

    stream: ChunkStream
    wait: float = 1.0
    late: int = 0
    executed: list[float] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    requests: list[ChunkRequest] = field(default_factory=list)
    # age of the request when its chunk took over [steps]
    ages: list[float] = field(default_factory=list)
    now: int = 0  # [ticks]
    asked: int = 0
    answer: tuple[int, ChunkRequest, int] | None = None  # time, request, first action

    def tick(self, delay: float) -> None:
        """Advance one tick; a chunk requested now arrives after `delay` steps."""
        remaining = -self.now % TICKS / TICKS
        if self.answer is not None and self.now >= self.answer[0]:
            _, request, first = self.answer
            self.answer = None
            accepted = self.stream.offer(
                request.id, chunk(first, self.stream.chunk_steps), np.arange(3), remaining
            )
            assert accepted
        if self.now % TICKS == 0:
            target = self.stream.target()
            self.targets.append(target)
            if target.action is not None:
                self.executed.append(float(target.action[0]))
            if target.seam:
                self.ages.append((self.now - self.asked) / TICKS)
            remaining = 1.0
        if (self.now - self.late) % round(self.wait * TICKS) == 0:
            request = self.stream.request(remaining, self.wait)
            if request is not None:
                self.requests.append(request)
                self.asked = self.now
                first = len(self.executed) - request.begun
                self.answer = (self.now + round(delay * TICKS), request, first)
        self.now += 1

    def steps(self, count: int, delay: float) -> None:
        """Advance `count` steps."""
        for _ in range(count * TICKS):
            self.tick(delay)


def chunk(first: int, steps: int = M) -> np.ndarray:
    return np.arange(first, first + steps, dtype=np.float32)[:, None]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    chunk_steps=st.integers(1, 10),
    replan=st.integers(1, 10),
    delays=st.lists(st.floats(0, 14), min_size=1, max_size=40),
    first_estimate=st.floats(0, 5),
    wait=st.integers(1, 12),
    late=st.integers(0, 9),
)
def test_every_step_is_executed_once_and_in_order(
    chunk_steps, replan, delays, first_estimate, wait, late
) -> None:
    flow = stream(
        chunk_steps=chunk_steps, replan_steps=min(replan, chunk_steps), delay_steps=first_estimate
    )
    flow.start()
    robot = Robot(flow, wait / TICKS, late)
    for delay in delays:
        robot.steps(1, delay)
    assert robot.executed == list(range(len(robot.executed)))
    counted = flow.counters
    sources = [target.source for target in robot.targets]
    assert sources.count("starved") == counted.starved
    assert sources.count("chunk") == len(robot.executed)
    assert sum(target.seam for target in robot.targets) <= counted.switched <= len(robot.requests)
    for request in robot.requests:
        assert 0 <= request.frozen_steps <= max(chunk_steps - 1, 0)
        assert request.shift_steps + request.frozen_steps <= chunk_steps
        if request.deadline_s is not None:
            later = request.frozen_steps - request.begun
            assert later * DT <= request.deadline_s <= (later + 1) * DT + 1e-9


@pytest.mark.parametrize("delay", [0.1, 0.5, 1.0, 1.5, 2.3, 3.9])
def test_a_steady_delay_freezes_what_is_consumed_and_replans_on_time(delay: float) -> None:
    flow = stream()
    flow.start()
    robot = Robot(flow, wait=0.1)
    robot.steps(100, delay)
    assert flow.counters.starved == flow.counters.late == flow.counters.missed == 0
    assert flow.delay_steps == pytest.approx(delay)
    later = robot.requests[2:]
    begun = delay in (0.5, 1.0, 3.9)  # requested in the first half of a step
    frozen = int(delay - 1e-9) + begun
    assert {(request.frozen_steps, request.begun) for request in later} == {(frozen, begun)}
    if delay < 2:  # a slower policy gets the next request at once
        # each chunk is replaced after H steps
        assert {r.shift_steps + r.frozen_steps - r.begun for r in later} == {H}
    seams = [target.index for target in robot.targets if target.seam]
    assert set(seams[2:]) == {frozen}  # takes over at the first step that is not frozen
    assert max(robot.ages[2:]) == pytest.approx(delay, abs=0.1 + 1e-9)  # no older than necessary


@pytest.mark.parametrize(("chunk_steps", "replan"), [(1, 1), (8, 8), (8, 4)])
def test_while_the_last_step_of_a_chunk_runs_the_next_is_still_in_time(
    chunk_steps: int, replan: int
) -> None:
    flow = stream(chunk_steps=chunk_steps, replan_steps=replan)
    flow.start()
    robot = Robot(flow, wait=0.1)
    robot.steps(60, 0.3)
    assert max(robot.ages[2:]) < 0.41
    assert [request.deadline_s is None for request in robot.requests] == [True] + [False] * (
        len(robot.requests) - 1
    )
    assert flow.counters.starved == 0


@pytest.mark.parametrize("late", range(4))
def test_the_last_observation_that_is_in_time_is_used(late: int) -> None:
    flow = stream()
    flow.start()
    robot = Robot(flow, wait=0.4, late=late)  # observations every 0.4 steps, 5 in 2 steps
    robot.steps(60, 0.3)
    assert flow.counters.late == 0
    assert max(robot.ages[2:]) <= 0.3 + 0.4 + 1e-9


def test_the_request_names_what_the_decoder_needs() -> None:
    flow = stream(delay_steps=2)
    flow.start()
    assert flow.target() == Target("waiting")
    first = flow.request(1.0, 0.1)
    assert first == ChunkRequest(
        id=1, previous=None, shift_steps=0, frozen_steps=0, deadline_s=None
    )
    assert flow.request(1.0, 0.1) is None  # a request is pending
    tokens = np.arange(56)
    assert flow.offer(1, chunk(0), tokens, 0.4)
    assert flow.arrived
    assert flow.delay_steps == pytest.approx(0.6)
    for index in range(H):
        target = flow.target()
        assert (target.source, target.chunk_id, target.index, target.seam) == (
            "chunk",
            1,
            index,
            index == 0,
        )
        assert flow.request(0.9, 0.1) is None  # the next observation is in time
    request = flow.request(0.65, 0.1)  # the step before has just begun
    assert request.previous is tokens
    assert (request.id, request.shift_steps, request.frozen_steps) == (2, H - 1, 1)
    assert request.begun
    assert request.deadline_s == pytest.approx(0.065)


@pytest.mark.parametrize(
    ("remaining", "index", "begun"),
    [(0.5, 3, False), (0.51, 3, True), (1.05, 3, True), (1.05, 0, False)],
)
def test_a_chunk_begins_with_the_step_closest_to_its_observation(
    remaining: float, index: int, begun: bool
) -> None:
    flow = stream(delay_steps=3)
    flow.start()
    assert flow.request(1.0, 0.1) is not None
    flow.target()
    flow.offer(1, chunk(0), np.arange(56), 1.0)
    for _ in range(index):
        flow.target()
    flow.preempt()  # a request is due at once
    request = flow.request(remaining, 0.1)
    assert (request.begun, request.shift_steps) == (begun, index - begun)
    assert flow.offer(request.id, chunk(index - begun), np.arange(56), remaining)
    assert flow.target().action[0] == index  # in order, wherever the chunk begins


def test_a_chunk_keeps_a_step_to_decode() -> None:
    flow = stream(chunk_steps=2, replan_steps=1, delay_steps=3)
    flow.start()
    flow.request(1.0, 0.1)
    for _ in range(3):
        flow.target()
    flow.offer(1, chunk(0, 2), np.arange(14), 1.0)
    flow.target()
    request = flow.request(1.0, 0.1)
    assert (request.begun, request.shift_steps, request.frozen_steps) == (False, 1, 1)


def test_a_step_that_holds_begins_no_chunk() -> None:
    flow = stream()
    flow.start()
    flow.request(1.0, 0.1)
    flow.target()
    flow.offer(1, chunk(0), np.arange(56), 1.0)
    for _ in range(M):
        flow.target()
    assert flow.target().source == "starved"
    assert not flow.request(1.0, 0.1).begun


def test_an_answer_before_its_time_takes_over_at_once() -> None:
    flow = stream(delay_steps=3)
    flow.start()
    robot = Robot(flow)
    robot.steps(20, 3)
    sent = len(robot.requests)
    robot.steps(10, 1)
    assert robot.executed == list(range(len(robot.executed)))
    assert robot.requests[sent].frozen_steps == 3
    seams = {target.chunk_id: target.index for target in robot.targets if target.seam}
    assert seams[robot.requests[sent].id] == 1  # step 0 had begun at the request
    assert flow.counters.late == 0


def test_a_late_answer_is_counted_and_joined_at_the_right_step() -> None:
    flow = stream()
    flow.start()
    robot = Robot(flow, wait=0.1)
    robot.steps(8, 0.5)
    robot.steps(7, 3)  # no step to come is frozen
    assert flow.counters.late == 1
    assert robot.executed == list(range(len(robot.executed)))
    assert flow.counters.starved == 0


def test_an_answer_after_the_end_starves_then_goes_on_where_it_stopped() -> None:
    flow = stream()
    flow.start()
    robot = Robot(flow)
    robot.steps(30, 9)
    starved = [target for target in robot.targets if target.source == "starved"]
    assert starved
    assert all(target.action is None for target in starved)
    assert robot.executed == list(range(len(robot.executed)))


def test_the_estimate_covers_its_quantile_of_recent_delays() -> None:
    flow = stream()
    flow.quantile = 0.9
    flow.start()
    robot = Robot(flow)
    while flow.counters.switched < 10:
        robot.tick(3 if len(robot.requests) % 10 == 5 else 1)
    assert flow.delay_steps == 1  # one slow answer in ten
    while flow.counters.switched < 14:
        robot.tick(3)
    assert flow.delay_steps == 3
    while flow.counters.switched < 50:
        robot.tick(1)
    assert flow.delay_steps == 1  # and forgotten again


def test_a_slow_policy_is_asked_early_enough() -> None:
    flow = stream(replan_steps=8, delay_steps=3)
    flow.start()
    robot = Robot(flow)
    robot.steps(40, 3)
    assert flow.counters.starved == 0  # although all steps of a chunk are executed


def test_cancelled_requests_are_due_again_and_stale_answers_are_dropped() -> None:
    flow = stream()
    flow.start()
    first = flow.request(1.0, 0.1)
    assert first is not None
    flow.cancel(99)
    assert flow.pending == first.id
    flow.cancel(first.id)
    flow.target()
    second = flow.request(1.0, 0.1)
    assert second.id != first.id
    assert not flow.offer(first.id, chunk(0))
    assert flow.offer(second.id, chunk(0))
    assert not flow.offer(second.id, chunk(5))  # once
    assert flow.target().chunk_id == second.id


def test_preempt_replans_at_once_and_drops_what_is_under_way() -> None:
    flow = stream()
    flow.start()
    robot = Robot(flow)
    robot.steps(2, 1)
    robot.tick(1)
    assert robot.executed == [0, 1]
    assert flow.request(0.9, 0.1) is None
    flow.preempt()
    request = flow.request(0.9, 0.1)
    assert (request.shift_steps, request.frozen_steps) == (1, 2)
    flow.preempt()
    assert not flow.offer(request.id, chunk(0), None)
    assert flow.target().source == "chunk"  # the old chunk continues meanwhile


def test_stop_forgets_everything() -> None:
    flow = stream()
    assert flow.request(1.0, 0.1) is None
    assert flow.target() == Target("stopped")
    flow.start()
    robot = Robot(flow)
    robot.steps(5, 2)
    robot.tick(2)
    pending = flow.pending
    assert pending is not None
    flow.stop()
    assert not flow.offer(pending, chunk(0))
    assert flow.target() == Target("stopped")
    flow.start()
    assert flow.target() == Target("waiting")
    request = flow.request(1.0, 0.1)
    assert (request.previous, request.frozen_steps) == (None, 0)


def test_policies_without_tokens_get_no_frozen_steps_but_a_deadline() -> None:
    flow = stream()
    flow.start()
    flow.request(1.0, 0.1)
    flow.target()
    flow.offer(1, chunk(0), None, 1.0)
    for _ in range(H):
        flow.target()
    request = flow.request(0.05, 0.1)
    assert (request.previous, request.frozen_steps) == (None, 0)
    # one more step is consumed until the answer is expected
    assert request.deadline_s == pytest.approx(0.105)
    flow.target()
    flow.offer(request.id, chunk(H))
    assert flow.target().index == 1
    assert flow.counters.late == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"replan_steps": 9}, r"must lie in \[1, 8\]"), ({"replan_steps": 0}, "replan_steps is 0")],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(**changes)


@pytest.mark.parametrize("actions", [chunk(0, 7), chunk(0)[0], np.full((8, 1), np.nan)])
def test_a_malformed_chunk_is_refused(actions: np.ndarray) -> None:
    flow = stream()
    flow.start()
    flow.request(1.0, 0.1)
    with pytest.raises(ConfigError, match=r"expected \(8, A\) finite"):
        flow.offer(1, actions)
    assert flow.target().source == "waiting"


def test_first_steps_run_before_the_rest_is_there() -> None:
    flow = stream()
    flow.start()
    request = flow.request(1.0, 0.1)
    assert request.deadline_s is None
    assert flow.offer(request.id, chunk(0, 1), whole=False)
    assert flow.arrived
    assert flow.target().action[0] == 0
    assert flow.offer(request.id, chunk(0, 3), whole=False)
    assert [flow.target().action[0] for _ in range(2)] == [1, 2]
    assert flow.target().source == "starved"
    assert flow.partial
    assert flow.offer(request.id, chunk(0), np.arange(M), remaining=1.0)
    assert not flow.partial
    assert not flow.offer(request.id, chunk(0, 2), whole=False)
    assert not flow.offer(request.id, chunk(9))
    assert flow.delay_steps == 1  # unchanged: the delay is unknown if steps began early
    assert flow.target().action[0] == 3
    following = flow.request(1.0, 0.1)
    assert (following.shift_steps, following.previous.tolist()) == (3, list(range(M)))
    assert [flow.target().action[0] for _ in range(4)] == [4, 5, 6, 7]
    assert flow.counters == StreamCounters(switched=1, starved=1)


def test_first_steps_of_a_chunk_that_nobody_waits_for_are_dropped() -> None:
    flow = stream()
    flow.start()
    request = flow.request(1.0, 0.1)
    flow.preempt()
    assert not flow.offer(request.id, chunk(0, 1), whole=False)
    with pytest.raises(ConfigError, match="finite actions"):
        flow.offer(request.id, chunk(0), whole=False)  # all steps must be a whole chunk
    assert flow.target().source == "waiting"
