"""Live episodes of vla-eval: every tick gets the step that the timeline says."""

from __future__ import annotations

import numpy as np
import pytest

from ceed_vla.serving.arrays import WireError, unpacked
from ceed_vla.serving.predictor_types import Response
from ceed_vla.serving.protocols import Call
from ceed_vla.serving.sessions import Sessions
from ceed_vla.serving.vla_eval import VlaEvalConversation
from tests.helpers.live_messages import LIVE, SPEC, SYNC, M, chunk, message, observed
from tests.helpers.local_server import STATE


class Client:
    """A client whose clock ticks, and a policy whose answers take `delay` ticks.

    An answer with a delay of 0 arrives before the next observation.
    """

    def __init__(self, delay: int, *, tokens: bool = True) -> None:
        self.delay = delay
        self.tokens = np.zeros(M, np.int64) if tokens else None
        self.conversation = VlaEvalConversation({STATE: STATE}, {"server": "test"}, SPEC)
        self.sessions = Sessions(SPEC)
        self.actions: list[float | None] = []  # of each tick; None: the environment holds
        self.errors: list[str] = []
        self.calls: list[Call] = []
        self.pending: list[tuple[Call, int]] = []  # with the ticks until its answer
        self.conversation.read(message("episode_start", LIVE))

    def tick(self, count: int = 1, instruction: str = "lift") -> Client:
        for _ in range(count):
            seq = len(self.actions)
            self.actions.append(None)
            self.take(self.conversation.read(observed(seq, instruction)))
            self.pending = [(call, left - 1) for call, left in self.pending]
            if self.pending and self.pending[0][1] < 0:
                self.answer()
        return self

    def answer(self, error: str = "") -> None:
        call, _ = self.pending.pop()
        if error:
            self.take(self.conversation.error(call, error))
            return
        response = Response(0, chunk(self.calls.index(call) + 1), self.tokens)
        self.sessions.keep(call, response)
        self.take(self.conversation.answer(call, response, {}))

    def take(self, read: Call | bytes | None) -> None:
        """Take what the conversation sends, and a call that it makes."""
        if isinstance(read, Call):
            assert not self.pending, "one call at a time"
            assert read.beside
            self.sessions.warm(read)  # refuses frozen steps without a chunk
            self.calls.append(read)
            self.pending.append((read, self.delay))
            read = read.at_once
        if read is None:
            return
        sent = unpacked(read)
        if sent["type"] == "error":
            self.errors.append(sent["payload"]["error"])
            return
        assert self.actions[sent["seq"]] is None, "one answer to an observation"
        self.actions[sent["seq"]] = round(float(sent["payload"]["actions"][0]), 1)

    @property
    def steps(self) -> list[tuple[int, int, int | None]]:
        """Executed steps before every call, frozen and executed ones of its chunk."""
        return [
            (call.shift_steps or 0, call.request.frozen_steps, call.request.executed_steps)
            for call in self.calls
        ]


