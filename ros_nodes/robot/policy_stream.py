"""The chunk stream of a policy on its step grid: requests the chunks that are due, takes the
answers, and times images to commands.
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
# policy types that take no instruction
_WITHOUT_INSTRUCTION = (
    "act",
    "diffusion",
    "multi_task_dit",
    "tdmpc",
    "vqbet",
)


@dataclass(frozen=True)
class _SentRequest:
    """A request whose chunk does not move the arm yet."""

    plan: Plan
    taken: float  # when the oldest of its images was taken, on the messages' clock [s]
    sent: float  # steady time [s]
    decode_s: float = 0.0


class PolicyStream(ChunkStream):
    """Requests chunks from a `worker` that has begun, one at a time and each from the newest
    observation, as soon as the worker is ready.

    It owns the `grid`: others read it, and only the methods here move it. `replan_steps` is as in
    `ChunkStream`; with None the checkpoint decides. Times `now` are the grid's, steady [s].

    Attributes:
        grid: Where in the running step the newest tick is.
        statistics: What the loop counts and measures.
        instruction: The policy's.
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
        self._requests: dict[int, _SentRequest] = {}
        self._replan_steps = replan_steps
        self._loaded = False
        super().__init__(1, 1, grid.action_dt, least_lead=1.01 / grid.ticks_per_step)
        self._load()
        self.instruction = instruction
        self.try_again()

    def _load(self) -> bool:
        """Whether the policy is loaded; the first time, take its chunks' length over."""
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

    # ---- the step grid ---------------------------------------------------------------------------

    def count_tick(self, now: float, dt: float) -> None:
        """Number the tick at `now` [s], `dt` [s] after the last one."""
        self.grid.count(now, dt)

    def start(self) -> None:
        """Begin without a chunk; the first step begins with the next tick."""
        super().start()
        self.grid.begin_now()

    def stop(self) -> None:
        """Forget all chunks and requests; hold until `start`."""
        super().stop()
        self._requests.clear()
        # the next command is the first one that is computed from this request
        self._fresh: _SentRequest | None = None

    def next_step(self) -> Target:
        """Go on to the next step of the grid; returns what it does."""
        self.statistics.slips += self.grid.begin_step()
        return self.target()

    def end_step(self) -> None:
        """Let the running step end with this tick."""
        self.grid.begin_now()

    def extend_step(self) -> None:
        """Let the running step last a whole step from this tick on."""
        self.grid.begin_now()
        self.grid.begin_step()

    def redo(self) -> Target | None:
        """As in `ChunkStream`, unless more than `grace` of the running step is over."""
        if self.grid.part > self.grace * self.grid.ticks_per_step:
            return None
        return super().redo()

    def images_came(self, now: float) -> None:
        """All cameras have new images: request the next chunk if the next images would come too
        late for it, and move the grid so that such images come just in time.
        """
        self.grid.images.append(now)
        if not self.started:
            return
        plan = self.request_if_due(now)
        if plan is not None and plan.deadline_s is not None:
            slack = plan.frozen_steps + self.grid.remaining(now) - self.lead
            self.grid.align(slack * self.grid.action_dt, self.grid.until_images(now))

    def request_after_tick(self, now: float) -> None:
        """Request the next chunk if it is due, though no images have come; the grid then moves
        back towards them.
        """
        plan = self.request_if_due(now)
        if plan is not None and plan.deadline_s is not None:
            self.grid.delay()

    # ---- the worker ------------------------------------------------------------------------------

    def instruct(self, instruction: str) -> None:
        """Change the instruction; the request of a chunk that follows it is due at once."""
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
        if (
            not self.instruction.strip()
            and self._worker.spec.policy_type not in _WITHOUT_INSTRUCTION
        ):
            return Hold(
                "no_instruction", "publish one on ~/instruction or set the parameter instruction"
            )
        return Hold("bad_instruction", self._refusal) if self._refusal is not None else None

    def request_if_due(self, now: float) -> Plan | None:
        """Request the next chunk, unless images that are still to come are in time for it.

        Returns:
            The plan that was sent; None if none was.
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
        if plan is None or self._request(plan, now):
            return plan
        self.cancel(plan.id)
        return None

    def take_answer(self, now: float) -> bool:
        """Take the policy's answer if there is one.

        Returns:
            Whether it will be used; `StepRunner.receive` says when.
        """
        response = self._worker.poll()
        if response is None:
            self._check_suspects()
            return False
        self._observations.judge(response.seen)
        request = self._requests.pop(response.id, None)
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
        if request is not None:  # no step of it was taken yet
            late = (
                request.plan.deadline_s is not None and now - request.sent > request.plan.deadline_s
            )
            self.statistics.deadline_misses += late
            self._requests = {
                response.id: replace(request, decode_s=response.seconds.get("total", 0.0))
            }
        return True

    def target(self) -> Target:
        target = super().target()
        request = self._requests.get(target.chunk_id or 0)
        if request is not None and target.index >= request.plan.frozen_steps:
            self._fresh = request
            self._requests.clear()
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

    def _request(self, plan: Plan, now: float) -> bool:
        """Send a request with the newest observation; False if it cannot be sent."""
        try:
            observation = self._observations.snapshot(self._motion)
        except ObservationError:  # the objection of the next tick says what is wrong
            return False
        taken = self._observations.image_stamp
        deadline = None if plan.deadline_s is None else plan.deadline_s * self.pace
        request = Request(
            plan.id,
            observation,
            self.instruction,
            plan.previous,
            plan.shift_steps,
            plan.frozen_steps,
            deadline,
            stream=plan.deadline_s is None,
        )
        if not self._worker.submit(request):
            return False
        self._requested_instruction = self.instruction
        self._requests[plan.id] = _SentRequest(plan, math.nan if taken is None else taken, now)
        return True

    def _check_suspects(self) -> None:
        """Have images decoded that may end a camera's fault; their answer has the id `LOOK`."""
        suspects = self._observations.suspects() if self._worker.idle else {}
        if suspects:
            self._worker.submit(Request(LOOK, suspects, ""))

    def _failed(self, response: Response, now: float) -> None:
        self.cancel(response.id)
        if response.code != BAD_INSTRUCTION:
            self.failure = response.code
        elif self._requested_instruction == self.instruction:
            self._refusal = response.error
        self._retry_at = now + min(_FIRST_RETRY * 2**self._failures, _LAST_RETRY)
        self._failures = min(self._failures + 1, 10)
