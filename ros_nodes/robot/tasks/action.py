"""An action server for tasks: a goal is a task, its result the task's."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, Protocol

from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.node import Node
from rclpy.task import Future

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.tasks.runner import Outcome, Task, TaskResult

RUN_POLICY = "ceed_vla_interfaces/action/RunPolicy"


class ActionFields(Protocol):
    """How an action type carries tasks."""

    def task(self, goal: Any, id: str) -> Task:
        """The task of a goal; `ConfigError`: It has none that is valid."""

    def fill_result(self, message: Any, result: TaskResult) -> None:
        """Fill a result's message."""

    def fill_feedback(self, message: Any, state: str, seconds: float) -> None:
        """Fill a feedback's message with the node's state and the time since the start [s]."""


class RunPolicyFields:
    """The fields of `ceed_vla_interfaces/action/RunPolicy`."""

    def task(self, goal: Any, id: str) -> Task:
        return Task(id, goal.instruction, goal.time_limit)

    def fill_result(self, message: Any, result: TaskResult) -> None:
        message.success = result.outcome == Outcome.SUCCESS
        message.outcome = str(result.outcome)
        message.reason = result.reason
        message.seconds = result.seconds

    def fill_feedback(self, message: Any, state: str, seconds: float) -> None:
        message.state = state
        message.seconds = seconds


class TaskAction:
    """Serves ``~/run_policy``.

    Args:
        node: The node.
        action_type: Class of the action.
        fields: How it carries tasks.
        submit: Starts a task; returns whether it runs or waits.
        cancel: Cancels a task by its id.
    """

    def __init__(
        self,
        node: Node,
        action_type: Any,
        fields: ActionFields,
        submit: Callable[[Task], bool],
        cancel: Callable[[str], object],
    ) -> None:
        self._node = node
        self._type = action_type
        self._fields = fields
        self._submit = submit
        self._cancel = cancel
        self._goals: dict[str, tuple[Any, Future]] = {}  # id -> goal's handle, its future result
        self._server = ActionServer(
            node,
            action_type,
            "~/run_policy",
            execute_callback=self._execute,
            goal_callback=self._on_goal,
            cancel_callback=self._on_cancel,
        )

    def finished(self, result: TaskResult) -> None:
        """Give the result of a task to its client, if it came from one."""
        _, future = self._goals.get(result.id, (None, None))
        if future is not None and not future.done():
            future.set_result(result)

    def progress(self, id: str, state: str, seconds: float) -> None:
        """Send feedback about the task that runs."""
        handle, _ = self._goals.get(id, (None, None))
        if handle is not None:
            message = self._type.Feedback()
            self._fields.fill_feedback(message, state, seconds)
            handle.publish_feedback(message)

    def _on_goal(self, goal: Any) -> GoalResponse:
        """Accept every valid goal; a task that cannot start has a result with the reason."""
        try:
            self._fields.task(goal, "")
        except ConfigError as error:
            self._node.get_logger().warning(f"Refused a goal: {error}")
            return GoalResponse.REJECT
        return GoalResponse.ACCEPT

    def _on_cancel(self, handle: Any) -> CancelResponse:
        self._cancel(_id_of(handle))
        return CancelResponse.ACCEPT

    async def _execute(self, handle: Any) -> Any:
        """Run a goal; this coroutine waits without a thread."""
        id = _id_of(handle)
        future = Future()
        self._goals[id] = (handle, future)
        task = self._fields.task(handle.request, id)
        if handle.is_cancel_requested:  # before it began
            result = TaskResult(id, task.instruction, Outcome.CANCELLED, "it was cancelled", 0.0)
        else:
            self._submit(task)
            result = await future
        del self._goals[id]
        if handle.is_cancel_requested:
            handle.canceled()
        elif result.outcome in (Outcome.SUCCESS, Outcome.TIME_LIMIT):
            handle.succeed()
        else:
            handle.abort()
        message = self._type.Result()
        self._fields.fill_result(message, result)
        return message


def _id_of(handle: Any) -> str:
    return str(uuid.UUID(bytes=bytes(handle.goal_id.uuid.tolist())))
