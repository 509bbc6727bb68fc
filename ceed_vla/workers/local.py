"""Worker processes of this machine.

Processes with one thread each are faster here than as many threads in one process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from multiprocessing import connection, forkserver
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from typing import Any, NoReturn

from ceed_vla.discovery import discover, discovered
from ceed_vla.errors import CeedVLAError, is_failure
from ceed_vla.workers.interface import Make
from ceed_vla.workers.schedule import Finished, Lost, Message, Raised, Result, Worker

# Imports most modules that take seconds to load; opens neither a device nor a renderer.
PRELOADED = ["ceed_vla.checkpoints.policies"]
END_S = 5.0  # for a process to end before it is killed [s]


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


class LocalCrew:
    """`count` processes, each of which makes its function as soon as it starts.

    Arguments and items are pickled, `make` by its name. Each process has a pipe of its own, so one
    that is killed while it sends disturbs no other.
    """

    def __init__(self, count: int, make: Make, arguments: tuple[Any, ...]) -> None:
        self._count = count
        self._work = (discovered(), make, arguments)

    def open(self) -> Sequence[Worker]:
        context = prepare()
        return [_Process(context, self._work) for _ in range(self._count)]

    def wait(self, busy: Sequence[_Process], timeout: float | None) -> Sequence[_Process]:
        ready = set(connection.wait([worker.pipe for worker in busy], timeout))
        return [worker for worker in busy if worker.pipe in ready]

    def replace(self, lost: Any, reason: str) -> Worker | None:
        raise CeedVLAError(
            f"{reason} If memory was short, use fewer workers (--workers, where there is one)."
        )

    def close(self, workers: Sequence[_Process], *, at_once: bool) -> None:
        for worker in workers:
            worker.ask_to_end(at_once)
        end = time.monotonic() + END_S
        for worker in workers:
            worker.process.join(max(0.0, end - time.monotonic()) if at_once else None)
            worker.end()


class _Process:
    """A worker process."""

    def __init__(self, context: Any, work: tuple[Any, ...]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *work))
        self.process.start()
        theirs.close()

    def start(self, item: Any) -> None:
        with suppress(OSError):  # it has ended; `receive` says so
            self.pipe.send((item,))

    def receive(self) -> Message:
        try:
            message: Message = self.pipe.recv()
        except (EOFError, OSError):
            return Lost("A worker's process died: out of memory, or killed.")
        return message

    def running(self) -> bool:
        return True

    def ask_to_end(self, at_once: bool) -> None:
        """Let it end after its item, or by a signal."""
        if at_once:
            self.process.terminate()
        else:
            with suppress(OSError):  # it has ended
                self.pipe.send(None)

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _serve(pipe: Any, packages: list[str], make: Make, arguments: tuple[Any, ...]) -> None:
    """Process items until None arrives, or the main process has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process terminates the workers
    Thread(target=_follow, daemon=True).start()
    try:
        begin(packages)
        function = make(*arguments)
    except Exception as error:
        function = partial(fail, error)  # at the first item: here the error would be lost
    while (received := pipe.recv()) is not None:
        try:
            for result in function(received[0]):
                pipe.send(Result(result))
        except BaseException as error:
            if not is_failure(error):
                raise
            pipe.send(Raised(_portable(error)))
        else:
            pipe.send(Finished())


def fail(error: Exception, item: Any) -> NoReturn:
    """Stand in for a function that could not be made."""
    raise error


def _portable(error: BaseException) -> Exception:
    """The error, if another process can read it; otherwise one with its text."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)))
    try:
        ForkingPickler.dumps(error)
        deepcopy(error)  # fails where pickle cannot restore it
    except Exception:
        return CeedVLAError(f"{type(error).__name__}: {error}")
    return error if isinstance(error, Exception) else CeedVLAError(str(error))


def begin(packages: Sequence[str]) -> None:
    """Prepare a worker's process: one thread, no input, and the user's packages."""
    close_input()
    os.environ["LP_NUM_THREADS"] = "1"  # threads of the software renderer
    if torch := sys.modules.get("torch"):  # unpickling the arguments imported it
        torch.set_num_threads(1)
    discover(",".join(packages))


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
