"""Worker processes of this machine.

Processes with one thread each are faster here than as many threads in one process.
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

MOST = "[1, 64]"  # range of the setting `workers`
# Imports most modules that take seconds to load; opens neither a device nor a renderer.
PRELOADED = ["ceed_vla.checkpoints.policies"]
HALF_S = 2.0  # for a worker to finish writing a result before it is terminated [s]
_state: dict[str, Any] = {}  # of a worker process


def prepare(*modules: str) -> Any:
    """Start the process that workers are forked from; it imports `modules` in parallel with this.

    Returns:
        The multiprocessing context of the workers.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *modules])
    forkserver.ensure_running()
    return context


class Workers(AbstractContextManager["Workers"]):
    """`count` processes, each of which builds a function and calls it for item after item.

    ``make(*arguments)`` returns the function. The result of an item must depend neither on the
    process nor on earlier items. If `count` is 1, this process does the work, with its own threads.
    Otherwise the workers start, and build their function, at once. Arguments and items are pickled,
    `make` by its name.
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
        """Yield the results of the items, in their order.

        Raises:
            CeedVLAError: The function raised it, or a process died.
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
        # An interrupt does not wait for work, but a half-written result would block this process.
        if kind is not None:
            writing = cast("Any", self._pool)._result_queue._wlock
            held = writing.acquire(timeout=HALF_S)  # fails if a worker died while it held the lock
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
            if held:
                writing.release()
        self._pool.shutdown(wait=kind is None, cancel_futures=True)


def _begin(packages: list[str], make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process terminates the workers
    Thread(target=_follow, daemon=True).start()
    close_input()
    os.environ["LP_NUM_THREADS"] = "1"  # threads of the software renderer
    if torch := sys.modules.get("torch"):  # unpickling `make` imported it
        torch.set_num_threads(1)
    try:
        discover(",".join(packages))
        _state["call"] = make(*arguments)
    except Exception as error:  # `_work` raises it: here it would be lost
        _state["error"] = error


def close_input() -> None:
    """Replace standard input by an empty one, so that no library blocks on a prompt."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _follow() -> None:
    """End when the main process ends, even if it was killed and could not terminate the workers."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(item: Any) -> Any:
    if "error" in _state:
        raise _state["error"]
    return _state["call"](item)
