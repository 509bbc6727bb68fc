"""Asks the policy for the chunks that the stream plans, hands it the answers, and times observation to command."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ceed_vla.errors import ConfigError, ObservationError
from ros_nodes.robot.chunk_stream import ChunkStream, Plan, Target
from ros_nodes.robot.inference import InferenceWorker
from ros_nodes.robot.loop_statistics import LoopStatistics
from ros_nodes.robot.motion import Motion
from ros_nodes.robot.observations import Observations
from ros_nodes.robot.predictor import BAD_INSTRUCTION, Request
from ros_nodes.robot.step_grid import UNSURE

_FIRST_RETRY, _LAST_RETRY = 0.1, 2.0  # between a failure and the next request; doubled each time [s]


@dataclass(frozen=True)
class _Asked:
    """A request whose chunk does not move the arm yet."""

    plan: Plan
    taken: float  # when the oldest of its images was taken, on the messages' clock [s]
    sent: float  # steady time [s]
    decode_s: float = 0.0


class ChunkRequests:
    """One request at a time, from the newest observation, to a started worker."""

    def __init__(
        self,
        observations: Observations,
        motion: Motion,
        stream: ChunkStream,
        worker: InferenceWorker,
        statistics: LoopStatistics,
    ) -> None:
        self._observations, self._motion = observations, motion
        self._stream, self._worker, self._statistics = stream, worker, statistics
        self._asked: dict[int, _Asked] = {}
        self._fresh: _Asked | None = None  # the next command is the first computed from this request
        self._instruction = ""  # of the last request
        self.try_again()

    def ask_if_due(self, instruction: str, now: float, remaining: float, wait: float) -> Plan | None:
        """Ask for the next chunk unless observations that are still to come will do; the plan that was sent, if any.

        Times: `now` is steady [s], `remaining` until the next boundary of the step grid [steps], `wait` until the next
        images [s].
        """
        if not self._worker.idle or now < self._retry_at:
            return None
        plan = self._stream.plan(remaining, (wait + UNSURE) / self._stream.action_dt)
        if plan is not None and not self._ask(plan, instruction, now):
            self._stream.cancel(plan.id)
            return None
        return plan

    def receive(self, now: float, remaining: float) -> bool:
        """Take the policy's answer if there is one; whether the stream will use it. Arguments as in `ask_if_due`."""
        response = self._worker.poll()
        if response is None:
            return False
        self._statistics.answered(response)
        asked = self._asked.pop(response.id, None)
        if response.error is not None:
            self._failed(response.id, response.code, response.error, now)
            return False
        try:
            accepted = self._stream.offer(response.id, response.actions, response.tokens, remaining)
        except ConfigError as error:
            self._statistics.errors += 1
            self._statistics.last_error = str(error)
            self._failed(response.id, "", str(error), now)
            return False
        self.try_again()
        if asked is None or not accepted:
            return False
        self._statistics.last_error = ""
        late = asked.plan.deadline_s is not None and now - asked.sent > asked.plan.deadline_s
        self._statistics.deadline_misses += late
        self._asked = {response.id: replace(asked, decode_s=response.seconds.get("total", 0.0))}
        return True

    def executed(self, target: Target) -> None:
        """The step that begins executes `target`."""
        asked = self._asked.get(target.chunk_id or 0)
        if asked is not None and target.index >= asked.plan.frozen_steps:
            self._fresh = asked
            self._asked.clear()

    def commanded(self, clock: float) -> None:
        """A command of the running step was sent in motion; `clock` is the time of the messages' stamps [s]."""
        if self._fresh is None:
            return
        latency = clock - self._fresh.taken
        self._statistics.to_command.append(latency)
        self._statistics.beyond_decode.append(latency - self._fresh.decode_s)
        self._fresh = None

    def drop(self) -> None:
        """Forget what was asked: nothing is planned any more."""
        self._asked.clear()
        self._fresh = None

    def try_again(self) -> None:
        """Forget what failed: the next request waits for nothing."""
        self._failures, self._retry_at = 0, -math.inf
        self.failure = ""  # `Response.code` of the last answer, unless `refusal` says it
        self._refusals: dict[str, str] = {}  # instruction -> why the policy does not take it

    def refusal(self, instruction: str) -> str | None:
        """Why the policy does not take an instruction; None as far as one knows."""
        return self._refusals.get(instruction)

    def _failed(self, plan_id: int, code: str, error: str, now: float) -> None:
        self._stream.cancel(plan_id)
        if code == BAD_INSTRUCTION:
            self._refusals = {self._instruction: error}
        else:
            self.failure = code
        self._retry_at = now + min(_FIRST_RETRY * 2**self._failures, _LAST_RETRY)
        self._failures = min(self._failures + 1, 10)

    def _ask(self, plan: Plan, instruction: str, now: float) -> bool:
        """Send the newest observation to the policy; False if it cannot be sent."""
        try:
            observation = self._observations.snapshot(self._motion)
        except ObservationError:  # the objection of the next tick says what is wrong
            return False
        taken = self._observations.image_stamp
        request = Request(
            plan.id, observation, instruction, plan.previous, plan.shift_steps, plan.frozen_steps, plan.deadline_s
        )
        if not self._worker.submit(request):
            return False
        self._instruction = instruction
        self._asked[plan.id] = _Asked(plan, math.nan if taken is None else taken, now)
        return True
