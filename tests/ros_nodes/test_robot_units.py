"""A robot's file in other units than radians and metres.

Joints, grippers, velocities and efforts are mapped to the policy's units and back.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from builtin_interfaces.msg import Time
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from sensor_msgs.msg import JointState

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.images import decode
from ceed_vla.ros_nodes.robot.messages import array_to_image
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.policy_setup import check_fit
from ceed_vla.ros_nodes.robot.robot_config import Arm
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.serving.predictor import PolicySpec
from tests.helpers.robot_yaml import CONFIG, write


def example(**changes: Any) -> dict[str, Any]:
    """Return the example of a real arm; `changes` are merged into its parts."""
    values = yaml.safe_load((CONFIG / "real_arm_example.yaml").read_text())
    for part, change in changes.items():
        values[part] |= change
    return values


@given(
    sign=st.lists(st.sampled_from([-1, 1]), min_size=6, max_size=6),
    scale=st.lists(st.floats(1e-3, 10.0), min_size=6, max_size=6),
    offset=st.lists(st.floats(-6.0, 6.0), min_size=6, max_size=6),
    at=st.lists(st.floats(-3.0, 3.0), min_size=6, max_size=6),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_joints_go_to_the_policys_units_and_back(
    sign: list[int], scale: list[float], offset: list[float], at: list[float]
) -> None:
    arm_of = Arm(None, "", tuple("abcdef"), (), "rad", tuple(sign), tuple(scale), tuple(offset))
    there = arm_of.units.theirs(np.array(at))
    np.testing.assert_allclose(arm_of.units.ours(there), at, atol=1e-9)
    np.testing.assert_allclose(there * np.array(scale) * np.array(sign) + offset, at, atol=1e-9)


def test_an_offset_far_beyond_the_limits_is_refused(tmp_path: Path) -> None:
    values = example(
        arm={"offset": [100.0] * 6}, limits={"position": {"low": [0.0] * 6, "high": [1e-6] * 6}}
    )
    with pytest.raises(ConfigError, match=r"arm.offset is too large for scale"):
        load_robot_config(write(tmp_path, values))


def test_so_101_joints_of_minus_100_to_100(tmp_path: Path) -> None:
    change = {
        "sign": [1, -1, 1, 1, 1, 1],
        "scale": [0.0192] * 6,
        "offset": [0.0, 0.1, 0.0, 0.0, 0.0, 0.0],
    }
    values = example(arm=change)
    del values["arm"]["unit"]
    robot = load_robot_config(write(tmp_path, values))
    motion = Motion(robot)
    motion.restart(np.zeros(6), 0.02)
    motion.advance(np.array([100.0, 100.0, 0.0, 0.0, 0.0, -50.0, 0.05]))
    np.testing.assert_allclose(motion.joints, [1.92, -1.82, 0.0, 0.0, 0.0, -0.96])
    values["action"]["kind"] = "joint_delta"
    motion = Motion(load_robot_config(write(tmp_path, values)))
    motion.restart(np.full(6, 0.5), 0.02)
    motion.advance(np.array([10.0, 10.0, 0.0, 0.0, 0.0, 0.0, 0.05]))
    np.testing.assert_allclose(motion.joints, [0.692, 0.308, 0.5, 0.5, 0.5, 0.5])


def test_a_gripper_that_counts_the_other_way(tmp_path: Path) -> None:
    """Robotiq: the joint is 0 when it is open; the policy's range is 0 to 100."""
    change = {"opening_scale": -0.10625, "opening_offset": 0.085, "command": "joint"}
    values = example(gripper=change | {"action_scale": 0.00085, "action_offset": 0.0})
    robot = load_robot_config(write(tmp_path, values))
    gripper = robot.gripper
    assert gripper is not None
    assert gripper.measured.ours(0.0) == pytest.approx(0.085)
    assert gripper.measured.ours(0.8) == pytest.approx(0.0)
    assert gripper.told(0.0) == pytest.approx(0.8)
    assert gripper.told(0.085) == pytest.approx(0.0)
    assert gripper.policy.theirs(gripper.policy.ours(37.0)) == pytest.approx(37.0)
    motion = Motion(robot)
    motion.restart(np.zeros(6), 0.085)
    motion.advance(np.array([0.0] * 6 + [50.0]))
    assert motion.gripper == pytest.approx(0.0425)
    observations = Observations(robot, {}, {"observation.state": 7}, None)
    state = JointState(name=[*robot.arm.joints, "finger_joint"], position=[0.1] * 6 + [0.4])
    observations.take_joints(state)
    assert observations.snapshot(motion)["observation.state"][-1] == pytest.approx(50.0)


