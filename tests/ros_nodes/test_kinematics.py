"""The arm's kinematics against the simulation's own: another solver, another forward kinematics, the same motion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mink")

from ceed_vla.errors import ConfigError
from ros_nodes.robot.kinematics import ArmKinematics, CommandedPose, PoseLimits
from sim.tabletop import arm, env
from sim.tabletop.scene import scene_xml

JOINTS = tuple(f"joint{i}" for i in range(1, 8))
URDF = """<robot name="two">
<link name="base"/><link name="upper"/><link name="lower"/><link name="tip"/>
<joint name="a" type="revolute"><parent link="base"/><child link="upper"/><axis xyz="0 0 1"/>
  <limit lower="-2" upper="2" effort="1" velocity="1"/></joint>
<joint name="b" type="revolute"><parent link="upper"/><child link="lower"/><origin xyz="1 0 0"/><axis xyz="0 0 1"/>
  <limit lower="-1" upper="2.5" effort="1" velocity="1"/></joint>
<joint name="c" type="revolute"><parent link="lower"/><child link="tip"/><origin xyz="1 0 0"/><axis xyz="0 0 1"/>
  <limit lower="-3" upper="3" effort="1" velocity="1"/></joint>
</robot>"""
MASS = '<inertial><mass value="1"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial>'
for link in ("upper", "lower", "tip"):
    URDF = URDF.replace(f'<link name="{link}"/>', f'<link name="{link}">{MASS}</link>')


def test_velocity_limits_are_the_urdfs(tmp_path: Path, kinematics: ArmKinematics) -> None:
    text = URDF.replace('velocity="1"', 'velocity="0"', 1).replace('velocity="1"', 'velocity="2.5"', 1)
    (tmp_path / "two.urdf").write_text(text)
    velocity = ArmKinematics(tmp_path / "two.urdf", "tip", ("c", "b", "a")).velocity
    np.testing.assert_array_equal(velocity, [1.0, 2.5, np.nan])  # 0 says nothing
    assert np.isnan(kinematics.velocity).all()


def test_a_model_that_mujoco_cannot_build_is_refused(tmp_path: Path) -> None:
    for text in (
        "<mujoco",
        "<mujoco/>",
        "",
        "<robot name='a'><link name='b'/></robot>",
        URDF.replace(MASS, ""),
    ):
        (tmp_path / "arm.urdf").write_text(text)
        with pytest.raises(ConfigError):
            ArmKinematics(tmp_path / "arm.urdf", "tip", ("a",))


def pose_limits(**changes: Any) -> PoseLimits:
    values: dict[str, Any] = {
        "position_scale": env.POSITION_STEP,
        "rotation_scale": env.ROTATION_STEP,
        "workspace_low": env.WORKSPACE_LOW,
        "workspace_high": env.WORKSPACE_HIGH,
        "max_tilt": env.MAX_TILT,
        "max_yaw": env.MAX_YAW,
    }
    return PoseLimits(**{**values, **changes})


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole scene, with fingers, free cubes and actuators that the kinematics must leave out."""
    path = tmp_path_factory.mktemp("model") / "scene.xml"
    path.write_text(scene_xml())
    return path


@pytest.fixture(scope="module")
def kinematics(scene_file: Path) -> ArmKinematics:
    return ArmKinematics(scene_file, "tcp", JOINTS, home=arm.HOME)


