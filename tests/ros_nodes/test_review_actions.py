"""What a policy says of its actions is compared with the robot's file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ceed_vla.ros_nodes.robot.review_actions import contract_findings
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config
from ceed_vla.serving.predictor_types import PolicySpec

SPEC = PolicySpec("policy", "act", {}, {}, 7, 8, 8, 0.0)
TABLETOP = "dx dy dz droll dpitch dyaw gripper"


def found(robot: str, **said: object) -> list[tuple[str, str]]:
    """Rule and severity of every finding."""
    file = load_robot_config(packaged_config().parent / f"{robot}.yaml")
    spec = replace(SPEC, action_dim=file.action_dim, **said)  # type: ignore[arg-type]
    return [(finding.allow, finding.severity) for finding in contract_findings(file, spec)]


@pytest.mark.parametrize("robot", ["tabletop_robot", "so101_follower", "ur5e", "franka_panda"])
def test_what_a_policy_does_not_say_fits(robot: str) -> None:
    assert found(robot) == []


def names_of(robot: str) -> list[str]:
    file = load_robot_config(packaged_config().parent / f"{robot}.yaml")
    gripper = file.gripper is not None and file.gripper.action != "none"
    return [*file.arm.joints, *(["gripper"] if gripper else [])]


@pytest.mark.parametrize("robot", ["so101_follower", "ur5e", "franka_panda"])
def test_names_of_joints(robot: str) -> None:
    own = names_of(robot)
    numbered = [f"joint_{place}.pos" for place in range(len(own))]
    for names in (
        own,
        [f"{name}.pos" for name in own],
        [f"left_{name}.pos" for name in own],
        [f"motor_{place}" for place in range(len(own))],
        [*numbered[: len(own) - 1], own[-1]],
        [name.upper() for name in own],
        own[:-2],  # another number, which is refused elsewhere
    ):
        assert found(robot, action_names=tuple(names)) == [], names
    swapped = (own[1], own[0], *own[2:])
    assert found(robot, action_names=swapped) == [("action_names", "problem")]
    other = tuple(f"axle{letter}" for letter in "abcdefgh"[: len(own)])
    assert found(robot, action_names=other) == [("action_names", "warning")]
    speeds = tuple(f"{name}.vel" for name in own)
    assert ("action_names", "problem") in found(robot, action_names=speeds)


@pytest.mark.parametrize(
    "names",
    [
        TABLETOP,
        "x y z roll pitch yaw gripper",
        "delta_x delta_y delta_z rx ry rz open",
        "ee.x ee.y ee.z ee.wx ee.wy ee.wz ee.gripper",
        "x y z axis_angle1 axis_angle2 axis_angle3 gripper",
    ],
)
def test_names_of_poses(names: str) -> None:
    assert found("tabletop_robot", action_names=tuple(names.split())) == []


def test_another_order_of_a_pose() -> None:
    names = ("dx", "dz", "dy", "droll", "dpitch", "dyaw", "gripper")
    assert found("tabletop_robot", action_names=names) == [("action_names", "problem")]


@pytest.mark.parametrize(("rate", "fits"), [(10.0, True), (10.1, True), (30.0, False)])
def test_steps_per_second(rate: float, fits: bool) -> None:
    assert found("tabletop_robot", control_rate=rate) == ([] if fits else [("rate", "problem")])


def test_units() -> None:
    file = load_robot_config(packaged_config().parent / "ur5e.yaml")
    count = file.action_dim
    assert file.arm.unit == "rad"
    for unit in ("rad", "radians"):
        assert found("ur5e", units=(unit,) * count) == []
    assert found("ur5e", units=("deg",) * count) == [("units", "problem")]
    # the file scales the policy's values
    assert found("tabletop_robot", units=("normalized",) * 7) == []
