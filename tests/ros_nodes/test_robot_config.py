"""A robot's file: its values, its refusals, and that the packaged model is the simulation's."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import yaml

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.interfaces.base import INTERFACES
from ceed_vla.ros_nodes.robot.robot_config import COMPONENTS
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config
from ceed_vla.sim.tabletop import arm, env, scene
from tests.helpers.robot_yaml import CONFIG, write


def packaged() -> dict[str, Any]:
    """Return the packaged robot's file, with an absolute path of the model."""
    values = yaml.safe_load(packaged_config().read_text())
    values["arm"]["model"] = str(packaged_config().parent / values["arm"]["model"])
    return values


def test_packaged_robot_is_the_simulated_one() -> None:
    robot = load_robot_config()
    action = robot.action
    assert action.dt == env.CTRL_DT
    assert action.pose is not None
    for name, value in asdict(action.pose).items():
        np.testing.assert_array_equal(value, getattr(env._POSE_LIMITS, name))
    np.testing.assert_allclose(robot.arm.home, arm.HOME)
    assert robot.action_dim == len(env.ACTION_NAMES)
    assert robot.state_dim("observation.state") == len(env.STATE_NAMES)
    assert robot.gripper.open == 2 * scene.FINGER_STROKE
    assert [(image.name, image.topic) for image in robot.images] == [
        ("front", "front/image_raw"),
        ("wrist", "wrist/image_raw"),
    ]
    assert set(robot.interfaces) == set(INTERFACES)


def test_packaged_model_is_current() -> None:
    assert (CONFIG / "tabletop_arm.xml").read_text() == scene.SCENE.with_name("arm.xml").read_text()


def test_model_has_the_kinematics_of_the_scene() -> None:
    alone = mujoco.MjModel.from_xml_path(str(CONFIG / "tabletop_arm.xml"))
    whole = scene.load_scene().model
    states = [mujoco.MjData(alone), mujoco.MjData(whole)]
    rng = np.random.default_rng(0)
    for _ in range(5):
        q = rng.uniform(arm.JOINT_LOW, arm.JOINT_HIGH)
        for model, data in zip((alone, whole), states, strict=True):
            data.qpos[:7] = q
            mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(
            states[0].site("tcp").xpos, states[1].site("tcp").xpos, atol=1e-9, rtol=0
        )
        np.testing.assert_allclose(
            states[0].site("tcp").xmat, states[1].site("tcp").xmat, atol=1e-9, rtol=0
        )


