"""Tasks: one runs at a time, and each has one result."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.mode import Mode, State
from ceed_vla.ros_nodes.robot.tasks.runner import (
    Refusal,
    Task,
    TaskResult,
    TaskRunner,
    read_task,
)


class Robot:
    """Records what tasks do with it."""

    def __init__(self) -> None:
        self.state = State(Mode.DISABLED)
        self.refuses = ""
        self.passing = False
        self.instructions: list[str] = []

    def begin(self, instruction: str) -> Refusal | None:
        if self.refuses:
            return Refusal(self.refuses, self.passing)
        self.instructions.append(instruction)
        self.state = State(Mode.WAITING)
        return None

    def end(self) -> None:
        self.state = State(Mode.DISABLED)


@pytest.fixture
def robot() -> Robot:
    return Robot()


def ended(runner: TaskRunner, now: float) -> list[tuple[str, str, float]]:
    return [(one.id, one.outcome, one.seconds) for one in runner.advance(now)]


def test_a_task_ends_after_its_time(robot: Robot) -> None:
    runner = TaskRunner(robot, 0)
    assert runner.submit(Task("a", "wipe", 3.0), 10.0)
    assert ended(runner, 12.9) == []
    assert runner.elapsed(12.9) == pytest.approx(2.9)
    (result,) = runner.advance(13.05)
    assert result == TaskResult("a", "wipe", "time_limit", "its 3 s are over", 3.05)
    assert json.loads(result.json())["outcome"] == "time_limit"
    assert robot.state.mode is Mode.DISABLED
    assert runner.task is None


def test_a_task_is_cancelled_or_solved(robot: Robot) -> None:
    runner = TaskRunner(robot, 0)
    runner.submit(Task("a", "wipe"), 0.0)
    assert runner.cancel(1.0, "other") == 0
    assert runner.cancel(1.0) == 1
    assert robot.state.mode is Mode.DISABLED
    assert ended(runner, 1.0) == [("a", "cancelled", 1.0)]
    assert runner.cancel(2.0) == 0
    runner.submit(Task("b", "wipe"), 2.0)
    runner.solved(5.0)
    runner.solved(5.1)
    assert ended(runner, 5.2) == [("b", "success", 3.0)]


@pytest.mark.parametrize("mode", [Mode.STOPPED, Mode.DISABLED, Mode.INACTIVE, Mode.UNCONFIGURED])
def test_a_task_fails_if_motion_is_forbidden(robot: Robot, mode: Mode) -> None:
    runner = TaskRunner(robot, 0)
    runner.submit(Task("a", "wipe"), 0.0)
    for harmless in (Mode.HOLDING, Mode.GUIDED, Mode.MOVING, Mode.WAITING):
        robot.state = State(harmless)
        assert ended(runner, 1.0) == []
    robot.state = State(mode, "estop", "requested")
    (result,) = runner.advance(2.0)
    assert (result.outcome, result.reason) == ("failed", str(State(mode, "estop", "requested")))


def test_a_second_task_is_refused_or_waits(robot: Robot) -> None:
    runner = TaskRunner(robot, 0)
    runner.submit(Task("a", "wipe"), 0.0)
    assert not runner.submit(Task("b", "cook"), 1.0)
    (result,) = runner.advance(1.0)
    assert (result.id, result.outcome) == ("b", "refused")
    assert result.reason == "the task 'wipe' runs"
    queueing = TaskRunner(robot, 2)
    assert [queueing.submit(Task(id, f"do {id}", 1.0), 0.0) for id in "abcd"] == [1, 1, 1, 0]
    assert queueing.waiting == 2
    assert ended(queueing, 0.0) == [("d", "refused", 0.0)]
    assert queueing.cancel(0.5, "c") == 1
    assert ended(queueing, 1.0) == [("c", "cancelled", 0.0), ("a", "time_limit", 1.0)]
    assert queueing.task is None  # the arm comes to rest
    assert ended(queueing, 1.6) == []
    assert queueing.task == Task("b", "do b", 1.0)
    assert ended(queueing, 2.6) == [("b", "time_limit", 1.0)]
    assert robot.instructions[-2:] == ["do a", "do b"]


def test_tasks_that_come_while_the_arm_settles_do_not_take_the_queues_place(robot: Robot) -> None:
    runner = TaskRunner(robot, 1)
    runner.submit(Task("a", "wipe"), 0.0)
    runner.cancel(1.0)
    assert [runner.submit(Task(id, "wipe"), 1.1) for id in "bcd"] == [True, True, False]
    assert ended(runner, 1.6) == [("a", "cancelled", 1.0), ("d", "refused", 0.0)]
    assert runner.task == Task("b", "wipe")
    assert runner.waiting == 1


def test_a_failure_ends_the_tasks_that_wait(robot: Robot) -> None:
    runner = TaskRunner(robot, 2)
    for id in "abc":
        runner.submit(Task(id, f"do {id}"), 0.0)
    robot.state = State(Mode.DISABLED)
    assert ended(runner, 1.0) == [
        ("a", "failed", 1.0),
        ("b", "cancelled", 0.0),
        ("c", "cancelled", 0.0),
    ]
    assert ended(runner, 9.0) == []
    assert robot.instructions == ["do a"]


def test_a_task_waits_for_the_arm_to_settle(robot: Robot) -> None:
    runner = TaskRunner(robot, 0)
    robot.refuses = "unsettled_pose: it jumps"
    robot.passing = True
    assert runner.submit(Task("a", "wipe"), 0.0)
    assert not runner.submit(Task("b", "wipe"), 0.0)
    assert ended(runner, 1.0) == [("b", "refused", 0.0)]
    robot.refuses = ""
    assert ended(runner, 2.0) == []
    assert runner.task == Task("a", "wipe")
    runner.cancel(3.0)
    robot.refuses = "unsettled_pose: it jumps"
    runner.submit(Task("c", "wipe"), 3.0)
    assert ended(runner, 4.0) == [("a", "cancelled", 1.0)]
    assert ended(runner, 8.1) == [("c", "refused", 0.0)]


def test_a_robot_that_cannot_move_refuses(robot: Robot) -> None:
    robot.refuses = "estop: the emergency stop is latched (disabled)"
    runner = TaskRunner(robot, 3)
    assert not runner.submit(Task("a", "wipe"), 0.0)
    (result,) = runner.advance(0.0)
    assert (result.outcome, result.reason) == ("refused", robot.refuses)


def test_messages() -> None:
    assert read_task("put the cube in the bin") == Task("", "put the cube in the bin")
    text = '{"instruction": "wipe", "time_limit": 30, "id": "7"}'
    assert read_task(text) == Task("7", "wipe", 30.0)
    for wrong, message in (
        ("", "it is empty"),
        ("{", "is no JSON"),
        ('{"instruction": "wipe", "limit": 3}', "has 'limit'; a task has id, instruction"),
        ('{"time_limit": 3}', "must be strings"),
        ('{"instruction": "wipe", "time_limit": -1}', r"must lie in \[0, 86400\] s"),
        ('{"instruction": "wipe", "time_limit": "3"}', "give a number of seconds"),
        ('{"instruction": "wipe", "time_limit": NaN}', r"must lie in \[0, 86400\] s"),
        ("x" * 501, "instruction is invalid"),
        ("x" * 10_001, "has 10001 characters"),
        ('{"instruction": "wipe", "time_limit": 1' + "0" * 400 + "}", "give a number of seconds"),
        ('{"a":' + "[" * 5000, "is no JSON"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_task(wrong)


def test_an_operator_who_forbids_motion_cancels_what_waits(robot: Robot) -> None:
    runner = TaskRunner(robot, 2)
    for name, limit in (("a", 1.0), ("b", 0.0), ("c", 0.0)):
        runner.submit(Task(name, "wipe", limit), 0.0)
    assert ended(runner, 1.0) == [("a", "time_limit", 1.0)]
    runner.forbid(1.2, "an operator forbade motion")  # in the pause before the next task
    assert ended(runner, 9.0) == [("b", "cancelled", 0.0), ("c", "cancelled", 0.0)]
    assert robot.instructions == ["wipe"]
    assert robot.state.mode is Mode.DISABLED
    runner.submit(Task("d", "sweep"), 10.0)
    runner.forbid(11.0, "an operator forbade motion")
    assert ended(runner, 11.0) == [("d", "failed", 1.0)]


def test_simulated_time_may_go_back(robot: Robot) -> None:
    runner = TaskRunner(robot, 1)
    runner.submit(Task("a", "wipe", 3.0), 500.0)
    runner.submit(Task("b", "wipe", 3.0), 501.0)
    assert ended(runner, 501.5) == []
    assert ended(runner, 0.0) == []  # the simulator starts again
    assert runner.elapsed(0.0) == pytest.approx(1.5)
    assert ended(runner, 1.5) == [("a", "time_limit", 3.0)]
    assert ended(runner, 2.1) == []
    assert runner.task is not None
    assert runner.task.id == "b"