def test_velocities_and_efforts_are_parts_of_states_and_crops_of_images(tmp_path: Path) -> None:
    values = example(
        state={"observation.state": ["joint_positions", "joint_velocities", "joint_efforts"]}
    )
    camera = "observation.images.front"
    values["images"][camera] |= {"crop": [2, 1, 4, 5], "resize": False}
    robot = load_robot_config(write(tmp_path, values))
    observations = Observations(robot, {camera: (3, 4, 5)}, {"observation.state": 18}, None)
    state = JointState(name=[*robot.arm.joints, "finger_joint"], position=[0.1] * 7)
    state.velocity, state.effort = [1.0] * 6 + [9.0], [2.0] * 6 + [9.0]
    observations.take_joints(state)
    pixels = np.arange(8 * 7 * 3, dtype=np.uint8).reshape(8, 7, 3)
    take = observations.cameras[0].take
    take(serialize_message(array_to_image(pixels, Time(sec=1), "front")))
    seen, _ = decode(observations.snapshot(Motion(robot)))
    np.testing.assert_array_equal(seen["observation.state"][6:], [1.0] * 6 + [2.0] * 6)
    np.testing.assert_array_equal(seen[camera], pixels[2:6, 1:6])
    take(serialize_message(array_to_image(pixels[:5], Time(sec=1), "front")))
    assert "crops [2, 1, 4, 5]" in observations.cameras[0].fault
    take(serialize_message(array_to_image(pixels, Time(sec=2), "front")))
    state.effort = []
    observations.take_joints(state)
    assert "7 names and 0 efforts" in observations.fault.detail
    state.velocity = []
    observations.take_joints(state)
    assert "7 names and 0 velocities" in observations.fault.detail


@pytest.mark.parametrize(
    "unit", [{"unit": "deg"}, {"unit": "rad"}, {"scale": [0.0192, 0.03, 1.0, 2.0, 0.5, 0.1]}]
)
def test_an_inverted_joint_has_the_opposite_effort_in_newton_metres(
    tmp_path: Path, unit: dict[str, Any]
) -> None:
    """Effort x velocity has the same sign in the policy's units, and a unit of angle does not scale
    torques.
    """
    sign = [1, -1, -1, 1, 1, -1]
    values = example(state={"observation.state": ["joint_velocities", "joint_efforts"]})
    del values["arm"]["unit"]
    values["arm"] |= {"sign": sign, "offset": [0.3] * 6, **unit}
    robot = load_robot_config(write(tmp_path, values))
    observations = Observations(robot, {}, {"observation.state": 12}, None)
    speed, torque = [0.5, -1.0, 2.0, 0.1, -0.2, 0.3], [3.0, 4.0, -5.0, 6.0, 0.0, -7.0]
    state = JointState(name=list(robot.arm.joints) + ["finger_joint"], position=[0.1] * 7)
    state.velocity, state.effort = [*speed, 9.0], [*torque, 9.0]
    observations.take_joints(state)
    seen = observations.snapshot(Motion(robot))["observation.state"]
    np.testing.assert_array_equal(seen[6:], np.array(sign, np.float32) * torque)
    np.testing.assert_array_equal(np.sign(seen[:6] * seen[6:]), np.sign(np.array(speed) * torque))


