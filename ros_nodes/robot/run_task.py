"""`ceed-vla run`: gives a running policy node a task, and waits for its result."""

from __future__ import annotations

import json
import math
import signal
import time
import uuid
from dataclasses import dataclass
from typing import Any

from ceed_vla.errors import ConfigError, NodeError
from ceed_vla.fields import Checked, ranged
from ceed_vla.texts import instruction_problem

_GRACE = 5.0  # time within which the node must report a cancellation, or be found again [s]
_POLL = 0.1  # time between two looks at an interrupt [s]


@dataclass
class RunTaskConfig(Checked):
    """Settings of `ceed-vla run`.

    Attributes:
        instruction: Task for the policy.
        time_limit: Longest time [s]; 0: until it is solved or cancelled (Ctrl-C).
        node: Name of the policy node, with its namespace.
        wait: Longest time to wait for the node [s].
    """

    instruction: str
    time_limit: float = ranged(0.0, "[0, 86400]")
    node: str = "/policy"
    wait: float = ranged(10.0, "[0, 600]")


@dataclass(frozen=True)
class TaskEnd:
    """Result of `run_task`."""

    outcome: str
    reason: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.outcome} after {self.seconds:.1f} s: {self.reason}"


def run_task(config: RunTaskConfig) -> TaskEnd:
    """Give the node the task, print its states, and wait for the result; Ctrl-C cancels the task.

    Raises:
        ConfigError: The instruction is invalid, or ROS is missing.
        NodeError: There is no such node, it does not report, or the task was refused or failed.
    """
    problem = instruction_problem(config.instruction)
    if problem or not config.instruction.strip():
        raise ConfigError(f"--instruction is invalid: {problem or 'it is empty'}.")
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node(f"run_{uuid.uuid4().hex[:8]}")
    try:
        result = _Client(node, config).run()
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    if result.outcome in ("refused", "failed"):
        raise NodeError(f"The task {result.outcome}: {result.reason}")
    return result


class _Client:
    """The client of one task."""

    def __init__(self, node: Any, config: RunTaskConfig) -> None:
        from std_msgs.msg import String

        from ceed_vla.ros_nodes.robot.messages import COMMAND, LATCHED
        from ceed_vla.ros_nodes.robot.tasks.topics import RESULTS

        self._node = node
        self._config = config
        self._id = uuid.uuid4().hex
        self._message = String
        self._end: TaskEnd | None = None
        name = config.node.rstrip("/")
        self._tasks = node.create_publisher(String, f"{name}/task", COMMAND)
        node.create_subscription(String, f"{name}/task_result", self._on_result, RESULTS)
        node.create_subscription(String, f"{name}/state", self._on_state, LATCHED)

    def run(self) -> TaskEnd:
        """Run the task; returns its result."""
        self._find()
        fields = {
            "id": self._id,
            "instruction": self._config.instruction,
            "time_limit": self._config.time_limit,
        }
        self._tasks.publish(self._message(data=json.dumps(fields)))
        try:
            self._wait()
        finally:
            if self._end is None:  # nobody waits for it any more
                self._cancel()
        if self._end is None:
            raise NodeError(f"{self._config.node} does not report the task's end.")
        return self._end

    def _cancel(self) -> None:
        self._tasks.publish(self._message(data=json.dumps({"cancel": self._id})))
        self._spin(_POLL)

    def _find(self) -> None:
        """Wait for the node."""
        end = time.monotonic() + self._config.wait
        while not self._tasks.get_subscription_count():
            if time.monotonic() > end:
                raise NodeError(
                    f"There is no policy node {self._config.node} after {self._config.wait:g} s; "
                    "start it, or give its name with --node."
                )
            self._spin(_POLL)

    def _wait(self) -> None:
        """Wait for the result; an interrupt cancels the task."""
        interrupts: list[int] = []
        caught = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(one, lambda number, _: interrupts.append(number)) for one in caught]
        end = math.inf
        seen = time.monotonic()
        try:
            while self._end is None and time.monotonic() < end:
                self._spin(_POLL)
                if self._tasks.get_subscription_count():
                    seen = time.monotonic()
                elif time.monotonic() - seen > _GRACE:
                    raise NodeError(f"The policy node {self._config.node} has ended.")
                if interrupts and end == math.inf:
                    end = time.monotonic() + _GRACE
                    print("cancelling")
                    self._cancel()
        finally:
            for one, handler in zip(caught, before, strict=True):
                signal.signal(one, handler)

    def _spin(self, seconds: float) -> None:
        import rclpy

        rclpy.spin_once(self._node, timeout_sec=seconds)

    def _on_state(self, message: Any) -> None:
        print(message.data, flush=True)

    def _on_result(self, message: Any) -> None:
        result = json.loads(message.data)
        if result["id"] == self._id:
            self._end = TaskEnd(result["outcome"], result["reason"], result["seconds"])
