"""Runs a policy beside the control loop, in a process of its own or in a thread, behind one class.

A thread decodes the images of the newest request, takes it to wherever the policy runs and brings
the answer back, so `submit` and `poll` never block, whatever the size of the images, and a policy
that crashes is an answer too.

The process is the default because a thread shares the interpreter lock with the control loop:
decoding all the time beside a 100 Hz loop of real-time priority on two cores, a thread makes its
p99 tick 2 to 4 ms late, a process 0.1 ms (0.1 without any policy). A thread is for debuggers, and
where a second process does not fit into memory.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError
from ceed_vla.ros_nodes.robot.images import Seen, decode
from ceed_vla.ros_nodes.robot.predictor import (
    BAD_IMAGE,
    LOOK,
    PolicySpec,
    Predictor,
    PredictorSettings,
    Request,
    Response,
)

logger = logging.getLogger(__name__)

MODES = ("process", "thread")


class _PolicyDied(Exception):  # noqa: N818 - an event, not a message for users
    """The place where the policy ran is gone."""


def decoded(request: Request) -> tuple[Request, Seen]:
    """The request with its images as pixels, and what they are like."""
    observation, seen = decode(request.observation)
    return replace(request, observation=observation), seen


class InferenceWorker:
    """One policy, one request at a time, with the other fields of `PredictorSettings` as
    `settings`.

    `python` runs the process of mode "process", this Python if it is empty; it needs ceed_vla,
    torch and lerobot.

    `notify` is called in the thread that carries the answers when one can be polled.
    `ConfigError`: An unknown mode, or a number outside its range.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        mode: str = "process",
        python: str = "",
        notify: Callable[[], None] = lambda: None,
        **settings: Any,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"The inference mode is {mode!r}; choose one of {', '.join(MODES)}.")
        chosen = PredictorSettings(str(checkpoint), **settings)
        # it may crash beside other threads
        if mode == "thread" and (python or chosen.engine == "compiled"):
            raise ConfigError(
                "inference_python and the engine compiled need the inference mode process, not "
                f"{mode}."
            )
        self._policy = _OwnProcess(chosen, python) if mode == "process" else _SameProcess(chosen)
        self._spec: PolicySpec | None = None
        self._notify = notify
        self._inbox: queue.SimpleQueue[tuple[Request, float | None] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Response] = queue.SimpleQueue()
        self._closed = self._busy = False
        self.failed: str | None = None  # why this worker will never answer again
        self._thread = threading.Thread(target=self._infer, name="inference", daemon=True)

    def begin(self) -> None:
        """Load the policy and warm it up meanwhile; then `ready`, or `failed` says why not, and
        `notify` is called.

        A worker begins once.
        """
        self._thread.start()

    @property
    def thread(self) -> int | None:
        """The system's number of the thread that decodes images, while it runs."""
        return self._thread.native_id

    @property
    def ready(self) -> bool:
        """Whether the policy is loaded."""
        return self._spec is not None

    @property
    def spec(self) -> PolicySpec:
        """What the policy wants and gives, when it is `ready`."""
        assert self._spec is not None
        return self._spec

    @property
    def idle(self) -> bool:
        """Whether `submit` would take a request: the policy is there, the last answer was
        polled.
        """
        return self.ready and not (self._busy or self._closed or self.failed)

    def submit(self, request: Request) -> bool:
        """Hand a request over; False, and it is dropped, if the worker is busy, failed or
        closed.
        """
        if not self.idle:
            return False
        self._busy = True
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        self._inbox.put((request, deadline))
        return True

    def poll(self) -> Response | None:
        """The answer to the last request, once, as soon as there is one; before it, parts of it."""
        try:
            response = self._outbox.get_nowait()
        except queue.Empty:
            return None
        self._busy = not response.whole
        return response

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop, wherever the policy is; a process that does not end in time is killed. May be
        called twice.
        """
        self._closed = True
        self._inbox.put(None)
        self._policy.stop(timeout_s)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _infer(self) -> None:
        try:
            self._spec = self._policy.load()
        except Exception as error:  # policies of any make raise anything
            self.failed = None if self._closed else _reason(error)
        if not self._closed:
            self._notify()
        while self.ready and (job := self._inbox.get()) is not None:
            try:
                response = self._respond(*job)
            except _PolicyDied as error:
                if self._closed:
                    return
                self.failed = str(error)
                logger.error("%s", error)
                response = Response(job[0].id, error=self.failed)
            self._answer(response)

    def _respond(self, request: Request, deadline: float | None) -> Response:
        """Decode the images, which is this thread's part: Pillow does it without the interpreter's
        lock.
        """
        request, seen = decoded(request)
        if seen.problem:
            return Response(request.id, error=seen.problem, code=BAD_IMAGE, seen=seen)
        if request.id == LOOK:
            return Response(request.id, seen=seen)
        return replace(self._policy.predict(request, deadline, self._answer), seen=seen)

    def _answer(self, response: Response) -> None:
        self._outbox.put(response)
        if not self._closed:
            self._notify()


class _SameProcess:
    """Runs the policy in the inference thread, which calls `load` and then `predict`."""

    def __init__(self, settings: PredictorSettings) -> None:
        self._settings = settings
        self._stopped = threading.Event()

    def load(self) -> PolicySpec:
        self._predictor = Predictor(self._settings, wait=self._stopped.wait)
        self.predict = self._predictor.predict
        return self._predictor.spec

    def stop(self, timeout_s: float) -> None:
        self._stopped.set()  # a chunk that is being decoded is finished; `close` waits for it


class _OwnProcess:
    """Runs it in a child process, which dies with its parent, because its pipe ends then.

    The child may be another `python`, where torch and lerobot are; the node itself needs neither.
    """

    def __init__(self, settings: PredictorSettings, python: str) -> None:
        self._settings, self._python = settings, python
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # a process that is being started cannot be stopped yet
        self._stopped = False

    def load(self) -> PolicySpec:
        self._pipe, theirs = multiprocessing.Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if self._python:
            environment = dict(os.environ)
            # ROS's wheels set both for this Python alone
            if environment.pop("_ROS_WHEELS_BOOTSTRAP_COMPLETE", None):
                environment.pop("LD_LIBRARY_PATH", None)
        command = [self._python or sys.executable, "-m", __name__, str(theirs.fileno())]
        with self._lock:
            if self._stopped:
                raise CheckpointError("The worker was closed while it was starting.")
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment
            )
        theirs.close()  # or the pipe would not end with the child
        spec: PolicySpec | str = self._ask(self._settings)
        if isinstance(spec, str):
            raise CheckpointError(spec)
        return spec

    def predict(
        self, request: Request, deadline: float | None, early: Callable[[Response], None]
    ) -> Response:
        response: Response = self._ask((request, deadline), early)
        return response

    def stop(self, timeout_s: float) -> None:
        with self._lock:
            self._stopped = True
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, question: Any, early: Callable[[Response], None] = lambda _: None) -> Any:
        """What the child answers; parts of it go to `early`."""
        try:
            self._pipe.send(question)
            while isinstance(answer := self._pipe.recv(), Response) and not answer.whole:
                early(answer)
            return answer
        except (EOFError, OSError) as error:
            assert self._process is not None
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            raise _PolicyDied(
                f"The inference process ended (exit code {self._process.returncode})."
            ) from error


def _serve(number: int) -> None:
    """Main function of the child process, whose end of the pipe has that file number."""
    # Ctrl-C reaches the whole group; the parent decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(number)
    try:
        predictor = Predictor(pipe.recv())
    except EOFError:
        return
    except Exception as error:
        pipe.send(_reason(error))
        return
    try:
        pipe.send(predictor.spec)
        while True:
            request, deadline = pipe.recv()
            pipe.send(predictor.predict(request, deadline, pipe.send))
    except (EOFError, OSError):
        return  # the parent is gone


def _reason(error: Exception) -> str:
    """Why the policy is not there."""
    if isinstance(error, CeedVLAError):
        return str(error)
    kind = "" if isinstance(error, _PolicyDied) else f"{type(error).__name__}: "
    return f"The policy could not be loaded. {kind}{error}"


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
