"""Runs a policy concurrently with the control loop, in a separate process or in a thread.

A thread decodes the images of the newest request, passes the request to the policy and returns the
answer. `submit` and `poll` therefore never block, for any size of the images, and a crash of
the policy is reported as an answer.

The process is the default because a thread shares the interpreter lock with the control loop. If
the policy decodes all the time next to a 100 Hz loop of real-time priority on two cores, a thread
makes the loop's p99 tick 2 to 4 ms late, a process 0.1 ms (0.1 without any policy). The thread is
for debuggers, and for machines without memory for a second process.
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
from ceed_vla.serving.predictor import (
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
    """The process that ran the policy has ended."""


def decoded(request: Request) -> tuple[Request, Seen]:
    """Return the request with decoded images, and the findings of decoding."""
    observation, seen = decode(request.observation)
    return replace(request, observation=observation), seen


class InferenceWorker:
    """Runs one policy, one request at a time; `settings` are the fields of `PredictorSettings`.

    Args:
        checkpoint: LeRobot checkpoint folder or name.
        mode: "process" or "thread".
        python: Interpreter of mode "process"; it needs ceed_vla, torch and lerobot. Empty: the
            present one.
        notify: Called in the inference thread when an answer can be polled.
        settings: The other fields of `PredictorSettings`.

    `ConfigError`: The mode is unknown, or a number is outside its range.
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
        # the compiled engine may crash in a process with other threads
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
        self.failed: str | None = None  # why this worker can never answer again
        self._thread = threading.Thread(target=self._infer, name="inference", daemon=True)

    def begin(self) -> None:
        """Load and warm up the policy in the background; call it once.

        Afterwards `ready` is true or `failed` has the reason, and `notify` is called.
        """
        self._thread.start()

    @property
    def thread(self) -> int | None:
        """The operating system's id of the thread that decodes images; None before it starts."""
        return self._thread.native_id

    @property
    def ready(self) -> bool:
        """Whether the policy is loaded."""
        return self._spec is not None

    @property
    def spec(self) -> PolicySpec:
        """The policy's inputs and outputs; valid once `ready`."""
        assert self._spec is not None
        return self._spec

    @property
    def idle(self) -> bool:
        """Whether `submit` accepts a request: the policy is loaded, the last answer was polled."""
        return self.ready and not (self._busy or self._closed or self.failed)

    def submit(self, request: Request) -> bool:
        """Pass a request to the policy; return False and drop it if the worker is not idle."""
        if not self.idle:
            return False
        self._busy = True
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        self._inbox.put((request, deadline))
        return True

    def poll(self) -> Response | None:
        """Return the next part of the answer to the last request, or the whole answer, once."""
        try:
            response = self._outbox.get_nowait()
        except queue.Empty:
            return None
        self._busy = not response.whole
        return response

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop, even during a request; kill a process that does not end in time.

        May be called twice.
        """
        self._closed = True
        self._inbox.put(None)
        self._policy.stop(timeout_s)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _infer(self) -> None:
        try:
            self._spec = self._policy.load()
        except Exception as error:  # third-party policies raise any type
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
        """Decode the images and query the policy.

        Images are decoded in this thread because Pillow releases the interpreter lock.
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
        self._stopped.set()  # `close` waits until a chunk in progress is decoded


class _OwnProcess:
    """Runs the policy in a child process, which ends with its parent because its pipe closes.

    The child may run another `python` that has torch and lerobot; the node itself needs neither.
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
            # ROS's wheels set both only for this Python
            if environment.pop("_ROS_WHEELS_BOOTSTRAP_COMPLETE", None):
                environment.pop("LD_LIBRARY_PATH", None)
        command = [self._python or sys.executable, "-m", __name__, str(theirs.fileno())]
        with self._lock:
            if self._stopped:
                raise CheckpointError("The worker was closed while it was starting.")
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment
            )
        theirs.close()  # otherwise the pipe would stay open after the child's end
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
        """Return the child's answer; parts of it go to `early`."""
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
    """Main function of the child process; `number` is its file descriptor of the pipe."""
    # Ctrl-C reaches the whole process group; the parent decides when each process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("ceed_vla").setLevel(logging.INFO)
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
        return  # the parent has ended


def _reason(error: Exception) -> str:
    """Return why the policy could not be loaded."""
    if isinstance(error, CeedVLAError):
        return str(error)
    kind = "" if isinstance(error, _PolicyDied) else f"{type(error).__name__}: "
    return f"The policy could not be loaded. {kind}{error}"


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