HOLD = None
# Delay in ticks -> actions, and of every call `Client.steps`.
TIMELINES: dict[int, tuple[list[float | None], list[tuple[int, int, int | None]]]] = {
    0: (
        [1.0, 1.1, 1.2, 1.3, 2.0, 2.1, 2.2, 2.3, 3.0, 3.1, 3.2, 3.3],
        [(0, 0, None), (4, 0, None), (4, 0, None)],
    ),
    1: (
        [HOLD, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.2, 2.3, 2.4, 2.5, 3.2, 3.3],
        [(0, 0, None), (4, 2, 4), (4, 2, 4)],
    ),
    3: (
        [HOLD] * 3
        + [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 2.4, 2.5, 2.6, 2.7, 3.4],
        [(0, 0, None), (4, 4, 4), (4, 4, 4), (4, 4, 4)],
    ),
    # The chunk ends two ticks before the next one arrives.
    6: (
        [HOLD] * 6
        + [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
        + [HOLD] * 2
        + [2.4, 2.5, 2.6, 2.7]
        + [HOLD] * 3
        + [3.3, 3.4],
        [(0, 0, None), (4, 4, 4), (5, 3, 5), (4, 4, 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("delay", TIMELINES)
def test_every_tick_gets_the_step_of_the_timeline(delay: int) -> None:
    actions, steps = TIMELINES[delay]
    client = Client(delay).tick(len(actions))
    assert client.actions == actions
    assert client.steps == steps


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 4, 5, 7, 20])
def test_no_step_is_skipped_or_doubled(delay: int) -> None:
    """Step k of a chunk is executed k steps after the chunk's own observation."""
    client = Client(delay).tick(200)
    begins = {}  # chunk -> steps that were executed before its observation
    for number, call in enumerate(client.calls, 1):
        before = client.actions[: call.echo["seq"]]
        begins[number] = sum(action is not None for action in before)
    executed = [action for action in client.actions if action is not None]
    assert len(executed) >= 40
    for place, action in enumerate(executed):
        number, step = divmod(round(10 * action), 10)
        assert begins[number] + step == place


class Robot:
    """A client whose ticks take time, as the harness's: it executes the newest action that it has
    when a tick begins, reads messages when the environment's step is over, then observes.

    Args:
        delay: Whole ticks after that of its observation until an answer arrives.
        late: Whether it arrives during the environment's step; else before the next tick.
    """

    def __init__(self, delay: int, *, late: bool) -> None:
        self.delay, self.late = delay, late
        self.conversation = VlaEvalConversation({STATE: STATE}, {"server": "test"}, SPEC)
        self.sessions = Sessions(SPEC)
        self.newest: float | None = None
        self.executed: list[float | None] = []  # of each tick; None: it held
        self.calls: list[Call] = []
        self.left: int | None = None  # ticks until the answer
        self.conversation.read(message("episode_start", LIVE))
        self.observe(held=False)

    def observe(self, *, held: bool) -> None:
        self.take(self.conversation.read(observed(len(self.executed), held=held)))

    def tick(self, count: int) -> None:
        for _ in range(count):
            self.arrive(late=False)
            self.executed.append(self.newest)
            held, self.newest = self.newest is None, None
            self.arrive(late=True)
            self.observe(held=held)

    def arrive(self, *, late: bool) -> None:
        if self.left is not None and late == self.late:
            self.left -= 1
            if self.left < 0:
                self.left = None
                response = Response(0, chunk(len(self.calls)), np.zeros(M, np.int64))
                self.sessions.keep(self.calls[-1], response)
                self.take(self.conversation.answer(self.calls[-1], response, {}))

    def take(self, read: Call | bytes | None) -> None:
        if isinstance(read, Call):
            self.calls.append(read)
            self.left = self.delay
            read = read.at_once
        if read is not None:
            self.newest = round(float(unpacked(read)["payload"]["actions"][0]), 1)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("delay", [0, 1, 2, 3, 4, 5, 7, 20])
def test_a_step_that_comes_too_late_for_its_tick_is_sent_again(delay: int, late: bool) -> None:
    """All steps are executed once and in order, also if answers arrive during a step."""
    robot = Robot(delay, late=late)
    robot.tick(200)
    executed = [action for action in robot.executed if action is not None]
    assert len(executed) >= 25
    begins: dict[int, int] = {}  # chunk -> steps that were executed before its observation
    for number, call in enumerate(robot.calls, 1):
        before = robot.executed[: call.echo["seq"]]
        begins[number] = sum(action is not None for action in before)
    for place, action in enumerate(executed):
        number, step = divmod(round(10 * action), 10)
        assert begins[number] + step == place


def test_an_answer_that_is_late_once_is_expected_to_be_late_again() -> None:
    robot = Robot(0, late=True)
    robot.tick(12)
    assert robot.executed == [None, 1.0, 1.1, 1.2, 1.3, 1.4, 2.1, 2.2, 2.3, 2.4, 3.1, 3.2]
    assert [call.request.frozen_steps for call in robot.calls] == [0, 2, 2]
    assert [call.request.executed_steps for call in robot.calls] == [None, 4, 4]


@pytest.mark.parametrize("held", [1, "yes", None])
def test_held_must_be_true_or_false(held: object) -> None:
    client = Client(0).tick()
    with pytest.raises(WireError, match=r"held is .*; it must be true or false"):
        client.conversation.read(observed(1, held=held))


def test_a_delay_that_varies() -> None:
    """The longest of the last calls is expected: after a late answer, such steps are frozen."""
    client = Client(0).tick(6)
    client.delay = 2
    client.tick(5)  # its second tick starts a call
    client.delay = 0
    client.tick(80)
    frozen = [steps[1] for steps in client.steps]
    assert frozen[:11] == [0, 0, 0] + [3] * 8
    assert frozen[11:] == [0] * len(frozen[11:])
    assert len(frozen) > 12


def test_a_policy_without_tokens_freezes_no_steps() -> None:
    client = Client(1, tokens=False).tick(40)
    assert {steps[1] for steps in client.steps} == {0}
    assert client.actions[:8] == TIMELINES[1][0][:8]


def test_the_first_step_of_a_chunk_tells_how_it_was_decoded() -> None:
    conversation = VlaEvalConversation({STATE: STATE}, {"server": "test"}, SPEC)
    conversation.read(message("episode_start", LIVE))
    call = conversation.read(observed(1))
    assert isinstance(call, Call)
    first = conversation.answer(call, Response(0, chunk(1), None, 3, "cap"), {"infer": 0.5})
    assert isinstance(first, bytes)
    assert unpacked(first)["payload"]["forwards"] == 3
    assert unpacked(first)["payload"]["server_timing"] == {"infer_ms": 500.0}
    second = conversation.read(observed(2))
    assert isinstance(second, bytes)
    assert set(unpacked(second)["payload"]) == {"actions"}


def test_an_answer_of_an_ended_episode_is_thrown_away() -> None:
    """The newest observation of the next episode is decoded when the policy is idle."""
    client = Client(9).tick(2)
    client.conversation.read(message("episode_end", {}))
    client.conversation.read(message("episode_start", LIVE))
    client.tick(3)
    assert len(client.calls) == 1
    client.answer()
    assert client.actions == [None] * 5
    assert client.calls[1].echo == {"seq": 4}
    assert client.calls[1].session != client.calls[0].session
    assert client.steps[1] == (0, 0, None)
    client.answer()
    assert client.actions == [None] * 4 + [2.0]


def test_an_error_of_an_ended_episode_is_thrown_away() -> None:
    client = Client(9).tick()
    client.conversation.read(message("episode_end", {}))
    client.answer("it failed")
    assert (client.errors, client.pending) == ([], [])


def test_after_an_error_the_next_observation_tries_again() -> None:
    """The steps of the running chunk go on meanwhile."""
    client = Client(9).tick()
    client.answer("out of memory")
    assert client.errors == ["out of memory"]
    client.tick()
    client.answer()
    client.tick(5)
    assert client.actions == [None, 2.0, 2.1, 2.2, 2.3, None, 2.4]
    client.answer("out of memory")
    client.tick(3)  # the first one starts a call
    assert client.actions[7:] == [None, 2.5, 2.6]
    assert client.steps[-1] == (5, 0, None)
    client.answer()
    client.tick()
    assert client.actions[7:] == [None, 2.5, 2.6, 4.2]


def test_a_new_instruction_ends_the_chunk() -> None:
    client = Client(9).tick()
    client.answer()
    client.tick(5)  # the last one starts a call
    client.tick(2, "push")
    assert client.actions == [1.0, 1.1, 1.2, 1.3, None, 1.4, None, None]
    client.answer()
    assert client.calls[2].request.instruction == "push"
    assert client.steps[2][:2] == (0, 0)
    client.answer()
    assert client.actions[6:] == [None, 3.0]


def test_a_refused_observation_of_a_live_episode() -> None:
    """It does not disturb the call that runs."""
    client = Client(9).tick()
    with pytest.raises(WireError, match="The observation lacks"):
        client.conversation.read(message("observation", {"task_description": "lift"}, 7))
    client.answer()
    assert client.actions == [1.0]


def test_a_waiting_episode_that_is_not_live_calls_by_itself() -> None:
    """The server makes its call after that of the ended live episode."""
    client = Client(9).tick()
    client.conversation.read(message("episode_end", {}))
    client.conversation.read(message("episode_start", SYNC))
    call = client.conversation.read(observed(5))
    assert isinstance(call, Call)
    assert not call.beside
    client.answer()
    assert client.actions == [None]
    answer = client.conversation.answer(call, Response(0, chunk(5)), {})
    assert isinstance(answer, bytes)
    assert unpacked(answer)["payload"]["actions"] == [5.0]
