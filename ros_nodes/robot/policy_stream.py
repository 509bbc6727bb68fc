"""The chunk stream of a policy: asks for the chunks that are due, takes the answers, and times
images to commands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.ros_nodes.robot.chunk_stream import ChunkStream, Plan, Target
from ceed_vla.ros_nodes.robot.inference import InferenceWorker
from ceed_vla.ros_nodes.robot.loop_statistics import LoopStatistics
from ceed_vla.ros_nodes.robot.mode import WAITING
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.predictor import BAD_IMAGE, BAD_INSTRUCTION, LOOK, Request, Response
from ceed_vla.ros_nodes.robot.safety import Hold
from ceed_vla.ros_nodes.robot.step_grid import UNSURE, StepGrid
from ceed_vla.ros_nodes.robot.texts import instruction_problem

# between a failure and the next request; doubled each time [s]
_FIRST_RETRY = 0.1
_LAST_RETRY = 2.0
_SLOW = 1.5  # steps that an answer takes
# policies that no instruction reaches
_SPEECHLESS = (
    "act",
    "diffusion",
    "multi_task_dit",
    "tdmpc",
    "vqbet",
)


@dataclass(frozen=True)
class _Asked:
    """A request whose chunk does not move the arm yet."""

    plan: Plan
    taken: float  # when the oldest of its images was taken, on the messages' clock [s]
    sent: float  # steady time [s]
    decode_s: float = 0.0


class PolicyStream(ChunkStream):
    """Asks a `worker` that has begun, one request at a time, from the newest observation, as soon
    as it is ready.

    `replan_steps` is as in `ChunkStream`; with None the checkpoint decides. Times `now` are the
    grid's, steady [s].

    Attributes:
        instruction: What the policy is told.
        failure: `Response.code` of the last answer, unless it is the instruction's.
        pace: Real seconds in one of the grid, whose time may be a simulation's.
    """

    pace = 1.0

    def __init__(
        self,
        observations: Observations,
        motion: Motion,
        worker: InferenceWorker,
        grid: StepGrid,
        *,
        replan_steps: int | None = None,
        instruction: str = "",
    ) -> None:
        self.grid = grid
        self.statistics = LoopStatistics(grid.nominal)
        self._observations = observations
        self._motion = motion
        self._worker = worker
        self._asked: dict[int, _Asked] = {}
        self._replan_steps, self._loaded = replan_steps, False
        super().__init__(1, 1, grid.action_dt, least_lead=1.01 / grid.ticks_per_step)
        self._load()
        self.instruction = instruction
        self.try_again()

    def _load(self) -> bool:
        """Whether the policy is there; the first time its chunks' length is known."""
        if not self._loaded and self._worker.ready and self._worker.failed is None:
            spec = self._worker.spec
            try:
                steps = self._replan_steps or spec.n_action_steps
                self.fit(spec.chunk_steps, steps, spec.warmup_s / self.action_dt)
                self._loaded = True
            except ConfigError as error:
                self._worker.failed = str(error)
        return self._loaded

    @property
    def broken(self) -> str | None:
        """Why the policy will never answer; None if it may."""
        self._load()
        return self._worker.failed

    def stop(self) -> None:
        """Forget all chunks and what was asked; hold until `start`."""
        super().stop()
        self._asked.clear()
        self._fresh: _Asked | None = (
            None  # the next command is the first computed from this request
        )

    def instruct(self, instruction: str) -> None:
        """Ask for a chunk that does something else, at once."""
        if instruction != self.instruction:
            self.instruction = instruction
            self.try_again()
            self.preempt()

    def try_again(self) -> None:
        """Forget what failed: the next request waits for nothing."""
        self._failures = 0
        self._retry_at = -math.inf
        self.failure = ""
        self._refusal = instruction_problem(self.instruction)  # why the policy does not take it

    def objection(self) -> Hold | None:
        """Why the policy cannot drive the arm now."""
        if self.broken is not None:
            return Hold("inference_failed", f"{self.broken} Clean up and configure again.")
        if self._observations.fault is not None:
            return self._observations.fault
        if not self._loaded:
            return Hold(WAITING, "for the policy, which is being loaded")
        if not self.instruction.strip() and self._worker.spec.policy_type not in _SPEECHLESS:
            return Hold(
                "no_instruction", "publish one on ~/instruction or set the parameter instruction"
            )
        return Hold("bad_instruction", self._refusal) if self._refusal is not None else None

    def ask_if_due(self, now: float) -> Plan | None:
        """Ask for the next chunk unless images that are still to come will do; the plan that was
        sent, if any.
        """
        if (
            not self._loaded
            or not self._worker.idle
            or now < self._retry_at
            or self._refusal is not None
        ):
            return None
        if self._replan_steps is None:
            # One sooner than in the policy's own loop, where observations are new when they are
            # acted on; but behind a slow policy frozen steps would be most of a chunk.
            own = self._worker.spec.n_action_steps
            self.replan_steps = own if self.delay_steps > _SLOW else max(own - 1, 1)
        plan = self.plan(
            self.grid.remaining(now), (self.grid.until_images(now) + UNSURE) / self.action_dt
        )
        if plan is None or self._ask(plan, now):
            return plan
        self.cancel(plan.id)
        return None

    def receive(self, now: float) -> bool:
        """Take the policy's answer if there is one; whether it will be used."""
        response = self._worker.poll()
        if response is None:
            self._look_again()
            return False
        self._observations.judge(response.seen)
        asked = self._asked.pop(response.id, None)
        accepted = False
        if response.id == LOOK or response.code == BAD_IMAGE:
            self.cancel(response.id)  # the next tick holds, without a failure of the policy
            return False
        if response.error is None:
            try:
                remaining = self.grid.remaining(now)
                whole = response.whole
                accepted = self.offer(
                    response.id, response.actions, response.tokens, remaining, whole=whole
                )
            except ConfigError as error:
                response = Response(response.id, error=str(error))
        if response.whole:
            self.statistics.answered(response)
        if response.error is not None:
            self._failed(response, now)
            return False
        self.try_again()
        if not accepted:
            return False
        self.statistics.last_error = ""
        if asked is not None:  # no step of it was taken yet
            late = asked.plan.deadline_s is not None and now - asked.sent > asked.plan.deadline_s
            self.statistics.deadline_misses += late
            self._asked = {response.id: replace(asked, decode_s=response.seconds.get("total", 0.0))}
        return True

    def target(self) -> Target:
        target = super().target()
        asked = self._asked.get(target.chunk_id or 0)
        if asked is not None and target.index >= asked.plan.frozen_steps:
            self._fresh = asked
            self._asked.clear()
        return target

    def commanded(self, clock: float) -> None:
        """A command of the running step was sent in motion; `clock` is the time of the messages'
        stamps [s].
        """
        if self._fresh is None:
            return
        latency = clock - self._fresh.taken
        self.statistics.to_command.append(latency)
        self.statistics.beyond_decode.append(latency - self._fresh.decode_s)
        self._fresh = None

    def _ask(self, plan: Plan, now: float) -> bool:
        """Send the newest observation to the policy; False if it cannot be sent."""
        try:
            observation = self._observations.snapshot(self._motion)
        except ObservationError:  # the objection of the next tick says what is wrong
            return False
        taken = self._observations.image_stamp
        deadline = None if plan.deadline_s is None else plan.deadline_s * self.pace
        work = plan.previous, plan.shift_steps, plan.frozen_steps, deadline
        request = Request(
            plan.id, observation, self.instruction, *work, stream=plan.deadline_s is None
        )
        if not self._worker.submit(request):
            return False
        self._told = self.instruction
        self._asked[plan.id] = _Asked(plan, math.nan if taken is None else taken, now)
        return True

    def _look_again(self) -> None:
        """Have images decoded that may end a camera's fault."""
        suspects = self._observations.suspects() if self._worker.idle else {}
        if suspects:
            self._worker.submit(Request(LOOK, suspects, ""))

    def _failed(self, response: Response, now: float) -> None:
        self.cancel(response.id)
        if response.code != BAD_INSTRUCTION:
            self.failure = response.code
        elif self._told == self.instruction:
            self._refusal = response.error
        self._retry_at = now + min(_FIRST_RETRY * 2**self._failures, _LAST_RETRY)
        self._failures = min(self._failures + 1, 10)
