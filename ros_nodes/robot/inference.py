"""Runs a policy concurrently with the control loop.

A thread decodes the images of the newest request, passes the request to the policy and returns the
answer. `submit` and `poll` therefore never block, for any size of the images, and a crash of
the policy is reported as an answer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from ceed_vla.errors import CeedVLAError
from ceed_vla.ros_nodes.robot.images import Seen, decode
from ceed_vla.serving.data_ranges import Range
from ceed_vla.serving.predictor import BAD_IMAGE, LOOK, PolicySpec, Request, Response

logger = logging.getLogger(__name__)


def reason(error: Exception) -> str:
    """Return why a policy could not be loaded."""
    if isinstance(error, CeedVLAError):
        return str(error)
    kind = "" if isinstance(error, PolicyDied) else f"{type(error).__name__}: "
    return f"The policy could not be loaded. {kind}{error}"


def decoded(request: Request) -> tuple[Request, Seen]:
    """Return the request with decoded images, and the findings of decoding."""
    observation, seen = decode(request.observation)
    return replace(request, observation=observation), seen


class PolicyDied(Exception):  # noqa: N818 - an event, not a message for users
    """What ran the policy has ended."""


class RunsPolicy(Protocol):
    """Where a policy runs: in this process, in one of its own, or on a server.

    `declared` and `ranges` are called first, then `load` and `predict` in the worker's thread, and
    `stop` at any time.
    """

    def declared(self) -> PolicySpec:
        """The policy's inputs and outputs, before it is loaded.

        Raises:
            CeedVLAError: There is no policy.
        """

    def ranges(self, lengths: Mapping[str, int]) -> dict[str, Range | str]:
        """The range of every feature in `lengths` (feature -> D), or why it is unknown."""

    def load(self) -> PolicySpec:
        """Load and warm up the policy; any error is the reason why that failed."""

    def predict(
        self, request: Request, deadline: float | None, early: Callable[[Response], None]
    ) -> Response:
        """The answer, see `ceed_vla.serving.predictor.Predictor`; `PolicyDied` if there will be
        none any more.
        """

    def stop(self, timeout_s: float) -> None:
        """End the policy, even during a request, after at most `timeout_s` [s]."""


class InferenceWorker:
    """Runs one policy, one request at a time.

    Args:
        policy: Where it runs.
        notify: Called in the inference thread when an answer can be polled.
    """

    def __init__(self, policy: RunsPolicy, *, notify: Callable[[], None] = lambda: None) -> None:
        self._policy = policy
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
            self.failed = None if self._closed else reason(error)
        if not self._closed:
            self._notify()
        while self.ready and (job := self._inbox.get()) is not None:
            try:
                response = self._respond(*job)
            except PolicyDied as error:
                if self._closed:
                    return
                self.failed = str(error)
                logger.error("%s", error)
                response = Response(job[0].id, error=self.failed)
            except Exception as error:  # else the node would wait for this thread for ever
                logger.exception("The inference thread has ended.")
                self.failed = f"The inference thread has ended. {type(error).__name__}: {error}"
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
