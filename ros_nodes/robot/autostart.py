"""Configures and activates a policy node at the start, without a lifecycle manager."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from rclpy.clock import Clock
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn

from ceed_vla.errors import NodeError

LOAD_TIMEOUT = 900.0  # billions of weights from a slow disk, compiling, or a server's start [s]
_LOOK = 0.05  # time between two checks whether the policy is loaded [s]
_AGAIN = 1.0  # time between two attempts to reach a server [s]


class Loads(Protocol):
    """What a configured node waits for before it is activated."""

    @property
    def ready(self) -> bool:
        """Whether it is loaded."""

    failed: str | None  # why it never will be; None if it may


class Autostart:
    """Starts a node; a failure ends the process, so that a launch file detects it.

    A server that cannot be reached is no failure: it may start later than the node.

    Args:
        node: The node.
        clock: Steady clock.
        worker: Returns what the node loads; None if the node is not configured.
        failure: Returns why the last transition failed, and whether the server is absent.

    Attributes:
        running: Whether the node is being started.
    """

    def __init__(
        self,
        node: LifecycleNode,
        clock: Clock,
        worker: Callable[[], Loads | None],
        failure: Callable[[], tuple[str, bool]],
    ) -> None:
        self.running = False
        self._node, self._worker, self._failure = node, worker, failure
        self._configured = False
        self._begun = time.monotonic()
        self._tried = -_AGAIN  # steady time of the last attempt to configure [s]
        self._told = ""  # why the server cannot be reached
        self._timer = node.create_timer(_LOOK, self._look, clock=clock)

    def _look(self) -> None:
        self.running = True
        machine: Any = self._node._state_machine  # rclpy has no other access to the state
        worker = self._worker()
        if not self._configured and machine.current_state[1] == "unconfigured":
            self._configure()
        elif worker is None or not self._configured or machine.current_state[1] != "inactive":
            self._end()  # a lifecycle manager has taken over
        elif worker.failed is not None:
            raise NodeError(f"configure failed: {worker.failed}")
        elif worker.ready:
            self._must_succeed(self._node.trigger_activate())
            self._end()
        elif time.monotonic() - self._begun > LOAD_TIMEOUT:
            late = f"it was not ready after {LOAD_TIMEOUT:g} s; is the machine busy?"
            raise NodeError(f"configure failed: {late}")

    def _configure(self) -> None:
        now = time.monotonic()
        if now - self._tried < _AGAIN:
            return
        result = self._node.trigger_configure()
        self._tried = time.monotonic()
        text, absent = self._failure()
        if result != TransitionCallbackReturn.SUCCESS and absent:
            if now - self._begun > LOAD_TIMEOUT:
                raise NodeError(text)
            if text != self._told:
                self._told = text
                self._node.get_logger().warning(f"{text} The node waits for the server.")
            return
        self._must_succeed(result)
        self._configured = True

    def _must_succeed(self, result: TransitionCallbackReturn) -> None:
        if result != TransitionCallbackReturn.SUCCESS:
            raise NodeError(self._failure()[0] or "the node does not start")

    def _end(self) -> None:
        self._timer.cancel()
        self.running = False