def matrix(quaternion: np.ndarray) -> np.ndarray:
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(share=st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_forward_is_the_denavit_hartenberg_table(kinematics: ArmKinematics, share: list[float]) -> None:
    q = arm.JOINT_LOW + np.array(share) * (arm.JOINT_HIGH - arm.JOINT_LOW)
    position, quaternion = kinematics.forward(q)
    expected, rotation = arm.forward_kinematics(q)
    np.testing.assert_allclose(position, expected, atol=1e-7)
    np.testing.assert_allclose(matrix(quaternion), rotation, atol=1e-7)
    assert quaternion[0] >= 0


def test_limits_are_the_models(kinematics: ArmKinematics) -> None:
    np.testing.assert_allclose(kinematics.position_low, arm.JOINT_LOW)
    np.testing.assert_allclose(kinematics.position_high, arm.JOINT_HIGH)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    start=st.lists(st.floats(-0.2, 0.2), min_size=7, max_size=7),
    offset=st.lists(st.floats(-0.04, 0.04), min_size=3, max_size=3),
)
def test_a_near_pose_is_reached(kinematics: ArmKinematics, start: list[float], offset: list[float]) -> None:
    q = arm.HOME + np.array(start)
    position, quaternion = kinematics.forward(q)
    found = kinematics.solve(q, position + np.array(offset), quaternion)
    reached, turned = kinematics.forward(found)
    np.testing.assert_allclose(reached, position + np.array(offset), atol=1e-4)
    np.testing.assert_allclose(turned, quaternion, atol=1e-3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    start=st.lists(st.floats(0, 1), min_size=7, max_size=7),
    goal=st.lists(st.floats(0, 1), min_size=7, max_size=7),
)
def test_no_limit_is_ever_passed(kinematics: ArmKinematics, start: list[float], goal: list[float]) -> None:
    low, span = arm.JOINT_LOW, arm.JOINT_HIGH - arm.JOINT_LOW
    q = low + np.array(start) * span
    found = kinematics.solve(q, *kinematics.forward(low + np.array(goal) * span))
    assert (found >= low - 1e-9).all()
    assert (found <= arm.JOINT_HIGH + 1e-9).all()
    assert np.abs(found - q).max() <= 0.6 + 1e-9


def test_an_unreachable_pose_is_approached_inside_the_limits(kinematics: ArmKinematics) -> None:
    q = arm.HOME.copy()
    goal, upright = np.array([2.0, 0.0, 0.5]), np.array([1.0, 0.0, 0.0, 0.0])
    for _ in range(30):
        q = kinematics.solve(q, goal, upright)
        assert (q >= kinematics.position_low).all()
        assert (q <= kinematics.position_high).all()
    assert kinematics.forward(q)[0][0] > 0.8  # stretched out


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_expert_episodes_command_the_same_joints_as_the_simulation(
    kinematics: ArmKinematics, seed: int
) -> None:
    """Joint targets of whole episodes, with the start pose as the only common input, agree within 3 mrad."""
    world = env.TabletopEnv(cameras=())
    world.reset(seed=seed)
    rng = np.random.default_rng(seed)
    pose = CommandedPose(pose_limits())
    q = world.data.ctrl[:7].copy()
    pose.reset(world.command_position, mink_quaternion(world.command_rpy))
    worst = 0.0
    for _ in range(60):
        action = world.expert_action()
        action[:6] = np.clip(action[:6] + rng.normal(0, 0.1, 6), -1, 1)
        world.advance(action)
        pose.advance(action[:6])
        q = kinematics.solve(q, pose.position, pose.quaternion)
        pose.follow(*kinematics.forward(q))
        worst = max(worst, float(np.abs(q - world.data.ctrl[:7]).max()))
        np.testing.assert_allclose(pose.position, world.command_position, atol=1e-3)
        np.testing.assert_allclose(pose.rpy, world.command_rpy, atol=3e-3)
    assert worst < 3e-3


def mink_quaternion(rpy: np.ndarray) -> np.ndarray:
    import mink

    return mink.SO3.from_rpy_radians(*rpy).wxyz


