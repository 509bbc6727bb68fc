"""Runs a checkpoint on this machine, in a separate process or in the inference thread.

The process is the default because a thread shares the interpreter lock with the control loop. If
the policy decodes all the time next to a 100 Hz loop of real-time priority on two cores, a thread
makes the loop's p99 tick 2 to 4 ms late, a process 0.1 ms (0.1 without any policy). The thread is
for debuggers, and for machines without memory for a second process.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.ros_nodes.robot.child_process import end_child, start_child
from ceed_vla.ros_nodes.robot.inference import PolicyDied, RunsPolicy, reason
from ceed_vla.scheduling import raise_priority, usable_cores
from ceed_vla.serving.data_ranges import Range, read_ranges
from ceed_vla.serving.predictor import (
    PolicySpec,
    Predictor,
    PredictorSettings,
    Request,
    Response,
    declared_spec,
)

logger = logging.getLogger("ceed_vla.inference")  # not __main__, as this module is in the process
MODES = ("process", "thread")


def local_policy(
    checkpoint: str | Path,
    *,
    mode: str = "process",
    python: str = "",
    priority: int = 0,
    **settings: Any,
) -> RunsPolicy:
    """A checkpoint on this machine.

    Args:
        checkpoint: LeRobot checkpoint folder or name.
        mode: "process" or "thread".
        python: Interpreter of mode "process"; it needs ceed_vla, torch and lerobot. Empty: the
            present one.
        priority: Real-time priority of mode "process", where inference leaves a core to others; 0
            for none.
        settings: The other fields of `PredictorSettings`.

    Raises:
        ConfigError: The mode is unknown, or a number is outside its range.
    """
    if mode not in MODES:
        raise ConfigError(f"The inference mode is {mode!r}; choose one of {', '.join(MODES)}.")
    chosen = PredictorSettings(str(checkpoint), **settings)
    # the compiled engine may crash in a process with other threads
    if mode == "thread" and (python or chosen.engine == "compiled"):
        raise ConfigError(
            f"inference_python and the engine compiled need the inference mode process, not {mode}."
        )
    if mode == "process":
        return _OwnProcess(chosen, python, priority)
    return _SameProcess(chosen)


class _Local:
    """A checkpoint on this machine."""

    def __init__(self, settings: PredictorSettings) -> None:
        self._settings = settings

    def declared(self) -> PolicySpec:
        return declared_spec(self._settings.checkpoint)

    def ranges(self, lengths: Mapping[str, int]) -> dict[str, Range | str]:
        return read_ranges(self._settings.checkpoint, lengths)


class _SameProcess(_Local):
    """Runs the policy in the inference thread."""

    def __init__(self, settings: PredictorSettings) -> None:
        super().__init__(settings)
        self._stopped = threading.Event()

    def load(self) -> PolicySpec:
        self._predictor = Predictor(self._settings, wait=self._stopped.wait)
        return self._predictor.spec

    def predict(
        self, request: Request, deadline: float | None, early: Callable[[Response], None]
    ) -> Response:
        return self._predictor.predict(request, deadline, early)

    def stop(self, timeout_s: float) -> None:
        self._stopped.set()  # `close` waits until a chunk in progress is decoded


class _OwnProcess(_Local):
    """Runs the policy in a child process, which ends with its parent because its pipe closes.

    The child may run another `python` that has torch and lerobot; the node itself needs neither.
    """

    def __init__(self, settings: PredictorSettings, python: str, priority: int) -> None:
        super().__init__(settings)
        self._python = python
        self._priority = priority
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # a process that is being started cannot be stopped yet
        self._stopped = False

    def load(self) -> PolicySpec:
        with self._lock:
            if self._stopped:
                raise CheckpointError("The worker was closed while it was starting.")
            self._process, self._pipe = start_child(__name__, self._python)
        spec: PolicySpec | str = self._ask((self._settings, self._priority))
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
        end_child(self._process, timeout_s)

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
            raise PolicyDied(
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
        settings, priority = pipe.recv()
        predictor = Predictor(settings)
    except EOFError:
        return
    except Exception as error:
        pipe.send(reason(error))
        return
    if settings.threads < len(usable_cores()):  # other processes keep a core
        scheduling = raise_priority(priority, only_this_thread=False)
        logger.info("Scheduling of inference is %s.", scheduling)
    try:
        pipe.send(predictor.spec)
        while True:
            request, deadline = pipe.recv()
            pipe.send(predictor.predict(request, deadline, pipe.send))
    except (EOFError, OSError):
        return  # the parent has ended


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
