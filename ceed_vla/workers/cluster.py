"""Workers of a Ray cluster: actors, each of which has one function and one CPU."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from ceed_vla.discovery import discovered
from ceed_vla.errors import ConfigError
from ceed_vla.workers.interface import Function, Make
from ceed_vla.workers.local import begin, fail
from ceed_vla.workers.nodes import Node, Nodes, connect
from ceed_vla.workers.schedule import Finished, Lost, Message, Raised, Result, Worker
from ceed_vla.workers.shipped import Shipped, read_checkpoint, remove, unpack

logger = logging.getLogger(__name__)

CLEAN_S = 20.0  # for the nodes to remove what was sent to them [s]


class RayCrew:
    """Actors of a cluster.

    Args:
        address: See `connect`.
        count: Workers; 0: as many as the fitting nodes have CPUs.
        make: Makes the function of a worker; pickled by its name.
        arguments: Arguments of `make`.
        checkpoints: Checkpoints that `make` loads, see `open_workers`.

    Raises:
        ConfigError: The cluster cannot be joined, no node fits, or there are too few CPUs.
    """

    def __init__(
        self,
        address: str,
        count: int,
        make: Make,
        arguments: tuple[Any, ...],
        checkpoints: Sequence[str],
    ) -> None:
        shipped = [read_checkpoint(path) for path in dict.fromkeys(checkpoints)]
        self._ray = connect(address, count)
        self._nodes = Nodes(self._ray)
        self._count = count
        self._job = secrets.token_hex(8)
        # Each node fetches these once, however many of its workers use them.
        work = self._ray.put((make, arguments))
        self._work = _Work(_python_path(), discovered(), work)
        self._shipped = [self._ray.put(one) for one in shipped]
        self._placed: dict[_RayWorker, Node] = {}
        self._used: set[str] = set()  # nodes that ever had a worker

    def open(self) -> Sequence[Worker]:
        nodes = self._nodes.fitting()
        cpus = sum(node.cpus for node in nodes)
        count = self._count or cpus
        if not nodes:
            raise ConfigError(
                "The cluster has no node that fits; see the warnings. Install the same versions "
                "on its nodes."
            )
        if count > cpus:
            raise ConfigError(
                f"--cluster.workers is {count}, and the fitting nodes have {cpus} CPUs. Lower it, "
                "or start more nodes."
            )
        return [self._place(node) for node in _turns(nodes, count)]

    def wait(self, busy: Sequence[_RayWorker], timeout: float | None) -> Sequence[_RayWorker]:
        pending = {worker.pending: worker for worker in busy}
        ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=timeout)
        if ready:  # and those that are ready at the same time
            ready, _ = self._ray.wait(list(pending), num_returns=len(pending), timeout=0)
        return [pending[one] for one in ready]

    def replace(self, lost: Any, reason: str) -> Worker | None:
        node = self._placed.pop(lost)
        self._nodes.forget_if_gone(node)
        used = Counter(node.id for node in self._placed.values())
        free = [node for node in self._nodes.fitting() if used[node.id] < node.cpus]
        logger.warning(
            "A worker on %s was lost; its work goes to %s. %s",
            node.name,
            f"a new one on {free[0].name}" if free else "the others",
            reason,
        )
        return self._place(free[0]) if free else None

    def close(self, workers: Sequence[_RayWorker], *, at_once: bool) -> None:
        """End the workers, and remove what was sent to their nodes; errors are logged."""
        try:
            for worker in workers:
                worker.end()
            if self._shipped:
                clean = self._ray.remote(num_cpus=0)(remove)
                cleaned = [
                    clean.options(scheduling_strategy=self._nodes.only_on(name)).remote(self._job)
                    for name in self._used
                ]
                self._ray.wait(cleaned, num_returns=len(cleaned), timeout=CLEAN_S)
        except self._ray.exceptions.RayError as error:
            logger.warning("The cluster did not end cleanly: %s", error)

    def _place(self, node: Node) -> _RayWorker:
        """Start a worker on a node."""
        actor = self._ray.remote(_Actor).options(
            num_cpus=1, scheduling_strategy=self._nodes.only_on(node.id)
        )
        worker = _RayWorker(self._ray, actor.remote(self._job, self._work, *self._shipped))
        self._placed[worker] = node
        self._used.add(node.id)
        return worker


def _turns(nodes: Sequence[Node], count: int) -> list[Node]:
    """The nodes of `count` workers: in turns, each at most as often as it has CPUs."""
    slots = sorted((turn, place) for place, node in enumerate(nodes) for turn in range(node.cpus))
    return [nodes[place] for _, place in slots[:count]]


class _RayWorker:
    """The driver's side of a worker."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray = ray
        self._actor = actor
        self.pending: Any = None  # the results of the current item, as they are ready
        self._alive = actor.alive.remote()
        actor.make.remote()

    def start(self, item: Any) -> None:
        self.pending = self._actor.run.options(num_returns="streaming").remote(item)

    def receive(self) -> Message:
        errors = self._ray.exceptions
        try:
            return Result(self._ray.get(next(self.pending)))
        except StopIteration:
            return Finished()
        except errors.RayTaskError as error:
            cause = error.cause
            return Raised(cause if isinstance(cause, Exception) else error)
        except errors.RayError as error:
            line = str(error).strip().splitlines()[0]
            return Lost(f"Ray: {type(error).__name__}: {line}")

    def running(self) -> bool:
        ready, _ = self._ray.wait([self._alive], timeout=0)
        return bool(ready)

    def end(self) -> None:
        self._ray.kill(self._actor)


@dataclass(frozen=True)
class _Work:
    """What a worker runs.

    Attributes:
        paths: Folders of the user's modules, where a node has them, too.
        packages: The user's packages, see `discover`.
        reference: Of the function `make` and its arguments, which may need both.
    """

    paths: list[str]
    packages: list[str]
    reference: Any


def _python_path() -> list[str]:
    """The folders of this process's PYTHONPATH."""
    words = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(word) for word in words if word]


class _Actor:
    """The node's side of a worker."""

    def __init__(self, job: str, work: _Work, *shipped: Shipped) -> None:
        self._job = job
        self._work = work
        self._shipped = shipped
        self._function: Function = _without_function

    def alive(self) -> None:
        """Answer that the worker has a processor."""

    def make(self) -> None:
        """Make the function; if that fails, the first item raises the error."""
        sys.path += [path for path in self._work.paths if path not in sys.path]
        try:
            begin(self._work.packages)
            for one in self._shipped:
                unpack(one, self._job)
            self._shipped = ()  # else every worker would keep the checkpoints in memory
            make, arguments = importlib.import_module("ray").get(self._work.reference)
            self._function = make(*arguments)
        except Exception as error:
            self._function = partial(fail, error)

    def run(self, item: Any) -> Iterator[Any]:
        """Process an item."""
        for result in self._function(item):  # noqa: UP028 (Ray sends values into generators)
            yield result


def _without_function(item: Any) -> NoReturn:
    raise RuntimeError("`make` was not called.")