@settings(max_examples=60, deadline=None, derandomize=True)
@given(actions=st.lists(st.lists(st.floats(-2, 2), min_size=6, max_size=6), min_size=1, max_size=12))
def test_the_commanded_pose_accumulates_as_in_the_simulation(actions: list[list[float]]) -> None:
    pose = CommandedPose(pose_limits())
    position, rpy = np.array([0.4, 0.0, 0.27]), np.zeros(3)
    pose.reset(position, np.array([1.0, 0.0, 0.0, 0.0]))
    limit = np.array([env.MAX_TILT, env.MAX_TILT, env.MAX_YAW])
    for action in actions:
        pose.advance(np.array(action))
        clipped = np.clip(action, -1, 1)
        position = np.clip(position + 0.05 * clipped[:3], env.WORKSPACE_LOW, env.WORKSPACE_HIGH)
        rpy = np.clip(arm.rotate_rpy(rpy, 0.25 * clipped[3:]), -limit, limit)
        np.testing.assert_allclose(pose.position, position, atol=1e-9)
        np.testing.assert_allclose(pose.rpy, rpy, atol=1e-9)
        np.testing.assert_allclose(matrix(pose.quaternion), arm.rpy_matrix(rpy), atol=1e-9)


def test_the_commanded_pose_gives_way_to_the_arm() -> None:
    pose = CommandedPose(pose_limits())
    pose.reset(np.array([0.5, 0.0, 0.2]), np.array([1.0, 0.0, 0.0, 0.0]))
    near = np.array([0.504, 0.0, 0.2])
    pose.follow(near, mink_quaternion(np.array([0.0, 0.0, 0.04])))
    assert pose.position.tolist() == [0.5, 0.0, 0.2]
    assert pose.rpy.tolist() == [0.0, 0.0, 0.0]
    pose.follow(near + 0.01, mink_quaternion(np.array([0.0, 0.0, 0.06])))
    np.testing.assert_allclose(pose.position, near + 0.01)
    np.testing.assert_allclose(pose.rpy, [0.0, 0.0, 0.06], atol=1e-9)


@pytest.mark.parametrize("action", [np.zeros(7), np.array([np.nan, 0, 0, 0, 0, 0])])
def test_a_bad_action_is_refused(action: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="six finite numbers"):
        CommandedPose(pose_limits()).advance(action)


def test_a_urdf_works_too_and_joints_keep_the_given_order(tmp_path: Path) -> None:
    path = tmp_path / "two.urdf"
    path.write_text(URDF)
    planar = ArmKinematics(path, "tip", ("b", "a"))
    assert planar.position_low.tolist() == [-1.0, -2.0]
    position, _ = planar.forward(np.array([np.pi / 2, 0.0]))  # b, a; c is not named: it stays at 0
    np.testing.assert_allclose(position, [1.0, 1.0, 0.0], atol=1e-9)
    found = planar.solve(np.array([1.4, 0.1]), *planar.forward(np.array([1.5, 0.2])))
    np.testing.assert_allclose(found, [1.5, 0.2], atol=1e-2)


def test_bad_models_and_names_are_named(scene_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ArmKinematics(tmp_path / "missing.xml", "tcp", JOINTS)
    (tmp_path / "broken.xml").write_text("<mujoco><body")
    with pytest.raises(ConfigError, match="cannot be read"):
        ArmKinematics(tmp_path / "broken.xml", "tcp", JOINTS)
    with pytest.raises(ConfigError, match=r"joint8.* which has joint1, joint2"):
        ArmKinematics(scene_file, "tcp", ("joint8",))
    with pytest.raises(ConfigError, match="no site or body 'tool'; its sites are tcp"):
        ArmKinematics(scene_file, "tool", JOINTS)
    with pytest.raises(ConfigError, match="one position each"):
        ArmKinematics(scene_file, "tcp", ("cube_red",))
    with pytest.raises(ConfigError, match=r"home has shape \(2,\)"):
        ArmKinematics(scene_file, "tcp", JOINTS, home=[0.0, 0.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workspace_low": [1.0, 0.0, 0.0]}, "three lows below three highs"),
        ({"position_scale": 0.0}, "position_scale is 0.0"),
        ({"max_tilt": 1.6}, "unique below"),
    ],
)
def test_bad_pose_limits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pose_limits(**changes)
