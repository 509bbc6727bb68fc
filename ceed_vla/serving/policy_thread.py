"""The thread that runs the policy: requests in turn, those of one kind together.

A server process may end while the thread runs a request.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ceed_vla.serving.predictor_types import Request, Response

_AMPLE = 2.0  # times of all chunks of a batch after which a deadline does not matter

type Early = Callable[[Response], None]
# Of requests with their deadlines, and what receives the first steps of a single one.
type Answer = Callable[[Sequence[tuple[Request, float | None]], Early], list[Response]]


@dataclass(frozen=True)
class Answered:
    """A job's answer.

    Attributes:
        response: The answer.
        started: Time on `time.monotonic`'s clock at which its decoding began [s].
        rows: Requests that were decoded together.
    """

    response: Response
    started: float
    rows: int = 1


@dataclass(eq=False)
class Job:
    """A request that waits for its turn.

    Attributes:
        request: The request.
        deadline: Time on `time.monotonic`'s clock at which the answer is needed [s]; None: no
            limit.
        early: Receives the first steps of the answer in the thread, if the request is for a
            `stream`.
        left: Returns whether its client has left; its request is then not run.
        kind: Jobs of equal kind may be answered together; None: alone.
        future: Receives the answer.
        arrived: Time at which the job was made [s].
    """

    request: Request
    deadline: float | None
    early: Early
    left: Callable[[], bool]
    kind: Hashable = None
    future: Future[Answered] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class PolicyThread:
    """Runs a policy in a thread of its own.

    Args:
        most: Requests that are answered together at most.
        wait_s: Time that the first one waits for others [s].

    Attributes:
        chunk_s: Usual time of a chunk [s]; a deadline that would end a batch early, or come before
            its end, keeps a request out of it.
    """

    def __init__(self, most: int = 1, wait_s: float = 0.0) -> None:
        self.chunk_s = 0.0
        self._most, self._wait_s = most, wait_s
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._busy_since: float | None = None

    @property
    def busy_s(self) -> float:
        """Time for which the present request has been running [s]; 0 between requests."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    async def begin[T](self, load: Callable[[], T], answer: Callable[[T], Answer]) -> T:
        """Start the thread.

        Args:
            load: Loads the policy; called in the thread.
            answer: Makes the function that answers requests, of what was loaded.

        Returns:
            What was loaded.
        """
        loaded: Future[T] = Future()
        loaded.set_running_or_notify_cancel()

        def work() -> None:
            try:
                policy = load()
            except BaseException as error:
                loaded.set_exception(error)
                return
            loaded.set_result(policy)
            self._work(answer(policy))

        threading.Thread(target=work, name="policy", daemon=True).start()
        return await asyncio.wrap_future(loaded)

    async def run(self, job: Job) -> Answered:
        """The answer to a request."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return await asyncio.wrap_future(job.future)

    def _work(self, answer: Answer) -> None:
        while True:
            jobs = self._together()
            started = time.monotonic()
            due = []
            for job in jobs:
                if not job.future.set_running_or_notify_cancel():
                    continue  # the caller was cancelled
                if job.left():
                    gone = Response(job.request.id, error="the client has left")
                    job.future.set_result(Answered(gone, started))
                else:
                    due.append(job)
            if not due:
                continue
            self._busy_since = started
            try:
                responses = answer([(job.request, job.deadline) for job in due], due[0].early)
                for job, response in zip(due, responses, strict=True):
                    job.future.set_result(Answered(response, started, len(due)))
            except BaseException as error:
                for job in due:
                    if not job.future.done():
                        job.future.set_exception(error)
            self._busy_since = None

    def _together(self) -> list[Job]:
        """Take the first job, and those of its kind that wait or come in time.

        The thread never waits while another job is due.
        """
        with self._changed:
            while not self._jobs:
                self._changed.wait()
            first = self._jobs.popleft()
            taken = [first]
            if not self._joins(first, first):
                return taken
            end = first.arrived + self._wait_s
            while True:
                for job in [job for job in self._jobs if self._joins(job, first)]:
                    if len(taken) < self._most:
                        self._jobs.remove(job)
                        taken.append(job)
                left = end - time.monotonic()
                if len(taken) >= self._most or self._jobs or left <= 0.0:
                    return taken
                self._changed.wait(left)

    def _joins(self, job: Job, first: Job) -> bool:
        """Whether a job may be answered together with the first one."""
        if self._most == 1 or job.kind is None or job.kind != first.kind:
            return False
        longest = _AMPLE * self._most * self.chunk_s + self._wait_s
        return job.deadline is None or job.deadline - time.monotonic() > longest


def kind_of(request: Request) -> Hashable:
    """What requests must share to be answered together; None for those answered alone."""
    if request.stream:
        return None
    return (
        request.decoding,
        request.executed_steps,
        request.frozen_steps,
        request.shift_steps if request.previous is not None else None,
    )
