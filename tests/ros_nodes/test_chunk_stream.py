"""Chunks join without a jump, whatever the delays: simulated boundaries, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceed_vla.errors import ConfigError
from ros_nodes.chunk_stream import ChunkStream, Plan, Target

M, H, DT = 8, 4, 0.1


def stream(**changes: Any) -> ChunkStream:
    return ChunkStream(**{"chunk_steps": M, "replan_steps": H, "action_dt": DT, **changes})


@dataclass
class Robot:
    """Runs a stream with a policy that knows how many steps were executed: the actions of a chunk asked for after
    ``c`` steps are c, c + 1, ..., so a stream that joins chunks at the right index executes 0, 1, 2, ... exactly.
    """

    stream: ChunkStream
    executed: list[float] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    due_in: int = 0
    answer: tuple[int, int] | None = None  # (plan id, first action)

    def boundary(self, delay: int) -> Target:
        """One boundary; a chunk asked for now arrives between the `delay`-th one after it and the one before that."""
        if self.answer is not None:
            self.due_in -= 1
            if self.due_in == 0:
                plan_id, first = self.answer
                assert self.stream.offer(plan_id, chunk(first, self.stream.chunk_steps), np.arange(3))
                self.answer = None
        plan = self.stream.plan()
        if plan is not None:
            self.plans.append(plan)
            self.answer, self.due_in = (plan.id, len(self.executed)), delay
        target = self.stream.target()
        self.targets.append(target)
        if target.action is not None:
            self.executed.append(float(target.action[0]))
        return target


def chunk(first: int, steps: int = M) -> np.ndarray:
    return np.arange(first, first + steps, dtype=np.float32)[:, None]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    chunk_steps=st.integers(1, 10),
    replan=st.integers(1, 10),
    delays=st.lists(st.integers(1, 14), min_size=1, max_size=60),
    first_estimate=st.integers(1, 5),
)
def test_every_step_is_executed_once_and_in_order(chunk_steps, replan, delays, first_estimate) -> None:
    flow = stream(chunk_steps=chunk_steps, replan_steps=min(replan, chunk_steps), delay_steps=first_estimate)
    flow.start()
    robot = Robot(flow)
    for delay in delays:
        robot.boundary(delay)
    assert robot.executed == list(range(len(robot.executed)))
    counted = flow.counters
    sources = [target.source for target in robot.targets]
    assert sources.count("starved") == counted.starved
    assert sources.count("waiting") == counted.waited
    assert sources.count("chunk") == len(robot.executed)
    assert sum(target.seam for target in robot.targets) <= counted.switched <= counted.planned
    for plan in robot.plans:
        assert 0 <= plan.frozen_steps <= max(chunk_steps - 1, 0)
        assert plan.shift_steps + plan.frozen_steps <= chunk_steps
        assert (plan.deadline_s is None) == (plan.frozen_steps == 0)


@pytest.mark.parametrize("delay", [1, 2, 3, 4])
def test_a_steady_delay_that_fits_never_starves_and_is_frozen(delay: int) -> None:
    flow = stream()
    flow.start()
    robot = Robot(flow)
    for _ in range(60):
        robot.boundary(delay)
    assert flow.counters.waited == delay
    assert flow.counters.starved == 0
    assert flow.delay_steps == delay
    later = robot.plans[2:]
    assert [plan.frozen_steps for plan in later] == [delay] * len(later)
    assert all(plan.deadline_s == pytest.approx(delay * DT - 0.01) for plan in later)
    assert flow.counters.late == 0
    seams = [target.index for target in robot.targets if target.seam]
    assert seams[2:] == [delay] * len(seams[2:])  # takes over at the first step that is not frozen


def test_the_plan_names_what_the_decoder_needs() -> None:
    flow = stream(delay_steps=2)
    flow.start()
    first = flow.plan()
    assert first == Plan(id=1, previous=None, shift_steps=0, frozen_steps=0, deadline_s=None)
    assert flow.plan() is None  # it is under way
    assert flow.target() == Target("waiting")
    tokens = np.arange(56)
    assert flow.offer(1, chunk(0), tokens)
    for index in range(H):
        assert flow.plan() is None
        target = flow.target()
        assert (target.source, target.chunk_id, target.index, target.seam) == ("chunk", 1, index, index == 0)
    plan = flow.plan()
    assert plan is not None
    assert plan.previous is tokens
    assert (plan.id, plan.shift_steps) == (2, H)
    assert plan.frozen_steps == 1  # the first answer took one boundary


def test_an_answer_before_its_time_takes_over_at_once() -> None:
    flow = stream(delay_steps=3)
    flow.start()
    robot = Robot(flow)
    delays = [3] + [3] * 3 + [3] * 3 + [1] * 20
    for delay in delays:
        robot.boundary(delay)
    assert robot.executed == list(range(len(robot.executed)))
    early = [target.index for target in robot.targets if target.seam][-1]
    assert early == 1
    assert flow.counters.late == 0


def test_a_late_answer_is_counted_and_joined_at_the_right_step() -> None:
    flow = stream()
    flow.start()
    robot = Robot(flow)
    for _ in range(6):
        robot.boundary(1)
    for _ in range(8):
        robot.boundary(3)  # frozen: 1
    assert flow.counters.late == 1
    assert robot.executed == list(range(len(robot.executed)))
    assert flow.counters.starved == 0


def test_an_answer_after_the_end_starves_then_goes_on_where_it_stopped() -> None:
    flow = stream()
    flow.start()
    robot = Robot(flow)
    for _ in range(20):
        robot.boundary(7)
    starved = [target for target in robot.targets if target.source == "starved"]
    assert starved
    assert all(target.action is None for target in starved)
    assert robot.executed == list(range(len(robot.executed)))


def test_the_estimate_covers_its_quantile_of_recent_delays() -> None:
    flow = stream(delay_window=10, delay_quantile=0.9)
    flow.start()
    robot = Robot(flow)
    while flow.counters.switched < 10:
        robot.boundary(3 if flow.counters.planned % 10 == 5 else 1)
    assert flow.delay_steps == 1  # one slow answer in ten
    while flow.counters.switched < 14:
        robot.boundary(3)
    assert flow.delay_steps == 3
    while flow.counters.switched < 30:
        robot.boundary(1)
    assert flow.delay_steps == 1  # and forgotten again


def test_a_slow_policy_is_asked_early_enough() -> None:
    flow = stream(replan_steps=8, delay_steps=3)
    flow.start()
    robot = Robot(flow)
    for _ in range(40):
        robot.boundary(3)
    assert flow.counters.starved == 0  # although the chunk is to be used up


def test_cancelled_requests_are_due_again_and_stale_answers_are_dropped() -> None:
    flow = stream()
    flow.start()
    first = flow.plan()
    assert first is not None
    flow.cancel(99)
    assert flow.pending == first.id
    flow.cancel(first.id)
    flow.target()
    second = flow.plan()
    assert second is not None
    assert second.id != first.id
    assert not flow.offer(first.id, chunk(0))
    assert flow.offer(second.id, chunk(0))
    assert not flow.offer(second.id, chunk(5))  # once
    assert flow.target().chunk_id == second.id
    assert (flow.counters.cancelled, flow.counters.stale) == (1, 2)


def test_hurry_replans_at_the_next_boundary_and_drops_what_is_under_way() -> None:
    flow = stream()
    flow.start()
    robot = Robot(flow)
    robot.boundary(1)
    robot.boundary(1)
    assert flow.plan() is None
    flow.hurry()
    plan = flow.plan()
    assert plan is not None
    assert (plan.shift_steps, plan.frozen_steps) == (1, 1)
    flow.hurry()
    assert not flow.offer(plan.id, chunk(0), None)
    assert flow.target().source == "chunk"  # the old chunk goes on meanwhile


def test_stop_forgets_everything() -> None:
    flow = stream()
    assert flow.plan() is None
    assert flow.target() == Target("stopped")
    flow.start()
    robot = Robot(flow)
    for _ in range(7):
        robot.boundary(2)
    pending = flow.pending
    assert pending is not None
    flow.stop()
    assert not flow.offer(pending, chunk(0))
    assert flow.target() == Target("stopped")
    flow.start()
    assert flow.target() == Target("waiting")
    plan = flow.plan()
    assert plan is not None
    assert (plan.previous, plan.frozen_steps) == (None, 0)


def test_policies_without_tokens_get_no_frozen_steps_but_a_deadline() -> None:
    flow = stream()
    flow.start()
    flow.plan()
    flow.target()
    flow.offer(1, chunk(0))
    for _ in range(H):
        flow.target()
    plan = flow.plan()
    assert plan is not None
    assert (plan.previous, plan.frozen_steps) == (None, 0)
    assert plan.deadline_s is not None
    flow.target()
    flow.offer(plan.id, chunk(H))
    assert flow.target().index == 1
    assert flow.counters.late == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replan_steps": 9}, r"must lie in \[1, 8\]"),
        ({"replan_steps": 0}, "replan_steps is 0"),
        ({"action_dt": 0.0}, "must be positive"),
        ({"deadline_margin_s": 0.1}, "the margin shorter"),
        ({"delay_steps": 0}, "at least 1"),
        ({"delay_quantile": 0.0}, "delay_quantile"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(**changes)


@pytest.mark.parametrize("actions", [chunk(0, 7), chunk(0)[0], np.full((8, 1), np.nan)])
def test_a_malformed_chunk_is_refused(actions: np.ndarray) -> None:
    flow = stream()
    flow.start()
    flow.plan()
    with pytest.raises(ConfigError, match=r"expected \(8, A\) finite"):
        flow.offer(1, actions)
    assert flow.target().source == "waiting"
