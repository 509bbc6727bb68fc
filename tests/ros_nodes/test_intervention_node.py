"""A person takes over from the policy node with a twist device, and the recorder flags it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from geometry_msgs.msg import TwistStamped
from pyarrow.parquet import read_table
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from ceed_vla.ros_nodes.robot.messages import COMMAND, LATCHED, seconds
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from tests.ros_nodes.conftest import Status

ROBOT = load_robot_config()
DEVICE = "\nintervention: {kind: twist, topic: mouse, linear: 0.3, release: 0.1}\n"


class Mouse:
    """A twist device at 50 Hz.

    Attributes:
        speed: Sent velocity along x [m/s]; None while it sends nothing.
    """

    def __init__(self, graph: Any) -> None:
        self.speed: float | None = 0.0
        self._publisher = graph.node.create_publisher(TwistStamped, "/mouse", COMMAND)
        graph.node.create_timer(0.02, self.send)

    def send(self) -> float:
        """Send now; return the time [s]."""
        if self.speed is not None:
            message = TwistStamped()
            message.twist.linear.x = self.speed
            self._publisher.publish(message)
        return time.monotonic()


class Handovers:
    """The simulated robot, driven by the shipped student, and a person with a mouse."""

    def __init__(self, graph: Any) -> None:
        assert ROBOT.arm.model is not None
        file = graph.folder / "robot.yaml"
        text = ROBOT.source.read_text().replace("tabletop_arm.xml", str(ROBOT.arm.model))
        file.write_text(text + DEVICE)
        self.graph = graph
        self.commands: list[tuple[float, JointState]] = []
        self._measured: set[tuple[float, ...]] = set()  # poses of the arm [rad]
        graph.node.create_subscription(JointState, "/policy/commanded", self._hear, COMMAND)
        graph.node.create_subscription(JointState, "/joint_states", self._see, 1000)
        self.mouse = Mouse(graph)
        self.status = Status(graph)
        graph.start("s", "-p", "seed:=2")
        self.parameters = ["-p", f"robot_config:={file}", "-p", "autostart:=true"]
        graph.start("p", *self.parameters, "-p", "engine:=eager")
        self.status.state("moving")

    def _hear(self, message: JointState) -> None:
        self.commands.append((time.monotonic(), message))

    def _see(self, message: JointState) -> None:
        positions = dict(zip(message.name, message.position, strict=True))
        self._measured.add(tuple(positions[name] for name in ROBOT.arm.joints))

    def wait(self, source: str, since: float) -> float:
        """Time until the first command of a source [s]."""

        def first() -> float | None:
            found = (at for at, m in self.commands if at >= since and m.header.frame_id == source)
            return next(found, None)

        return float(self.graph.wait(first, f"commands of {source}")) - since

    def measure(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Take over and give back; return the times until each side commands [s], (count,) each."""
        taken, given = [], []
        for index in range(count):
            self.mouse.speed = 0.05 if index % 2 else -0.05
            taken.append(self.wait("person", self.mouse.send()))
            self.graph.spin(0.15 + 0.01 * (index % 7))
            self.mouse.speed = 0.0
            given.append(self.wait("policy", self.mouse.send()))
            self.graph.spin(0.2)
        return np.array(taken), np.array(given)

    def jumps(self) -> np.ndarray:
        """Largest speed of a joint between successive commands (T,), as a share of its limit.

        Restarts at a measured pose do not count: a busy simulation executes commands so late that
        the arm is further than `limits.step` from them, and motion then goes on from the arm.
        """
        messages = [message for _, message in self.commands]
        stamps = np.array([seconds(message.header.stamp) for message in messages])
        joints = np.array([list(message.position)[:7] for message in messages])
        passed = np.maximum(np.diff(stamps), 0.01)[:, None]
        speeds = np.max(np.abs(np.diff(joints, axis=0)) / passed / ROBOT.limits.velocity, axis=1)
        holds = np.array([message.header.frame_id == "hold" for message in messages[1:]])
        restarts = np.flatnonzero(holds & (speeds > 0.0))
        measured = np.array(sorted(self._measured))  # without those that a busy test missed
        away = [np.abs(measured - pose).max(axis=1).min() for pose in joints[restarts + 1]]
        assert max(away, default=0.0) < 0.1
        return np.delete(speeds, restarts)


class Recorder:
    """A record node of the same robot."""

    def __init__(self, cell: Handovers, root: Path) -> None:
        self.graph = cell.graph
        self.states: list[String] = self.graph.listen("/record/state", String, LATCHED)
        words = ["-p", f"root:={root}", "-r", "~/instruction:=/policy/instruction"]
        self.graph.start("r", *cell.parameters, *words)
        self.wait("idle")
        assert self.graph.call("/record/start", Trigger).success

    def wait(self, state: str) -> None:
        self.graph.wait(lambda: self.states and self.states[-1].data.startswith(state), state, 120)

    def stop(self) -> None:
        assert self.graph.call("/record/stop", SetBool, SetBool.Request(data=True)).success
        self.wait("idle: stored")


@pytest.mark.realtime
def test_handovers_are_quick_and_without_a_jump(graph: Any, tmp_path: Path) -> None:
    cell = Handovers(graph)
    recorder = Recorder(cell, tmp_path / "data")
    taken, given = cell.measure(8)
    recorder.stop()
    table = read_table(next((tmp_path / "data" / "data").rglob("*.parquet")))
    flags = np.array(table["intervention"].to_pylist())
    by_person = [m.header.frame_id == "person" for _, m in cell.commands]
    assert 0.2 * np.mean(by_person) < flags.mean() < 1.0
    assert not flags.all()
    assert taken.max() < 0.5  # a busy machine; docs/reports has the measurement
    assert given.max() < 2.0
    assert cell.jumps().max() < 1.3
    cell.mouse.speed = 0.05
    cell.wait("person", cell.mouse.send())
    cell.mouse.speed = None
    held = cell.status.state("holding", "intervention: the device sent nothing for 0.25 s")
    assert held["intervention"] == "nobody"
    count = len(cell.commands)
    graph.spin(1.0)
    assert {message.header.frame_id for _, message in cell.commands[count:]} == {"hold"}
    cell.mouse.speed = 0.0
    graph.spin(0.5)
    cell.mouse.speed = 0.05
    cell.wait("person", cell.mouse.send())
    cell.mouse.speed = 0.0
    cell.status.state("moving")
    cell.mouse.speed = float("nan")
    graph.spin(0.5)
    cell.status.state("moving")  # a device that is not in charge disturbs nobody
