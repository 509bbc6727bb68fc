"""Chunk stream of a policy: sends the requests that are due, receives the answers, and measures the
latency from image to command.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.ros_nodes.robot.chunk_stream import ChunkRequest, ChunkStream, Target
from ceed_vla.ros_nodes.robot.inference import InferenceWorker
from ceed_vla.ros_nodes.robot.loop_statistics import LoopStatistics
from ceed_vla.ros_nodes.robot.mode import LATE_CHUNK, POLICY_ERROR, WAITING
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.outage import RESUME_WITHIN, answer_limit
from ceed_vla.ros_nodes.robot.safety import Hold
from ceed_vla.ros_nodes.robot.step_grid import UNSURE, StepGrid
from ceed_vla.serving.predictor import BAD_IMAGE, BAD_INSTRUCTION, LOOK, Request, Response
from ceed_vla.texts import instruction_problem

# time between a failure and the next request, doubled after each failure [s]
_FIRST_RETRY = 0.1
_LAST_RETRY = 2.0
_SLOW = 1.5  # delay above which a policy counts as slow [steps]
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
    """A request that was sent and whose chunk does not move the arm yet."""

    request: ChunkRequest
    taken_at: float  # stamp of the oldest of its images, on the messages' clock [s]
    sent_at: float  # steady time at which it was sent [s]
    decode_s: float = 0.0


class PolicyStream(ChunkStream):
    """Requests chunks from a `worker`, one at a time, each from the newest observation.

    Requests begin as soon as the worker is ready; its `begin` must have been called. This class
    owns the `grid`: other classes read it, and only the methods here move it. `replan_steps` is as
    in `ChunkStream`; with None it comes from the checkpoint. An answer that takes longer than
    `within` [s] is dropped, because its images show an old situation. `now` is the grid's steady
    time [s].

    Attributes:
        grid: Position of the newest tick in the running step.
        before: The motion at the beginning of the running step.
        statistics: Counts and timings of the loop.
        instruction: Instruction of the policy.
        failure: `Response.code` of the last answer, unless the instruction was at fault.
        pace: Real seconds per second of the grid, whose time may be simulated.
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
        within: float = RESUME_WITHIN,
    ) -> None:
        self.grid = grid
        self._limit = answer_limit(within)
        self.statistics = LoopStatistics(grid.nominal)
        self._observations = observations
        self._motion = motion
        self.before = motion.copy()
        self._worker = worker
        self._requests: dict[int, _SentRequest] = {}
        self._replan_steps = replan_steps
        self._loaded = False
        super().__init__(1, 1, grid.action_dt, least_lead=1.01 / grid.ticks_per_step)
        self._load()
        self.instruction = instruction
        self.try_again()

    def _load(self) -> bool:
        """Return whether the policy is loaded; adopt its chunk length as soon as it is."""
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
        """Why the policy cannot answer any more; None if it can."""
        self._load()
        return self._worker.failed

    # ---- the step grid ---------------------------------------------------------------------------

    def count_tick(self, now: float, dt: float) -> None:
        """Count the tick at `now` [s], `dt` [s] after the last tick."""
        self.grid.count(now, dt)

    def start(self) -> None:
        """Begin without a chunk; the first step begins with the next tick."""
        super().start()
        self.grid.begin_now()

    def stop(self) -> None:
        """Drop all chunks and requests; hold until `start`."""
        super().stop()
        self._requests.clear()
        # the request for which the next command is the first one
        self._fresh: _SentRequest | None = None

    def next_step(self) -> Target:
        """Advance to the next step of the grid and return its target."""
        self.statistics.slips += self.grid.begin_step()
        self.before = self._motion.copy()
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
        """Handle new images of all cameras.

        Request the next chunk if the next images would be too late for it, and move the grid so
        that later images arrive just in time.
        """
        self.grid.images.append(now)
        if not self.started:
            return
        request = self.request_if_due(now)
        if request is not None and request.deadline_s is not None:
            spare = request.deadline_s + self.margin - (self.grace + self.lead) * self.action_dt
            self.grid.align(spare, self.grid.until_images(now))

    def request_after_tick(self, now: float) -> None:
        """Request the next chunk if it is due although no new images have arrived.

        The grid then moves back towards the images.
        """
        request = self.request_if_due(now)
        if request is not None and request.deadline_s is not None:
            self.grid.delay()

    # ---- the worker ------------------------------------------------------------------------------

    def instruct(self, instruction: str) -> None:
        """Change the instruction; the request of a chunk for it is due at once."""
        if instruction != self.instruction:
            self.instruction = instruction
            self._ask_anew()
            self.preempt()

    def try_again(self) -> None:
        """Clear earlier failures, so that the next request can be sent at once."""
        self.failure = ""
        self._ask_anew()

    def _ask_anew(self) -> None:
        """Let the next request be sent at once; the last failure stays until there is an answer."""
        self._failures = 0
        self._retry_at = -math.inf
        self._refusal = instruction_problem(self.instruction)  # why the instruction is refused

    def objection(self) -> Hold | None:
        """Return why the policy cannot drive the arm now; None if it can."""
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

    def request_if_due(self, now: float) -> ChunkRequest | None:
        """Request the next chunk, unless the next images will be in time for it.

        Returns:
            The request that was sent; None if none was.
        """
        if (
            not self._loaded
            or not self._worker.idle
            or now < self._retry_at
            or self._refusal is not None
        ):
            return None
        if self._replan_steps is None:
            # One step earlier than in the policy's own loop, which acts on new observations. With a
            # slow policy, most of a chunk would then be frozen steps.
            own = self._worker.spec.n_action_steps
            self.replan_steps = own if self.delay_steps > _SLOW else max(own - 1, 1)
        request = self.request(
            self.grid.remaining(now), (self.grid.until_images(now) + UNSURE) / self.action_dt
        )
        if request is None or self._submit(request, now):
            return request
        self.cancel(request.id)
        return None

    def take_answer(self, now: float) -> bool:
        """Take the policy's answer if there is one.

        Returns:
            Whether the answer will be used; `StepRunner.receive` decides when.
        """
        response = self._worker.poll()
        if response is None:
            self._check_suspects()
            return False
        self._observations.judge(response.seen)
        sent = self._requests.pop(response.id, None)
        accepted = False
        if response.id == LOOK or response.code == BAD_IMAGE:
            self.cancel(response.id)  # the next tick holds, without a failure of the policy
            return False
        if sent is not None and response.error is None and now - sent.sent_at > self._limit:
            text = (
                f"the chunk took {now - sent.sent_at:.1f} s, longer than {self._limit:g} s "
                "(resume_within), and was dropped: its images are too old"
            )
            response = Response(response.id, error=text, code=LATE_CHUNK, seen=response.seen)
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
        if sent is not None:  # no step of its chunk was executed yet
            deadline = sent.request.deadline_s
            self.statistics.deadline_misses += (
                deadline is not None and now - sent.sent_at > deadline
            )
            self._requests = {
                response.id: replace(sent, decode_s=response.seconds.get("total", 0.0))
            }
        return True

    def target(self) -> Target:
        target = super().target()
        sent = self._requests.get(target.chunk_id or 0)
        if sent is not None and target.index >= sent.request.frozen_steps:
            self._fresh = sent
            del self._requests[sent.request.id]  # not that of an answer to come
        return target

    def commanded(self, clock: float) -> None:
        """Record that a command of the running step was sent in motion.

        Args:
            clock: Current time on the clock of the messages' stamps [s].
        """
        if self._fresh is None:
            return
        latency = clock - self._fresh.taken_at
        self.statistics.to_command.append(latency)
        self.statistics.beyond_decode.append(latency - self._fresh.decode_s)
        self._fresh = None

    def _submit(self, request: ChunkRequest, now: float) -> bool:
        """Send a request with the newest observation; return False if it cannot be sent."""
        motion = self.before if request.begun else self._motion  # where the chunk begins
        try:
            observation = self._observations.snapshot(motion)
        except ObservationError:  # the objection of the next tick gives the reason
            return False
        taken_at = self._observations.image_stamp
        deadline = None if request.deadline_s is None else request.deadline_s * self.pace
        message = Request(
            request.id,
            observation,
            self.instruction,
            request.previous,
            request.shift_steps,
            request.frozen_steps,
            deadline,
            stream=request.deadline_s is None,
        )
        if not self._worker.submit(message):
            return False
        self._requested_instruction = self.instruction
        self._requests[request.id] = _SentRequest(
            request, math.nan if taken_at is None else taken_at, now
        )
        return True

    def _check_suspects(self) -> None:
        """Submit images that may end a camera's fault; their answer has the id `LOOK`."""
        suspects = self._observations.suspects() if self._worker.idle else {}
        if suspects:
            self._worker.submit(Request(LOOK, suspects, ""))

    def _failed(self, response: Response, now: float) -> None:
        self.cancel(response.id)
        if response.code != BAD_INSTRUCTION:
            self.failure = response.code or POLICY_ERROR
        elif self._requested_instruction == self.instruction:
            self._refusal = response.error
        self._retry_at = now + min(_FIRST_RETRY * 2**self._failures, _LAST_RETRY)
        self._failures = min(self._failures + 1, 10)
