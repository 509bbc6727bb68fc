"""Guidance by velocities of the tool: straight, within the limits of joints and workspace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from ceed_vla.kinematics import Array, matrix_rpy, turn_vector
from ceed_vla.ros_nodes.robot.controller_guides import Guides
from ceed_vla.ros_nodes.robot.intervention.base import Wish
from ceed_vla.ros_nodes.robot.intervention.patience import Patience
from ceed_vla.ros_nodes.robot.intervention.person import Person
from ceed_vla.ros_nodes.robot.intervention.twist_guide import (
    TwistGuide,
    largest_share,
    stoppable,
)
from ceed_vla.ros_nodes.robot.kinematics import ModelArm
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_setup import arm_model, safety_limits
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.ros_nodes.robot.safety import JOINT_STATES, SafetyFilter

TABLETOP = load_robot_config()
FAST = np.full(7, 3.0)
DT = 0.01
HOME = np.array(TABLETOP.arm.home)


class Arm:
    """The tabletop arm, which a person guides through the safety filter and which follows exactly.

    Args:
        acceleration: Limit of all joints [rad/s^2]; None without one.
    """

    def __init__(self, acceleration: float | None) -> None:
        model = arm_model(TABLETOP)
        assert model is not None
        self.model = model
        interface = TABLETOP.interfaces["forward_position"]
        limits = safety_limits(TABLETOP, interface, model, (), defaults(POLICY_PARAMETERS))
        brake = None if acceleration is None else np.full(7, acceleration)
        self.filter = SafetyFilter(replace(limits, max_acceleration=brake))
        self.now = 0.0
        self.commands = [HOME]
        for _ in range(40):
            self.measure(HOME)
        assert self.filter.enable(0.0) is None
        self.filter.command(HOME, dt=DT, ages={JOINT_STATES: 0.0})
        guide = TwistGuide(model, TABLETOP.action.pose, limits.max_velocity, brake)
        self.person = Person(guide, Patience(0.25, 0.5, False))
        self.guides = Guides(self.filter, self.person)

    def measure(self, joints: Array) -> None:
        self.now += DT
        self.filter.measure(TABLETOP.arm.joints, joints.tolist(), self.now)

    def move(self, twist: Array, time: float) -> Array:
        """Guide with a twist (6,) and return the positions (N, 3) of the tool [m]."""
        positions = []
        for _ in range(round(time / DT)):
            self.person.take(Wish(True, twist=twist), self.now)
            self.guides.update(self.now)
            decision = self.guides.command(DT, {JOINT_STATES: 0.0}, None)
            assert decision.hold is None
            assert decision.positions is not None
            self.commands.append(decision.positions)
            self.measure(decision.positions)
            positions.append(self.model.pose(decision.positions)[0])
        return np.array(positions)

    @property
    def accelerations(self) -> Array:
        """Those of all commands (N, J) [rad/s^2]."""
        return np.diff(self.commands, 2, axis=0) / DT**2


def twist(axis: int, speed: float) -> Array:
    return speed * np.eye(6)[axis]


def outside(positions: Array) -> float:
    """Return how far positions (N, 3) leave the workspace [m]."""
    limits = TABLETOP.action.pose
    assert limits is not None
    over = np.maximum(positions - limits.workspace_high, limits.workspace_low - positions)
    return float(over.max())


def test_twists_move_the_tool_and_stay_in_the_workspace() -> None:
    model = arm_model(TABLETOP)
    assert model is not None
    limits = TABLETOP.action.pose
    guide = TwistGuide(model, limits, FAST, None)
    last = np.array(TABLETOP.arm.home)
    guide.begin(last)
    start, turned = model.pose(last)
    moving = Wish(True, twist=np.array([0.1, -0.05, 0.0, 0.0, 0.0, 0.0]))
    for _ in range(100):
        command = guide.command(moving, last, 0.01)
        assert np.abs(command - last).max() < 0.01
        last = command
    end, after = model.pose(last)
    np.testing.assert_allclose(end - start, [0.1, -0.05, 0.0], atol=0.001)
    np.testing.assert_allclose(after, turned, atol=0.01)
    np.testing.assert_array_equal(guide.command(Wish(False, twist=np.zeros(6)), last, 0.01), last)
    for _ in range(1000):
        last = guide.command(moving, last, 0.01)
    assert limits is not None
    reached = model.pose(last)[0]
    assert np.all(reached <= limits.workspace_high + 0.01)
    assert np.all(reached >= limits.workspace_low - 0.01)


def test_twists_do_not_run_ahead_of_a_blocked_arm() -> None:
    model = arm_model(TABLETOP)
    assert model is not None
    guide = TwistGuide(model, TABLETOP.action.pose, FAST, None)
    last = np.array(TABLETOP.arm.home)
    guide.begin(last)
    for _ in range(100):  # the filter lets no command through
        guide.command(Wish(True, twist=np.array([0.25, 0, 0, 0, 0, 0.0])), last, 0.01)
    back = guide.command(Wish(True, twist=np.array([-0.02, 0, 0, 0, 0, 0.0])), last, 0.01)
    moved = model.pose(back)[0] - model.pose(last)[0]
    np.testing.assert_allclose(moved, [-0.0002, 0.0, 0.0], atol=1e-4)


def test_a_clock_that_stands_still_leaves_no_trace() -> None:
    arm = Arm(2.0)
    arm.move(twist(0, 0.1), 0.2)
    for dt in (0.0, -0.01, float("nan")):
        decision = arm.guides.command(dt, {JOINT_STATES: 0.0}, None)
        assert decision.hold is not None
        assert decision.hold.code == "clock"
    moved = arm.move(twist(0, 0.1), 1.0)
    np.testing.assert_allclose((moved[-1] - moved[-31]) / 0.3, [0.1, 0.0, 0.0], atol=1e-3)


@pytest.mark.parametrize("acceleration", [None, 2.0, 8.0])
@pytest.mark.parametrize(("axis", "speed"), [(0, 0.1), (1, -0.1), (2, -0.1), (2, -0.02)])
def test_the_tool_reaches_its_speed_on_a_straight_line(
    axis: int, speed: float, acceleration: float | None
) -> None:
    arm = Arm(acceleration)
    start, turned = arm.model.pose(HOME)
    moved = arm.move(twist(axis, speed), 1.0) - start
    np.testing.assert_allclose((moved[-1] - moved[-31]) / 0.3, twist(axis, speed)[:3], atol=1e-3)
    stopped = arm.move(np.zeros(6), 0.6) - start
    assert np.all(np.sign(speed) * np.diff(stopped[:, axis]) >= -1e-9)
    np.testing.assert_array_equal(stopped[-1], stopped[-2])
    aside = np.delete(np.concatenate([moved, stopped]), axis, 1)
    assert np.abs(aside).max() < 5e-4
    np.testing.assert_allclose(arm.model.pose(arm.commands[-1])[1], turned, atol=2e-3)
    if acceleration is not None:
        assert np.abs(arm.accelerations).max() <= acceleration + 1e-6


@pytest.mark.parametrize("acceleration", [None, 2.0, 8.0])
@pytest.mark.parametrize("axis", [0, 2])
def test_reversals_stay_in_the_workspace(axis: int, acceleration: float | None) -> None:
    arm = Arm(acceleration)
    for sign in (-1.0, 1.0) * 4:
        assert outside(arm.move(twist(axis, 0.25 * sign), 0.5)) < 1e-3


@pytest.mark.parametrize("acceleration", [2.0, 8.0])
def test_the_tool_stops_at_every_edge(acceleration: float) -> None:
    limits = TABLETOP.action.pose
    assert limits is not None
    for axis in range(6):
        for sign in (-1.0, 1.0):
            arm = Arm(acceleration)
            assert outside(arm.move(twist(axis, sign * (0.25 if axis < 3 else 1.0)), 4.0)) < 1e-3
            position, matrix = arm.model.pose(arm.commands[-1])
            pose = np.concatenate([position, matrix_rpy(matrix)])
            low = [*limits.workspace_low, -limits.max_tilt, -limits.max_tilt, -limits.max_yaw]
            high = [*limits.workspace_high, limits.max_tilt, limits.max_tilt, limits.max_yaw]
            assert pose[axis] == pytest.approx((low if sign < 0.0 else high)[axis], abs=0.01)


@pytest.mark.parametrize("acceleration", [None, 2.0, 8.0])
def test_any_motion_stays_near_the_workspace(acceleration: float | None) -> None:
    limits = TABLETOP.action.pose
    assert limits is not None
    random = np.random.default_rng(3)
    arm = Arm(acceleration)
    for _ in range(15):
        wish = random.uniform(-1.0, 1.0, 6) * [0.25, 0.25, 0.25, 1.0, 1.0, 1.0]
        assert outside(arm.move(wish, random.uniform(0.2, 1.2))) < 0.02
        tilt = np.abs(matrix_rpy(arm.model.pose(arm.commands[-1])[1])[:2]).max()
        assert tilt < limits.max_tilt + 0.05
    if acceleration is not None:
        assert np.abs(arm.accelerations).max() <= acceleration + 1e-6


FIVE = """<mujoco><compiler angle="radian"/><worldbody>
<body pos="0 0 0.05"><joint name="pan" axis="0 0 1" range="-1.9 1.9"/><geom size="0.02"/>
<body pos="0 0 0.06"><joint name="lift" axis="0 1 0" range="-1.7 1.7"/><geom size="0.02"/>
<body pos="0 0 0.12"><joint name="elbow" axis="0 1 0" range="-2.2 2.2"/><geom size="0.02"/>
<body pos="0 0 0.13"><joint name="flex" axis="0 1 0" range="-1.7 1.7"/><geom size="0.02"/>
<body pos="0 0 0.06"><joint name="roll" axis="0 0 1" range="-2.7 2.7"/><geom size="0.02"/>
<site name="tcp" pos="0 0 0.1"/></body></body></body></body></body></worldbody></mujoco>"""


@pytest.mark.parametrize("acceleration", [None, 3.0])
def test_a_tool_that_points_down_turns_both_ways(
    tmp_path: Path, acceleration: float | None
) -> None:
    file = tmp_path / "arm.xml"
    file.write_text(FIVE)
    home = np.array([0.0, -0.3, 1.9, np.pi - 1.6, 0.0])  # roll and yaw are at half a turn
    arm = ModelArm(file, "tcp", ("pan", "lift", "elbow", "flex", "roll"), home=home.tolist())
    for sign in (-1.0, 1.0):
        brake = None if acceleration is None else np.full(5, acceleration)
        guide = TwistGuide(arm, None, np.full(5, 3.0), brake)
        guide.begin(home)
        joints = home
        for _ in range(100):
            request = guide.command(Wish(True, twist=twist(5, 0.5 * sign)), joints, DT)
            way = request - joints
            speed = np.abs(way) / DT
            if brake is not None:  # as the filter, which stops at the request
                speed = np.sqrt((brake * DT) ** 2 + 2.0 * brake * np.abs(way)) - brake * DT
            joints = joints + np.sign(way) * speed * DT
        turned = turn_vector(arm.pose(joints)[1] @ arm.pose(home)[1].T)
        assert 0.4 < sign * turned[2] <= 0.51


def test_speeds_that_stop_in_time() -> None:
    brake = np.full(3, 2.0)
    speeds = stoppable(np.array([-1.0, 0.0, 0.5]), brake, DT)
    np.testing.assert_array_equal(speeds[:2], 0.0)
    way, speed = 0.0, speeds[2]
    while speed > 0.0:
        way += speed * DT
        speed -= brake[2] * DT
    assert 0.47 < way <= 0.5


def test_the_largest_share_of_a_velocity() -> None:
    change = np.array([0.1, 0.1])
    assert largest_share(np.array([1.0, 0.5]), np.array([1.0, 0.5]), change) == 1.0
    assert largest_share(np.array([1.0, 0.5]), np.zeros(2), change) == pytest.approx(0.1)
    assert largest_share(np.zeros(2), np.array([0.05, -0.1]), change) == 1.0
    assert largest_share(np.zeros(2), np.array([0.05, -0.2]), change) is None
    assert largest_share(np.array([1.0, -1.0]), np.array([0.5, 0.5]), change) is None
