"""Actions from commands: the inverse of the motion that a policy's actions make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ceed_vla.ros_nodes.record.commanded import ActionMaker, Commanded
from ceed_vla.ros_nodes.robot.arm_model import arm_model
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.robot_config import Arm, RobotConfig
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config

ROBOT = load_robot_config()


def of_kind(kind: str, gripper: str = "binary") -> RobotConfig:
    assert ROBOT.gripper is not None
    arm: Arm = replace(ROBOT.arm, unit="deg", sign=(1, -1, 1, 1, 1, 1, 1), offset=(0.1,) * 7)
    return replace(
        ROBOT,
        arm=ROBOT.arm if kind == "ee_delta" else arm,
        action=replace(ROBOT.action, kind=kind, pose=ROBOT.action.pose),
        gripper=replace(ROBOT.gripper, action=gripper),
    )


@pytest.mark.parametrize("kind", ["ee_delta", "joint_position", "joint_delta"])
@pytest.mark.parametrize("gripper", ["binary", "opening"])
def test_the_action_of_a_step_is_the_one_that_made_it(kind: str, gripper: str) -> None:
    robot = of_kind(kind, gripper)
    if kind != "ee_delta":
        robot = replace(robot, action=replace(robot.action, pose=None))
    model = arm_model(robot)
    motion = Motion(robot, model)
    maker = ActionMaker(robot, model)
    rng = np.random.default_rng(0)
    for _ in range(20):
        motion.restart(np.array(robot.arm.home), 0.1)
        before = Commanded(motion.joints, 0.1 if motion.gripper is None else motion.gripper)
        action = rng.uniform(-0.5, 0.5, robot.action_dim)
        if kind == "joint_position":
            action[:-1] = robot.arm.units.theirs(motion.joints) + rng.uniform(-3, 3, 7)
        action[-1] = rng.choice([-1.0, 1.0]) if gripper == "binary" else rng.uniform(0.0, 0.1)
        motion.advance(action)
        found = maker.action(before, Commanded(motion.joints, motion.gripper))
        # inverse kinematics stops within 0.1 mm and 0.5 mrad, 1/500 of a full action
        np.testing.assert_allclose(found, action, atol=0.005 if kind == "ee_delta" else 1e-4)
        if kind == "ee_delta":
            parts = maker.state_parts(Commanded(motion.joints, motion.gripper))
            for name, value in motion.commanded.items():
                np.testing.assert_allclose(parts[name], value, atol=0.001)
    assert maker.clipped == 0


def test_more_than_a_full_action_is_clipped_and_counted() -> None:
    maker = ActionMaker(ROBOT, arm_model(ROBOT))
    home = np.array(ROBOT.arm.home)
    action = maker.action(Commanded(home, None), Commanded(home + 0.3, 0.0))
    assert np.abs(action[:6]).max() == 1.0
    assert action[6] == -1.0
    assert maker.clipped == 1
