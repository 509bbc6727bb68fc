"""Processes of this machine that share work: faster, with one thread each, than as many threads in
one process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from itertools import islice
from multiprocessing import forkserver
from threading import Thread
from typing import Any, cast

from ceed_vla.discovery import discover, discovered
from ceed_vla.errors import CeedVLAError

MOST = "[1, 64]"  # workers, as settings say it
# Most of what takes seconds to import, and nothing that opens a device or a renderer.
PRELOADED = ["ceed_vla.checkpoints.policies"]
HALF_S = 2.0  # that an answer which is being written may take, once the others are to end [s]
_state: dict[str, Any] = {}  # of a worker's process


def prepare(*modules: str) -> Any:
    """Let one process import what workers need, and `modules`, while this one does; workers are
    forks of it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *modules])
    forkserver.ensure_running()
    return context


class Workers(AbstractContextManager["Workers"]):
    """`count` processes, each of which makes a function by ``make(*arguments)`` and calls it for
    item after item.

    What comes of an item must not depend on the process, nor on the items before it. One worker is
    this process, with its own threads; others start, and make their function, at once. All that is
    passed is pickled, `make` by its name.
    """

    def __init__(
        self, count: int, make: Callable[..., Callable[[Any], Any]], *arguments: Any
    ) -> None:
        self.count, self._make = count, (make, arguments)
        self._call: Callable[[Any], Any] | None = None
        if count > 1:
            self._others = set(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(count, prepare(), _begin, (discovered(), *self._make))
            for _ in range(count):
                self._pool.submit(int)

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """What comes of the items, in their order.

        `CeedVLAError`: As the function does, or a process died.
        """
        if self.count == 1:
            make, arguments = self._make
            self._call = self._call or make(*arguments)
            yield from map(self._call, items)
            return
        waiting = deque[Future[Any]]()
        left = iter(items)
        try:
            while True:
                waiting += (
                    self._pool.submit(_work, item)
                    for item in islice(left, 2 * self.count - len(waiting))
                )
                if not waiting:
                    return
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise CeedVLAError(
                "A worker's process died: out of memory, or killed. Use fewer --workers."
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.count == 1:
            return
        # an interrupt waits for no work, but half a result would hold up this process's own end
        if kind is not None:
            writing = cast("Any", self._pool)._result_queue._wlock
            held = writing.acquire(timeout=HALF_S)  # not where a worker died with it
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
            if held:
                writing.release()
        self._pool.shutdown(wait=kind is None, cancel_futures=True)


def _begin(packages: list[str], make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    Thread(target=_follow, daemon=True).start()
    close_input()
    os.environ["LP_NUM_THREADS"] = "1"  # of a renderer without a GPU
    if torch := sys.modules.get("torch"):  # `make` came with it
        torch.set_num_threads(1)
    try:
        discover(",".join(packages))
        _state["call"] = make(*arguments)
    except Exception as error:  # which reaches nobody from here
        _state["error"] = error


def close_input() -> None:
    """Let reading standard input end at once, so that no library waits for an answer there."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _follow() -> None:
    """End with the first process, also where that was killed and could end nobody."""
    if (first := multiprocessing.parent_process()) is not None:
        first.join()
        os._exit(1)


def _work(item: Any) -> Any:
    if "error" in _state:
        raise _state["error"]
    return _state["call"](item)
