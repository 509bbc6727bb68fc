"""The topics and services of a node's tasks, and its action server where the action type exists."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rclpy.clock import Clock
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.messages import COMMAND, JOINT_STATES, clock_time
from ceed_vla.ros_nodes.robot.mode import State
from ceed_vla.ros_nodes.robot.ros_types import message_class
from ceed_vla.ros_nodes.robot.tasks.action import RUN_POLICY, RunPolicyFields, TaskAction
from ceed_vla.ros_nodes.robot.tasks.runner import (
    Controls,
    Outcome,
    Refusal,
    Task,
    TaskResult,
    TaskRunner,
    read_fields,
    read_task,
)

PERIOD = 0.05  # time between two looks at the task that runs [s]
_FEEDBACK = 0.5  # time between two messages of feedback [s]
# Also for who subscribes just after a task has ended.
RESULTS = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class TaskTopics:
    """Runs the tasks that a node receives.

    Args:
        node: The node, with the parameters `task_queue` and `success_topic`.
        steady: Steady clock.
        controls: The robot.
    """

    def __init__(self, node: Node, steady: Clock, controls: Controls) -> None:
        self._node = node
        self._controls = controls
        self._runner = TaskRunner(controls, node.get_parameter("task_queue").value)
        self._results = node.create_publisher(String, "~/task_result", RESULTS)
        self._told = time.monotonic()  # of the last feedback
        node.create_subscription(String, "~/task", self._on_task, COMMAND)
        node.create_service(Trigger, "~/cancel_task", self._on_cancel)
        solved = node.get_parameter("success_topic").value
        self._solved = False  # the last value on that topic
        if solved:  # also from publishers that do not latch
            node.create_subscription(Bool, solved, self._on_solved, JOINT_STATES)
        node.create_timer(PERIOD, self.advance, clock=steady)
        self._action = self._make_action()

    @property
    def values(self) -> dict[str, Any]:
        """The task that runs, for diagnostics."""
        task = self._runner.task
        return {
            "task": "" if task is None else task.instruction,
            "task_seconds": self._runner.elapsed(self._now()),
            "tasks_waiting": self._runner.waiting,
        }

    def _now(self) -> float:
        """Time that limits count [s]: steady, or the simulation's."""
        simulated = self._node.get_parameter("use_sim_time").value
        return clock_time(self._node) if simulated else time.monotonic()

    def advance(self) -> None:
        """End tasks that are over, and publish their results."""
        now = self._now()
        for result in self._runner.advance(now):
            self._publish(result)
        task = self._runner.task
        if task is None or self._action is None or time.monotonic() - self._told < _FEEDBACK:
            return
        self._told = time.monotonic()
        self._action.progress(task.id, str(self._controls.state), self._runner.elapsed(now))

    def _make_action(self) -> TaskAction | None:
        """The action server; None where its type is not installed."""
        try:
            kind = message_class(RUN_POLICY)
        except ImportError:
            return None
        return TaskAction(self._node, kind, RunPolicyFields(), self.submit, self.cancel)

    def submit(self, task: Task) -> bool:
        """Start a task or let it wait; return whether it does."""
        taken = self._runner.submit(task, self._now())
        self.advance()
        return taken

    def cancel(self, id: str) -> int:
        """Cancel a task, or all with ""; return how many were."""
        count = self._runner.cancel(self._now(), id)
        self.advance()
        return count

    def forbid(self, why: str) -> None:
        """Let the task that runs fail, and cancel those that wait."""
        self._runner.forbid(self._now(), why)
        self.advance()

    def cancel_waiting(self, why: str) -> None:
        """Cancel the tasks that wait."""
        self._runner.cancel_waiting(why)
        self.advance()

    def _on_task(self, message: String) -> None:
        try:
            fields = read_fields(message.data) or {}
            if set(fields) == {"cancel"}:
                self.cancel(str(fields["cancel"]) or "-")
                return
            task = read_task(message.data)
        except ConfigError as error:
            self._publish(TaskResult("", "", Outcome.REFUSED, str(error), 0.0))
            return
        self.submit(task)

    def _on_cancel(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        count = self.cancel("")
        response.success = count > 0
        response.message = f"cancelled {count}" if count else "no task runs or waits"
        return response

    def _on_solved(self, message: Bool) -> None:
        solved = message.data and not self._solved  # a publisher may repeat the old task's value
        self._solved = message.data
        if solved:
            self._runner.solved(self._now())
            self.advance()

    def _publish(self, result: TaskResult) -> None:
        self._results.publish(String(data=result.json()))
        text = f"Task {result.instruction!r}: {result.outcome}, {result.reason}"
        if result.outcome in (Outcome.REFUSED, Outcome.FAILED):
            self._node.get_logger().warning(text)
        else:
            self._node.get_logger().info(text)
        if self._action is not None:
            self._action.finished(result)


class NodeControls:
    """What a task does with a node.

    Args:
        state: Returns its state.
        begin: Gives the policy an instruction and allows motion; returns why not.
        end: Forbids motion.
    """

    def __init__(
        self,
        state: Callable[[], State],
        begin: Callable[[str], Refusal | None],
        end: Callable[[], None],
    ) -> None:
        self._state = state
        self.begin = begin
        self.end = end

    @property
    def state(self) -> State:
        """The node's state."""
        return self._state()