@given(
    scale=st.floats(1e-9, 1e6) | st.floats(-1e6, -1e-9),
    offset=st.floats(-1e6, 1e6),
    unit=st.floats(1e-6, 100.0),
    zero=st.floats(-100.0, 100.0),
    part=st.floats(0.0, 1.0),
)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_what_loads_comes_back_there_and_here(
    tmp_path: Path, scale: float, offset: float, unit: float, zero: float, part: float
) -> None:
    """Any file is either refused, or its mappings of arm and gripper are invertible to 1e-9."""
    gripper = {
        "opening_scale": scale,
        "opening_offset": offset,
        "action_scale": -scale,
        "action_offset": offset,
    }
    values = example(arm={"scale": [unit] * 6, "offset": [zero] * 6}, gripper=gripper)
    del values["arm"]["unit"]
    try:
        robot = load_robot_config(write(tmp_path, values))
    except ConfigError as error:
        assert "_offset is too large for scale" in str(error)  # noqa: PT017
        assert abs(offset) > 1e-4  # a scale alone is never refused
        return
    assert robot.gripper is not None
    low, high = np.array(robot.limits.low), np.array(robot.limits.high)
    ends = robot.gripper.closed, robot.gripper.open
    for mapping, first, last in (
        (robot.arm.units, low, high),
        (robot.gripper.measured, *ends),
        (robot.gripper.policy, *ends),
    ):
        ours = first + part * (last - first)
        there = mapping.theirs(ours)
        reach = np.abs(mapping.theirs(last) - mapping.theirs(first))
        np.testing.assert_array_less(np.abs(mapping.ours(there) - ours), 1e-9)
        np.testing.assert_array_less(
            np.abs(mapping.theirs(mapping.ours(there)) - there), 3e-9 * reach
        )
    opening = ends[0] + part * (ends[1] - ends[0])
    assert robot.gripper.measured.ours(robot.gripper.measured.theirs(opening)) == pytest.approx(
        opening, abs=1.5e-9
    )


def test_a_frame_rate_may_be_said_as_it_is(tmp_path: Path) -> None:
    values = example(action={"dt": 0.1})
    with pytest.raises(ConfigError, match=r"action.dt and fps exclude each other"):
        load_robot_config(write(tmp_path, values))
    del values["action"]["dt"]
    values["action"]["fps"] = 30
    assert load_robot_config(write(tmp_path, values)).action.dt == pytest.approx(1 / 30)


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("arm", {"sign": [1, 1, 1, 1, 1, 0.5]}, "give 1 or -1"),
        ("arm", {"sign": [1]}, "list of 6 numbers"),
        ("arm", {"scale": [0.0] * 6}, "must lie in"),
        ("arm", {"scale": [1.0] * 6, "unit": "deg"}, "exclude each other"),
        ("gripper", {"opening_scale": 0.0}, "must not be 0"),
        (
            "gripper",
            {"opening_offset": 1e6, "opening_scale": 0.3, "open": 0.01},
            "gripper.opening_offset is too large for scale",
        ),
        (
            "gripper",
            {"action_scale": -0.3, "action_offset": 1e5, "open": 1e-3},
            "gripper.action_offset .* loses more than 1e-09",
        ),
        ("gripper", {"action_offset": 1e6, "open": 1e-12}, "gripper.action_offset is too large"),
        ("gripper", {"command": "joint", "joints": []}, "joints names none"),
        ("limits", {"acceleration": [-1.0] * 6}, "must lie in"),
    ],
)
def test_mappings_that_cannot_be_inverted_are_refused(
    tmp_path: Path, part: str, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        load_robot_config(write(tmp_path, example(**{part: change})))


def test_increments_are_no_positions() -> None:
    robot = load_robot_config()
    positions = replace(robot, action=replace(robot.action, kind="joint_position"))
    spec = PolicySpec("theirs", "ceed_vla", {}, {}, positions.action_dim, 8, 4, 0.0)
    check_fit(positions, spec)
    check_fit(positions, replace(spec, delta_dims=(positions.action_dim - 1,)))  # gripper only
    with pytest.raises(ConfigError, match=r"theirs gives increments \(delta_dims \[0, 2\]\)"):
        check_fit(positions, replace(spec, delta_dims=(0, 2)))
