"""The robots' files of launch/config with the arm models that other packages publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from robot_checkpoints import DATA, statistics, write_checkpoint
from simulated_arms import MODELS, DrivenArm

from ceed_vla.cli.entry import main
from ceed_vla.ros_nodes.robot.kinematics import ModelArm
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Map each robot to a checkpoint whose data are plausible for it."""
    made = {}
    for robot, ends in DATA.items():
        values = statistics(*ends)
        made[robot] = write_checkpoint(tmp_path_factory.mktemp(robot), values, values)
    return made


def modelled(folder: Path, name: str) -> Path:
    """Return a robot's file that names the published model of its arm."""
    file = packaged_config().parent / f"{name}.yaml"
    values: dict[str, Any] = yaml.safe_load(file.read_text())
    values["arm"] |= {"model": str(MODELS[name].written(folder)), "tcp": MODELS[name].tcp}
    (folder / "robot.yaml").write_text(yaml.safe_dump(values))
    return folder / "robot.yaml"


def test_every_robots_file_is_tested() -> None:
    files = {file.stem for file in packaged_config().parent.glob("*.yaml")}
    assert files == {*MODELS, "policy", "real_arm_example", "tabletop_robot"}
    assert set(DATA) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_limits_are_the_published_models(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = modelled(tmp_path, name)
    robot = load_robot_config(file)
    assert robot.arm.model is not None
    model = ModelArm(robot.arm.model, robot.arm.tcp, robot.arm.joints)
    np.testing.assert_allclose(robot.limits.low, model.low, atol=1e-3)
    np.testing.assert_allclose(robot.limits.high, model.high, atol=1e-3)
    known = ~np.isnan(model.velocity)
    physical = np.array(robot.limits.physical_velocity)
    np.testing.assert_allclose(physical[known], model.velocity[known], atol=1e-3)
    assert main(["robot", "check", str(file), "--checkpoint", str(checkpoints[name])]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "fits"


@pytest.mark.parametrize("interface", ["joint_trajectory", "forward_position"])
@pytest.mark.parametrize("name", MODELS)
def test_the_published_arm_follows_within_its_limits(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, interface: str
) -> None:
    """A few seconds in MuJoCo: units, order, signs and the gripper's mapping in both directions."""
    driven = DrivenArm(name, modelled(tmp_path, name), checkpoints[name], interface)
    driven.run(6.0)
    robot = driven.setup.robot
    moving = driven.ticks
    assert len(moving) > 500
    assert driven.setup.safety.clamps["position"] == 0
    measured = np.array([tick.measured for tick in moving])
    commands = np.array([tick.command for tick in moving])
    assert (measured >= np.array(robot.limits.low)).all()
    assert (measured <= np.array(robot.limits.high)).all()
    assert (np.abs(commands - measured) <= np.array(robot.limits.step) + 1e-9).all()
    steps = np.abs(np.diff(commands, axis=0)) / driven.setup.arm.period
    assert (steps <= np.array(robot.limits.velocity) + 1e-6).all()
    # The arm follows the policy, joint by joint, with a delay.
    late = round(0.25 / driven.setup.arm.period)
    wanted = robot.arm.units.ours(np.array([tick.wanted[:-1] for tick in moving]))
    error = np.abs(measured[late:] - wanted[:-late])[100:]
    reach = np.ptp(wanted, axis=0)
    assert (error.max(axis=0) < 0.35 * reach).all()
    assert (np.ptp(measured, axis=0) > 0.8 * reach).all()
    # The policy's observations are mapped back to the data's units by the file.
    shown = np.array([state for _, state in driven.worker.seen])
    low, high = (np.array(ends) for ends in DATA[name])
    slack = 0.05 * (high - low)
    assert (shown >= low - slack).all()
    assert (shown <= high + slack).all()
    assert np.ptp(shown[:, -1]) > 0.6 * (high[-1] - low[-1])
    openings = [tick.opening for tick in moving if tick.opening is not None]
    assert robot.gripper is not None
    assert min(openings) >= robot.gripper.closed
    assert max(openings) <= robot.gripper.open
