"""Tasks of a policy node with the simulated robot: by topic, by the command line, by an action."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from rclpy.action import ActionClient
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from ceed_vla.ros_nodes.robot.messages import COMMAND
from ceed_vla.ros_nodes.robot.mode import Mode, State
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.ros_nodes.robot.tasks.action import TaskAction
from ceed_vla.ros_nodes.robot.tasks.runner import (
    Outcome,
    Refusal,
    Task,
    TaskResult,
    TaskRunner,
)
from ceed_vla.ros_nodes.robot.tasks.topics import RESULTS
from tests.ros_nodes.conftest import ROOT, Status

WORDS = "put the blue cube on the plate"


class Tasks:
    """A policy node that gives results of tasks."""

    def __init__(self, graph: Any, *parameters: str) -> None:
        self.graph = graph
        self.results: list[dict[str, Any]] = []
        graph.node.create_subscription(
            String,
            "/policy/task_result",
            lambda m: self.results.append(json.loads(m.data)),
            RESULTS,
        )
        self.commands = graph.listen("/policy/commanded", JointState, COMMAND)
        self._publisher = graph.node.create_publisher(String, "/policy/task", COMMAND)
        graph.start("s", "-p", "seed:=1", "-p", "publish_instruction:=false")
        given = ["autostart:=true", "start_enabled:=false", "engine:=eager", *parameters]
        graph.start("p", *(word for one in given for word in ("-p", one)))
        self.status = Status(graph)
        graph.wait(lambda: self._publisher.get_subscription_count(), "the policy node")
        self.status.wait(lambda _, values: values.get("state") == "disabled", "the loaded policy")

    def _hear(self, message: String) -> None:
        self.results.append(json.loads(message.data))

    def submit(self, **fields: Any) -> None:
        self._publisher.publish(String(data=json.dumps(fields)))

    def result(self, id: str, timeout: float = 60.0) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            return next((one for one in self.results if one["id"] == id), None)

        one = self.graph.wait(found, f"the result of {id}", timeout)
        assert isinstance(one, dict)
        return one


@pytest.mark.realtime
def test_tasks_by_topic_and_from_a_shell(graph: Any) -> None:
    tasks = Tasks(graph, "task_queue:=1", "success_topic:=sim/success")
    tasks.submit(id="a", instruction=WORDS, time_limit=1.0)
    tasks.submit(id="b", instruction=WORDS)
    tasks.submit(id="c", instruction=WORDS)
    assert tasks.result("c")["outcome"] == "refused"
    first = tasks.result("a")
    assert first["outcome"] == "time_limit"
    assert first["seconds"] == pytest.approx(1.0, abs=0.3)
    sent = len(tasks.commands)
    graph.wait(lambda: len(tasks.commands) > sent + 10, "motion of the second task")
    assert graph.call("/policy/cancel_task", Trigger).success, tasks.results
    assert tasks.result("b")["outcome"] == "cancelled"
    graph.spin(0.3)
    sent = len(tasks.commands)
    graph.spin(0.5)
    assert len(tasks.commands) == sent  # the arm is not commanded any more
    tasks.submit(id="d", instruction="x" * 600)
    graph.wait(lambda: tasks.results[-1]["id"] == "", "the refusal of a bad task")
    assert "is invalid" in tasks.results[-1]["reason"]
    tasks.submit(id="f", instruction=WORDS, time_limit=1.5)
    sent = len(tasks.commands)
    graph.wait(lambda: len(tasks.commands) > sent + 60, "motion of the task")
    assert graph.call("/policy/go_home", Trigger).success
    assert "~/go_home" in tasks.result("f")["reason"]  # and not later, which would stop the arm
    home = pytest.approx(load_robot_config().arm.home, abs=1e-3)
    graph.wait(lambda: list(tasks.commands[-1].position[:7]) == home, "the arm at home")
    command = [sys.executable, "-m", "ceed_vla.cli", "run", WORDS, "--time_limit", "60"]
    environment = os.environ | {"ROS_DOMAIN_ID": str(graph.domain), "PYTHONPATH": str(ROOT)}
    with (graph.folder / "shell.txt").open("w") as output:
        shell = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    graph.wait(lambda: shell.poll() is not None, "ceed-vla run", 120)
    said = (graph.folder / "shell.txt").read_text()
    assert shell.returncode == 0, said
    assert "moving" in said
    assert "success after" in said or "time_limit after" in said
    graph.call("/policy/estop", Trigger)
    tasks.submit(id="e", instruction=WORDS)
    refused = tasks.result("e")
    assert (refused["outcome"], refused["reason"][:6]) == ("refused", "estop:")


class Numbers:
    """Tasks in an action that ships with ROS: the order is the time limit in tenths of seconds."""

    def task(self, goal: Any, id: str) -> Task:
        return Task(id, "count", 0.1 * goal.order)

    def fill_result(self, message: Any, result: TaskResult) -> None:
        message.sequence = [len(result.outcome), round(10 * result.seconds)]

    def fill_feedback(self, message: Any, state: str, seconds: float) -> None:
        message.sequence = [round(10 * seconds)]


class Free:
    """A robot that always moves."""

    state = State(Mode.MOVING)

    def begin(self, instruction: str) -> Refusal | None:
        return None

    def end(self) -> None:
        """Nothing holds it."""


@pytest.fixture
def served(graph: Any) -> Iterator[tuple[Any, Any]]:
    """An action client, and a server of tasks in the same process."""
    fibonacci = pytest.importorskip("test_msgs.action", reason="ros-test-msgs").Fibonacci
    runner = TaskRunner(Free(), 1)

    def now() -> float:
        return 1e-9 * float(graph.node.get_clock().now().nanoseconds)

    def advance() -> None:
        for result in runner.advance(now()):
            server.finished(result)
        if runner.task is not None:
            server.progress(runner.task.id, "moving", runner.elapsed(now()))

    server = TaskAction(
        graph.node,
        fibonacci,
        Numbers(),
        lambda task: runner.submit(task, now()),
        lambda id: runner.cancel(now(), id),
    )
    graph.node.create_timer(0.02, advance)
    client = ActionClient(graph.node, fibonacci, "~/run_policy")
    graph.wait(client.server_is_ready, "the action server")
    yield graph, client
    client.destroy()


def goal(served: tuple[Any, Any], order: int, feedback: list[int] | None = None) -> Any:
    graph, client = served
    heard = [] if feedback is None else feedback
    sent = client.send_goal_async(
        client._action_type.Goal(order=order),
        feedback_callback=lambda m: heard.extend(m.feedback.sequence),
    )
    graph.wait(sent.done, "the answer to a goal")
    return sent.result()


def result_of(served: tuple[Any, Any], handle: Any) -> tuple[int, list[int]]:
    future = handle.get_result_async()
    served[0].wait(future.done, "the result of a goal")
    return future.result().status, list(future.result().result.sequence)


def test_an_action_is_a_task(served: tuple[Any, Any]) -> None:
    feedback: list[int] = []
    status, (outcome, tenths) = result_of(served, goal(served, 5, feedback))
    assert (status, outcome) == (4, len(Outcome.TIME_LIMIT))  # succeeded
    assert tenths in (5, 6)
    assert feedback == sorted(feedback)
    assert max(feedback) >= 3
    assert not goal(served, -1).accepted
    running, waiting, third = (goal(served, order) for order in (600, 600, 600))
    assert result_of(served, third) == (6, [len(Outcome.REFUSED), 0])  # aborted
    for handle in (waiting, running):
        cancelled = handle.cancel_goal_async()
        served[0].wait(cancelled.done, "the cancellation")
        assert result_of(served, handle)[0] == 5  # cancelled
    status, _ = result_of(served, goal(served, 1))
    assert status == 4


@pytest.mark.external  # with the variables that scripts/build_interfaces.sh prints
@pytest.mark.skipif(not find_spec("ceed_vla_interfaces"), reason="ceed_vla_interfaces is not built")
def test_the_nodes_own_action(graph: Any) -> None:
    from ceed_vla_interfaces.action import RunPolicy

    tasks = Tasks(graph)
    client = ActionClient(graph.node, RunPolicy, "/policy/run_policy")
    graph.wait(client.server_is_ready, "the action server")
    states: list[str] = []

    def send(time_limit: float) -> Any:
        sent = client.send_goal_async(
            RunPolicy.Goal(instruction=WORDS, time_limit=time_limit),
            feedback_callback=lambda m: states.append(m.feedback.state),
        )
        graph.wait(sent.done, "the answer to a goal")
        return sent.result()

    def result(handle: Any) -> tuple[int, Any]:
        future = handle.get_result_async()
        graph.wait(future.done, "the result of a goal")
        return future.result().status, future.result().result

    assert not send(-1.0).accepted
    status, ended = result(send(3.0))
    assert (status, ended.success, ended.outcome) == (4, False, "time_limit")
    assert 3.0 <= ended.seconds < 4.0
    assert any(state.startswith("moving") for state in states)
    assert tasks.results[-1]["outcome"] == "time_limit"
    handle = send(60.0)
    cancelled = handle.cancel_goal_async()
    graph.wait(cancelled.done, "the cancellation")
    status, ended = result(handle)
    assert (status, ended.success, ended.outcome) == (5, False, "cancelled")
    client.destroy()