def test_example_of_a_real_arm_loads() -> None:
    robot = load_robot_config(CONFIG / "real_arm_example.yaml")
    assert robot.action.kind == "joint_position"
    assert robot.action_dim == robot.state_dim("observation.state") == 7
    assert [image.transport for image in robot.images] == ["raw", "compressed"]
    with pytest.raises(
        ConfigError, match="no interface 'servo_twist'; it has joint_trajectory, forward_position"
    ):
        robot.interface("servo_twist")


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the packaged file with another value at "a/b"; None removes it."""
    values = packaged()
    *parents, key = path.split("/")
    at = values
    for parent in parents:
        at = at[parent]
    if value is None:
        del at[key]
    else:
        at[key] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("arm", None, "arm is missing"),
        ("arms", {}, "arms is unknown; the keys here are action, allow, arm, "),
        (
            "action/kind",
            "fly",
            "action.kind is 'fly'; choose one of ee_delta, joint_position, joint_delta",
        ),
        ("action/kind", "joint_delta", "is unknown; the keys here are dt, kind"),
        ("action/dt", 0, r"action.dt has 0; it must lie in \[0.01, 2\]"),
        ("action/dt", ".nan", "action.dt has '.nan'; give a finite number"),
        (
            "action/workspace",
            {"low": [0, 0, 0], "high": [1, 1]},
            r"workspace.high is \[1, 1\]; give a list of 3",
        ),
        ("action/workspace", {"low": [0, 0, 0], "high": [1, 1, 0]}, "action.workspace is empty"),
        ("action/max_tilt", 2.0, r"it must lie in \[0, 1.5\]"),
        ("arm/joints", [], "arm.joints is empty"),
        ("arm/joints", ["a", "a"], "it has a duplicate value"),
        ("arm/joints", "joint1", "give a list of strings"),
        (
            "arm/model",
            "nowhere.xml",
            "nowhere.xml', not a file; paths are relative to this file's folder",
        ),
        ("arm/home", [0.0], "arm.home is .* give a list of 7 numbers"),
        ("arm/unit", "turns", "choose one of rad, deg"),
        ("limits/velocity", [1.0] * 6, "limits.velocity is .* give a list of 7 numbers"),
        ("limits/velocity", [-1.0] * 7, "limits.velocity has -1"),
        ("limits/speed", [1.0] * 7, "limits.speed is unknown"),
        (
            "limits/physical_velocity",
            [0.0] * 7,
            r"limits.physical_velocity has 0.0; it must lie in \[0.001",
        ),
        (
            "limits/physical_velocity",
            2.0,
            "limits.physical_velocity is 2.0; give a list of 7 numbers",
        ),
        (
            "joint_states/topic",
            "joint states",
            "topic is 'joint states'; a topic has letters, digits and _",
        ),
        pytest.param("joint_states/topic", "a" * 300, "a topic has letters", id="long topic"),
        pytest.param("arm/model", "a" * 5000, "File name too long", id="long path"),
        ("arm/model", "~nobody_here/arm.xml", "home directory"),
        ("action/dt", float("nan"), "action.dt has '.nan'; give a finite number"),
        pytest.param("action/dt", 10**390, "action.dt has 10+...0+; it must lie in", id="no float"),
        ("action/dt", True, "action.dt has True; give a finite number"),
        ("gripper/open", 1e300, "it must lie in"),
        ("gripper/topic", {"a": [[["x"] * 1000]]}, "gripper.topic is .* give a string"),
        pytest.param("arm/" + "x" * 5000, 1, "arm.x+... is unknown", id="long key"),
        (
            "limits/position",
            {"low": [1.0] * 7, "high": [0.0] * 7},
            "limits.position.low is not below high",
        ),
        ("state/observation.state", ["joints"], f"'joints'; choose from {next(iter(COMPONENTS))}"),
        (
            "images/front",
            {"topic": "a"},
            "images.front is not a feature; it must start with 'observation.'",
        ),
        ("images/observation.images.front", {"topic": "a", "transport": "udp"}, "raw, compressed"),
        ("images/observation.images.front", {"topic": ""}, "topic is ''; give a string"),
        ("images/observation.images.front", {"topic": "a", "resize": 1}, "give true or false"),
        ("images/observation.front", {"topic": "a"}, "need different last parts"),
        ("gripper/open", -1.0, r"gripper.open is -1.0; it must be more than closed \(0.0\)"),
        ("gripper/joints", ["joint1"], "gripper.joints repeats the arm's joint1"),
        ("gripper/joints", None, "gripper.joints is missing; finger_opening needs it"),
        ("gripper", None, "gripper is missing; finger_opening and commanded_gripper need it"),
        ("interfaces", {}, "interfaces is empty"),
        (
            "interfaces/wheels",
            {"topic": "a"},
            "interfaces.wheels is unknown; the interfaces are forward_position",
        ),
        ("allow", "velocity", "allow is 'velocity'; give a list of strings"),
        ("allow", ["step", "step"], "it has a duplicate value"),
        ("joint_states/topik", "x", "joint_states.topik is unknown; the keys here are topic"),
        ("joint_states", "joint_states", "joint_states is 'joint_states'; give keys with values"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = write(tmp_path, changed(path, value))
    with pytest.raises(ConfigError, match=message) as caught:
        load_robot_config(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_needs_a_model_says_so(tmp_path: Path) -> None:
    values = packaged()
    del values["arm"]["model"], values["arm"]["tcp"]
    with pytest.raises(
        ConfigError, match=r"arm\.model is missing; ee_delta actions and tcp states need it"
    ):
        load_robot_config(write(tmp_path, values))
    values["action"] = {"kind": "joint_position", "dt": 0.1}
    values["state"] = {"observation.state": ["joint_positions", "finger_opening"]}
    with pytest.raises(ConfigError, match=r"limits\.position is missing"):
        load_robot_config(write(tmp_path, values))
    values["limits"]["position"] = {"low": [-1.0] * 7, "high": [1.0] * 7}
    robot = load_robot_config(write(tmp_path, values))
    assert (robot.action_dim, robot.state_dim("observation.state")) == (8, 8)
    with pytest.raises(ConfigError, match=r"servo_twist needs arm\.model"):
        robot.interface("servo_twist")


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    text = (CONFIG / "real_arm_example.yaml").read_text()
    file = tmp_path / "robot.yaml"
    file.write_text(
        text.replace("  step: [", "  velocity: [9.0, 9.0, 9.0, 9.0, 9.0, 9.0]\n  step: [")
    )
    with pytest.raises(ConfigError, match="duplicate key 'velocity'"):
        load_robot_config(file)


@pytest.mark.parametrize(
    ("written", "read"), [("010", 10), ("1e-1", 0.1), ("1:30", None), ("0x1", None), ("1_0", None)]
)
def test_numbers_are_read_as_on_the_command_line(
    tmp_path: Path, written: str, read: float | None
) -> None:
    file, text = tmp_path / "robot.yaml", (CONFIG / "real_arm_example.yaml").read_text()
    file.write_text(
        text.replace("closed: 0.0", f"closed: {written}").replace("open: 0.085", "open: 20")
    )
    assert f"closed: {written}" in file.read_text()
    if read is None:
        with pytest.raises(ConfigError, match=r"gripper\.closed has '.*'; give a finite number"):
            load_robot_config(file)
    else:
        assert load_robot_config(file).gripper.closed == read  # type: ignore[union-attr]


def test_many_keys_are_read_at_once(tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text("\n".join(f"k{i}: 1" for i in range(9000)))
    start = time.monotonic()
    with pytest.raises(ConfigError, match="arm is missing"):
        load_robot_config(tmp_path / "robot.yaml")
    assert time.monotonic() - start < 8


def test_commanded_poses_are_of_ee_deltas(tmp_path: Path) -> None:
    values = packaged()
    values["action"] = {"kind": "joint_position", "dt": 0.1}
    with pytest.raises(
        ConfigError, match="commanded_position, commanded_yaw_cos_sin, which only ee_delta"
    ):
        load_robot_config(write(tmp_path, values))


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(30))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[1, 2]", "a: [", "\x00", "1: 2", "? [a]\n: b", "- a", ".nan", "text"),
        *("a: !!timestamp b", "a: 2024-13-45", "a: !!int b", "!!python/name:os.system", "a: *b"),
        pytest.param("[" * 5000, id="deep"),
        pytest.param("a: " + "9" * 5000, id="many digits"),
        pytest.param("a: 0x" + "f" * 5000, id="many hexadecimal digits"),
        pytest.param("a" * 100_001, id="long"),
        pytest.param(LAUGHS, id="a billion laughs"),
        pytest.param(LAUGHS + "arm: *a30", id="a billion laughs, shown"),
        pytest.param("arm: &a {arm: *a}", id="in itself"),
    ],
)
def test_no_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "robot.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"robot\.yaml"):
        load_robot_config(tmp_path / "robot.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_robot_config(tmp_path / "none.yaml")
