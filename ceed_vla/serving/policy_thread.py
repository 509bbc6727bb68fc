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

type Early = Callable[[Response], None]
# Of requests with their deadlines, and what receives the first steps of a single one.
type Answer = Callable[[Sequence[tuple[Request, float | None]], Early], list[Response]]


@dataclass(eq=False)
class Job:
    """A request that waits for its turn.

    Attributes:
        request: The request.
        deadline: Time on `time.monotonic`'s clock at which the answer is needed [s]; None: no
            limit.
        early: Receives the first steps of the answer in the thread, if the request is for a
            `stream`.
        dropped: Returns why the request need not be answered any more; "" if it must be.
        kind: Jobs of equal kind may be answered together; None: alone.
        future: Receives the answer, and the time at which its decoding began [s].
    """

    request: Request
    deadline: float | None
    early: Early
    dropped: Callable[[float], str]
    kind: Hashable = None
    future: Future[tuple[Response, float]] = field(default_factory=Future)


class PolicyThread:
    """Runs a policy in a thread of its own.

    Args:
        most: Requests that are answered together at most.
        wait_s: Time that the first one waits for others [s].
    """

    def __init__(self, most: int = 1, wait_s: float = 0.0) -> None:
        self._most, self._wait_s = most, wait_s
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()

    async def begin[T](self, load: Callable[[], T], answer: Callable[[T], Answer]) -> T:
        """Start the thread.

        Args:
            load: Loads the policy; called in the thread.
            answer: Makes the function that answers requests, of what was loaded.

        Returns:
            What was loaded.
        """
        loaded: Future[T] = Future()

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

    async def run(self, job: Job) -> tuple[Response, float]:
        """The answer to a request, and the time at which its decoding began [s]."""
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
                if reason := job.dropped(started):
                    job.future.set_result((Response(job.request.id, error=reason), started))
                else:
                    due.append(job)
            if not due:
                continue
            try:
                responses = answer([(job.request, job.deadline) for job in due], due[0].early)
            except BaseException as error:
                for job in due:
                    job.future.set_exception(error)
                continue
            for job, response in zip(due, responses, strict=True):
                job.future.set_result((response, started))

    def _together(self) -> list[Job]:
        """Take the first job, and those of its kind that wait or come in time."""
        with self._changed:
            while not self._jobs:
                self._changed.wait()
            first = self._jobs.popleft()
            taken = [first]
            if first.kind is None:
                return taken
            end = time.monotonic() + self._wait_s
            while True:
                for job in [job for job in self._jobs if job.kind == first.kind]:
                    if len(taken) < self._most:
                        self._jobs.remove(job)
                        taken.append(job)
                left = end - time.monotonic()
                if len(taken) >= self._most or left <= 0.0:
                    return taken
                self._changed.wait(left)


def kind_of(request: Request) -> Hashable:
    """What requests must share to be answered together."""
    return (
        request.decoding,
        request.executed_steps,
        request.frozen_steps,
        request.shift_steps if request.previous is not None else None,
        tuple(
            (name, getattr(value, "shape", None))
            for name, value in sorted(request.observation.items())
        ),
    )
