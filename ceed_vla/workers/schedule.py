"""Who works on what: items go to idle workers, and those of a lost worker to another one.

A crew is a set of workers of one kind. It says how to start, hear and end them; this file knows
neither processes nor machines.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ceed_vla.errors import CeedVLAError
from ceed_vla.workers.interface import Workers

MOST_TRIES = 3  # workers that may be lost with the same item
LEAST_WAIT_S = 2.0  # for messages, before a silent worker counts as hanging [s]
AHEAD = 2  # items per worker that may be complete before the first one that is not, in `map`


@dataclass(frozen=True)
class Result:
    """One result of the item that a worker processes."""

    value: Any


@dataclass(frozen=True)
class Finished:
    """The item is complete."""


@dataclass(frozen=True)
class Raised:
    """The function raised an error; the worker can take another item."""

    error: Exception


@dataclass(frozen=True)
class Lost:
    """The worker has ended.

    Attributes:
        reason: What is known of it, for a message.
    """

    reason: str


Message = Result | Finished | Raised | Lost


class Worker(Protocol):
    """One worker."""

    def start(self, item: Any) -> None:
        """Begin to process `item`."""

    def receive(self) -> Message:
        """Return its next message, after `Crew.wait` returned the worker."""

    def running(self) -> bool:
        """Whether it has begun to run; a cluster may let it wait for a processor."""

    def end(self) -> None:
        """End it, whatever it does."""


class Crew(Protocol):
    """Workers of one kind."""

    def open(self) -> Sequence[Worker]:
        """Start the workers."""

    def wait(self, busy: Sequence[Any], timeout: float | None) -> Sequence[Any]:
        """Return the busy workers that have a message, after at most `timeout` [s]."""

    def replace(self, lost: Any, reason: str) -> Worker | None:
        """Start a worker in the place of a lost one; None: continue without.

        Raises:
            CeedVLAError: A lost worker of this kind ends the work.
        """

    def close(self, workers: Sequence[Any], *, at_once: bool) -> None:
        """End the workers, which are idle unless `at_once` is set."""


@dataclass(eq=False)
class _Job:
    """An item that is to be processed."""

    index: int
    item: Any
    tries: int = 0
    wanted: bool = True  # not once its caller has stopped iterating
    heard: float = 0.0  # time of the worker's last message


@dataclass
class _Backlog:
    """Items that no worker has; those of lost workers come first."""

    source: Iterator[tuple[int, Any]]
    may_start: Callable[[int], bool]
    again: deque[_Job] = field(default_factory=deque)
    following: _Job | None = None

    def next(self) -> _Job | None:
        """Remove and return the next job; None if there is none that may start."""
        if self.again:
            return self.again.popleft()
        job = self._first_of_source()
        if job is None or not self.may_start(job.index):
            return None
        self.following = None
        return job

    @property
    def empty(self) -> bool:
        """Whether no job is left."""
        return not self.again and self._first_of_source() is None

    def _first_of_source(self) -> _Job | None:
        if self.following is None:
            self.following = next((_Job(*found) for found in self.source), None)
        return self.following


class Scheduled(Workers):
    """Workers of a crew.

    Args:
        crew: The crew.
        timeout_s: Time without a message [s] after which a busy worker counts as hanging and is
            replaced; None: no limit.
    """

    def __init__(self, crew: Crew, timeout_s: float | None = None) -> None:
        self._crew = crew
        self._timeout = timeout_s
        self._workers: list[Worker] = list(crew.open())
        self._busy: dict[Worker, _Job] = {}

    def stream(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for job, message in self._messages(items, lambda index: True):
            if isinstance(message, Result):
                yield job.item, message.value

    def map(self, items: Iterable[Any]) -> Iterator[list[Any]]:
        results: dict[int, list[Any]] = {}
        complete: set[int] = set()
        first = 0  # index of the next item to yield

        def may_start(index: int) -> bool:
            return index < first + AHEAD * len(self._workers)

        for job, message in self._messages(items, may_start):
            if isinstance(message, Result):
                results.setdefault(job.index, []).append(message.value)
            elif isinstance(message, Lost):
                results.pop(job.index, None)  # they come again
            else:
                complete.add(job.index)
            while first in complete:
                complete.remove(first)
                first += 1
                yield results.pop(first - 1, [])

    def _messages(
        self, items: Iterable[Any], may_start: Callable[[int], bool]
    ) -> Iterator[tuple[_Job, Result | Finished | Lost]]:
        """Run the items; yield what the workers send, except errors, which are raised.

        `Lost` means that the results of the item so far come again.
        """
        backlog = _Backlog(enumerate(items), may_start)
        try:
            while True:
                self._start_idle(backlog)
                if backlog.empty and not any(job.wanted for job in self._busy.values()):
                    return
                yield from self._heard(backlog)
        finally:
            for job in self._busy.values():
                job.wanted = False

    def _start_idle(self, backlog: _Backlog) -> None:
        """Give each idle worker an item."""
        for worker in [worker for worker in self._workers if worker not in self._busy]:
            job = backlog.next()
            if job is None:
                return
            job.heard = time.monotonic()
            self._busy[worker] = job
            worker.start(job.item)

    def _heard(self, backlog: _Backlog) -> Iterator[tuple[_Job, Result | Finished | Lost]]:
        """Wait for messages; yield those of wanted jobs, after idle workers have new items.

        An error is raised only after what other workers sent at the same time.
        """
        found: list[tuple[_Job, Result | Finished | Lost]] = []
        error: Exception | None = None
        for worker, message in self._receive():
            job = self._busy[worker]
            job.heard = time.monotonic()
            if not isinstance(message, Result):
                del self._busy[worker]
            if isinstance(message, Lost):
                try:
                    self._lose(worker, job, message.reason, backlog)
                except CeedVLAError as ended:
                    error = error or ended
            if not job.wanted:
                continue
            if isinstance(message, Raised):
                error = error or message.error
            else:
                found.append((job, message))
        if error is None:
            self._start_idle(backlog)
        yield from found
        if error is not None:
            raise error

    def _lose(self, worker: Worker, job: _Job, reason: str, backlog: _Backlog) -> None:
        """Replace a lost worker, and give its item to another one."""
        self._workers.remove(worker)
        if job.wanted:
            job.tries += 1
            if job.tries == MOST_TRIES:
                raise CeedVLAError(f"The same work ended {MOST_TRIES} workers. {reason}")
            backlog.again.append(job)
        replacement = self._crew.replace(worker, reason)
        if replacement is not None:
            self._workers.append(replacement)
        if not self._workers:
            raise CeedVLAError(f"No worker is left. {reason}")

    def _receive(self) -> Iterator[tuple[Worker, Message]]:
        """Wait for messages, or until a worker has been silent for too long."""
        timeout = None
        if self._timeout is not None:
            oldest = min(job.heard for job in self._busy.values())
            timeout = max(LEAST_WAIT_S, oldest + self._timeout - time.monotonic())
        for worker in self._crew.wait(list(self._busy), timeout):
            yield worker, worker.receive()
        if self._timeout is None:
            return
        now = time.monotonic()
        for worker, job in list(self._busy.items()):
            if not worker.running():
                job.heard = now
            if now - job.heard > self._timeout:
                worker.end()
                yield worker, Lost(f"It sent nothing for {self._timeout:g} s.")

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._crew.close(self._workers, at_once=kind is not None or bool(self._busy))
