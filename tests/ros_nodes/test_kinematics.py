"""The kinematics of a model's file, against the simulation's and the Denavit-Hartenberg table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from denavit_hartenberg import forward_kinematics
from hypothesis import given, settings
from hypothesis import strategies as st

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import (
    CommandedPose,
    PoseLimits,
    rotate_rpy,
    rpy_matrix,
    turn_matrix,
    turn_vector,
)
from ceed_vla.ros_nodes.robot.kinematics import ModelArm
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config
from ceed_vla.sim.tabletop import arm, env
from ceed_vla.sim.tabletop.scene import SCENE

JOINTS = tuple(f"joint{i}" for i in range(1, 8))
URDF = """<robot name="two">
<link name="base"/><link name="upper"/><link name="lower"/><link name="tip"/>
<joint name="a" type="revolute"><parent link="base"/><child link="upper"/><axis xyz="0 0 1"/>
  <limit lower="-2" upper="2" effort="1" velocity="1"/></joint>
<joint name="b" type="revolute"><parent link="upper"/><child link="lower"/>
<origin xyz="1 0 0"/><axis xyz="0 0 1"/>
  <limit lower="-1" upper="2.5" effort="1" velocity="1"/></joint>
<joint name="c" type="revolute"><parent link="lower"/><child link="tip"/>
<origin xyz="1 0 0"/><axis xyz="0 0 1"/>
  <limit lower="-3" upper="3" effort="1" velocity="1"/></joint>
</robot>"""
MASS = (
    '<inertial><mass value="1"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" '
    'iyz="0"/></inertial>'
)
for link in ("upper", "lower", "tip"):
    URDF = URDF.replace(f'<link name="{link}"/>', f'<link name="{link}">{MASS}</link>')


def test_velocity_limits_are_the_urdfs(tmp_path: Path, kinematics: ModelArm) -> None:
    text = URDF.replace('velocity="1"', 'velocity="0"', 1).replace(
        'velocity="1"', 'velocity="2.5"', 1
    )
    (tmp_path / "two.urdf").write_text(text)
    velocity = ModelArm(tmp_path / "two.urdf", "tip", ("c", "b", "a")).velocity
    np.testing.assert_array_equal(velocity, [1.0, 2.5, np.nan])  # 0 means unknown
    assert np.isnan(kinematics.velocity).all()


def test_a_model_that_mujoco_cannot_build_is_refused(tmp_path: Path) -> None:
    for text in (
        "<mujoco",
        "<mujoco/>",
        "",
        "<robot name='a'><link name='b'/></robot>",
        "<robot name='a'>",
    ):
        (tmp_path / "arm.urdf").write_text(text)
        with pytest.raises(ConfigError):
            ModelArm(tmp_path / "arm.urdf", "tip", ("a",))


def test_meshes_and_masses_do_not_matter(tmp_path: Path) -> None:
    mesh = '<visual><geometry><mesh filename="package://two/arm.stl"/></geometry></visual>'
    for name, text in (("a", URDF), ("b", URDF.replace(MASS, mesh)), ("c", URDF.replace(MASS, ""))):
        (tmp_path / f"{name}.urdf").write_text(text)
    joints = np.array([0.3, 0.4, 0.5])
    whole, *others = (
        ModelArm(tmp_path / f"{name}.urdf", "tip", ("a", "b", "c")).pose(joints) for name in "abc"
    )
    for other in others:
        np.testing.assert_allclose(other[0], whole[0])
        np.testing.assert_allclose(other[1], whole[1])


def test_an_arm_outside_its_workspace_is_not_thrown_inside() -> None:
    config = load_robot_config(packaged_config())
    model = ModelArm(config.arm.model, config.arm.tcp, config.arm.joints, home=config.arm.home)
    motion, limits = Motion(config, model), config.action.pose
    assert limits is not None
    inside = arm.HOME
    high = inside + np.array([0.0, -0.35, 0.0, 0.9, 0.0, 0.3, 0.0])
    position, _ = model.pose(high)
    assert (position > limits.workspace_high).any() or (position < limits.workspace_low).any()
    motion.restart(high, None)
    motion.advance(np.zeros(7))
    assert np.abs(motion.joints - high).max() < 1e-3  # no motion was requested
    for _ in range(30):
        motion.advance(np.array([0, 0, -1.0, 0, 0, 0, 0]))
    below, _ = model.pose(motion.joints)
    assert below[2] < position[2] - 0.1  # it may come back
    motion.restart(inside, None)
    for _ in range(60):
        motion.advance(np.array([0, 0, 1.0, 0, 0, 0, 0]))
    # inside, its limits hold
    assert model.pose(motion.joints)[0][2] < limits.workspace_high[2] + 0.01
    motion.restart(high, None)
    for way in (-1.0, 1.0):
        for _ in range(60):
            motion.advance(np.array([0, 0, way, 0, 0, 0, 0]))
    # and it does not leave them again
    assert model.pose(motion.joints)[0][2] < limits.workspace_high[2] + 0.01


@pytest.mark.parametrize("velocity", [0.3, 0.6])
@pytest.mark.parametrize("way", [(0, 0, -1), (1, 0, 0), (0, 1, 0)])
def test_a_slow_arm_keeps_the_way_of_its_tool(velocity: float, way: tuple[int, int, int]) -> None:
    config = load_robot_config(packaged_config())
    model = ModelArm(config.arm.model, config.arm.tcp, config.arm.joints, home=config.arm.home)
    motion, base = Motion(config, model), arm.HOME
    motion.restart(base, None)
    start, _ = model.pose(base)
    for step in range(40):
        motion.advance(
            np.array([*(0.5 * np.array(way) * (step < 20)), 0, 0, 0, 0]), base, velocity * 0.1
        )
        base = motion.joints
    end, matrix = model.pose(base)
    aside = (end - start) * (1 - np.abs(way))
    assert np.abs(aside).max() < 0.01
    assert np.abs(matrix - np.eye(3)).max() < 0.03
    assert np.abs(end - start).max() > 0.05


LIMITS = PoseLimits(0.05, 0.25, env.WORKSPACE_LOW, env.WORKSPACE_HIGH, env.MAX_TILT, env.MAX_YAW)


@pytest.fixture(scope="module")
def kinematics() -> ModelArm:
    """Kinematics of the whole scene, which must ignore fingers, free cubes and actuators."""
    return ModelArm(SCENE, "tcp", JOINTS, home=arm.HOME)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(share=st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_forward_is_the_denavit_hartenberg_table(kinematics: ModelArm, share: list[float]) -> None:
    q = arm.JOINT_LOW + np.array(share) * (arm.JOINT_HIGH - arm.JOINT_LOW)
    position, turned = kinematics.pose(q)
    expected, rotation = forward_kinematics(q)
    np.testing.assert_allclose(position, expected, atol=1e-7)
    np.testing.assert_allclose(turned, rotation, atol=1e-7)
    quaternion = kinematics.quaternion(turned)
    w, axis = quaternion[0], quaternion[1:]
    half = turn_vector(turned) / 2
    np.testing.assert_allclose(
        [w, *axis],
        [np.cos(size := np.linalg.norm(half)), *(half * np.sinc(size / np.pi))],
        atol=1e-6,
    )
    assert quaternion[0] >= 0


def test_limits_are_the_models(kinematics: ModelArm) -> None:
    np.testing.assert_allclose(kinematics.low, arm.JOINT_LOW)
    np.testing.assert_allclose(kinematics.high, arm.JOINT_HIGH)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    start=st.lists(st.floats(-0.2, 0.2), min_size=7, max_size=7),
    offset=st.lists(st.floats(-0.04, 0.04), min_size=3, max_size=3),
)
def test_a_near_pose_is_reached(
    kinematics: ModelArm, start: list[float], offset: list[float]
) -> None:
    q = arm.HOME + np.array(start)
    position, matrix = kinematics.pose(q)
    found = kinematics.solve(q, position + np.array(offset), matrix)
    reached, turned = kinematics.pose(found)
    np.testing.assert_allclose(reached, position + np.array(offset), atol=1e-4)
    np.testing.assert_allclose(turned, matrix, atol=2e-3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    start=st.lists(st.floats(0, 1), min_size=7, max_size=7),
    goal=st.lists(st.floats(0, 1), min_size=7, max_size=7),
)
def test_no_limit_is_ever_passed(
    kinematics: ModelArm, start: list[float], goal: list[float]
) -> None:
    low, span = arm.JOINT_LOW, arm.JOINT_HIGH - arm.JOINT_LOW
    q = low + np.array(start) * span
    found = kinematics.solve(q, *kinematics.pose(low + np.array(goal) * span))
    assert (found >= low - 1e-9).all()
    assert (found <= arm.JOINT_HIGH + 1e-9).all()
    assert np.abs(found - q).max() <= 0.6 + 1e-9


def test_an_unreachable_pose_is_approached_inside_the_limits(kinematics: ModelArm) -> None:
    q = arm.HOME.copy()
    goal, upright = np.array([2.0, 0.0, 0.5]), np.eye(3)
    for _ in range(30):
        q = kinematics.solve(q, goal, upright)
        assert (q >= kinematics.low).all()
        assert (q <= kinematics.high).all()
    assert kinematics.pose(q)[0][0] > 0.8  # stretched out


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_expert_episodes_command_the_same_joints_as_the_simulation(
    kinematics: ModelArm, seed: int
) -> None:
    """Joint targets of whole episodes agree, with the start pose as the only common input."""
    world = env.TabletopEnv(cameras=())
    world.reset(seed=seed)
    rng = np.random.default_rng(seed)
    pose = CommandedPose(LIMITS, env.HOME_POSITION)
    q = world.data.ctrl[:7].copy()
    pose.reset(world.situation().command_position, rpy_matrix(world.situation().command_rpy))
    worst = 0.0
    for _ in range(60):
        action = world.expert_action()
        action[:6] = np.clip(action[:6] + rng.normal(0, 0.1, 6), -1, 1)
        world.advance(action)
        pose.advance(action[:6])
        q = kinematics.solve(q, pose.position, pose.matrix)
        pose.follow(*kinematics.pose(q))
        worst = max(worst, float(np.abs(q - world.data.ctrl[:7]).max()))
        np.testing.assert_allclose(pose.position, world.situation().command_position, atol=1e-6)
        np.testing.assert_allclose(pose.rpy, world.situation().command_rpy, atol=1e-6)
    assert worst < 1e-6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.floats(0, np.pi))
def test_turns_are_vectors_and_matrices(axis: list[float], angle: float) -> None:
    vector = angle * np.array(axis) / max(float(np.linalg.norm(axis)), 1e-3)
    matrix = turn_matrix(vector)
    np.testing.assert_allclose(turn_matrix(turn_vector(matrix)), matrix, atol=1e-6)
    np.testing.assert_allclose(
        rpy_matrix(rotate_rpy(np.array([0.1, 0.2, 0.3]), vector / 10)),
        turn_matrix(vector / 10) @ rpy_matrix(np.array([0.1, 0.2, 0.3])),
        atol=1e-9,
    )


def test_a_pose_turned_by_half_is_reached(kinematics: ModelArm) -> None:
    position, matrix = kinematics.pose(arm.HOME)
    q = arm.HOME + [0, 0, 0, 0, 0, 0, 1.9]
    for _ in range(20):
        q = kinematics.solve(q, position, turn_matrix(np.array([0, 0, 1.2])) @ matrix)
    np.testing.assert_allclose(kinematics.pose(q)[0], position, atol=1e-3)


def test_the_commanded_pose_gives_way_to_the_arm() -> None:
    pose = CommandedPose(LIMITS, env.HOME_POSITION)
    pose.reset(np.array([0.5, 0.0, 0.2]), np.eye(3))
    near = np.array([0.504, 0.0, 0.2])
    pose.follow(near, rpy_matrix(np.array([0.0, 0.0, 0.04])))
    assert pose.position.tolist() == [0.5, 0.0, 0.2]
    assert pose.rpy.tolist() == [0.0, 0.0, 0.0]
    pose.follow(near + 0.01, rpy_matrix(np.array([0.0, 0.0, 0.06])))
    np.testing.assert_allclose(pose.position, near + 0.01)
    np.testing.assert_allclose(pose.rpy, [0.0, 0.0, 0.06], atol=1e-9)


def test_a_yaw_limit_near_half_a_turn_is_not_jumped() -> None:
    pose = CommandedPose(replace(LIMITS, max_yaw=3.1), env.HOME_POSITION)
    pose.reset(env.HOME_POSITION, np.eye(3))
    for _ in range(200):
        pose.advance(np.array([0.0, 0, 0, 0, 0, 1]))
        assert 0 < pose.rpy[2] <= 3.1
    assert pose.rpy[2] == 3.1


def test_a_urdf_works_too_and_joints_keep_the_given_order(tmp_path: Path) -> None:
    path = tmp_path / "two.urdf"
    path.write_text(URDF)
    planar = ModelArm(path, "tip", ("b", "a"))
    assert planar.low.tolist() == [-1.0, -2.0]
    position, _ = planar.pose(np.array([np.pi / 2, 0.0]))  # b, a; c is not named and stays at 0
    np.testing.assert_allclose(position, [1.0, 1.0, 0.0], atol=1e-9)
    found = planar.solve(np.array([1.4, 0.1]), *planar.pose(np.array([1.5, 0.2])))
    np.testing.assert_allclose(found, [1.5, 0.2], atol=1e-2)


def test_bad_models_and_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelArm(tmp_path / "missing.xml", "tcp", JOINTS)
    (tmp_path / "broken.xml").write_text("<mujoco><body")
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelArm(tmp_path / "broken.xml", "tcp", JOINTS)
    with pytest.raises(ConfigError, match=r"joint8.* which has joint1, joint2"):
        ModelArm(SCENE, "tcp", ("joint8",))
    with pytest.raises(ConfigError, match="no site or body 'tool'; its sites are tcp"):
        ModelArm(SCENE, "tool", JOINTS)
    with pytest.raises(ConfigError, match="one position each"):
        ModelArm(SCENE, "tcp", ("cube_red",))


# ---- limits of a model ---------------------------------------------------------------------------


def chain(links: int) -> str:
    """Return a URDF with this number of links in a chain."""
    parts = ["<robot name='a'><link name='l0'/>"]
    for i in range(1, links):
        parts.append(
            f"<link name='l{i}'/><joint name='j{i}' type='revolute'><parent link='l{i - 1}'/>"
            f"<child link='l{i}'/><axis xyz='0 0 1'/><limit lower='-1' upper='1'/></joint>"
        )
    return "".join([*parts, "</robot>"])


def mjcf(inside: str, above: str = "") -> str:
    """Return an MJCF of one joint, with more elements in its body and before its bodies."""
    arm = "<body name='tip'><joint name='a' type='hinge' range='-1 1'/></body>"
    return f"<mujoco><compiler angle='radian'/>{above}<worldbody>{arm}{inside}</worldbody></mujoco>"


def model(folder: Path, text: str) -> ModelArm:
    (folder / "arm.xml").write_text(text)
    return ModelArm(folder / "arm.xml", "tip", ("a",))


BALL = "<body><geom size='1'/></body>"
NESTED = "<replicate count='1000'>" * 5 + BALL + "</replicate>" * 5
TEXTURE = "<texture type='2d' builtin='flat' width='99999' height='99999'/>"
COSTS = {
    "replicate": mjcf(NESTED),
    "composite": mjcf("<body><composite type='cable' count='9999999 1 1' size='1'/></body>"),
    "flexcomp": mjcf("<flexcomp name='f' type='grid' count='999 999 999' spacing='1 1 1'/>"),
    "a file of its own": mjcf("", "<asset><model name='m' file='/dev/zero'/></asset>"),
    "a texture": mjcf("", f"<asset>{TEXTURE}</asset>"),
    "memory": mjcf("", "<size memory='900G' nuserdata='2000000000' nuser_body='100000000'/>"),
    "numbers": mjcf("", "<custom><numeric name='n' size='2000000000'/></custom>"),
    "a mesh": mjcf(
        "<body><geom type='mesh' mesh='m'/></body>",
        "<asset><mesh name='m' file='/dev/zero'/></asset>",
    ),
    "a plugin": mjcf("", "<extension><plugin plugin='evil.library'/></extension>"),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_kinematics_does_not_need_costs_nothing(tmp_path: Path, name: str) -> None:
    arm_model = model(tmp_path, COSTS[name])
    assert (arm_model.low.tolist(), arm_model.high.tolist()) == ([-1.0], [1.0])
    np.testing.assert_array_equal(arm_model.pose(np.zeros(1))[0], np.zeros(3))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param(chain(20_000), "more than 1000 bodies", id="20,000 links"),
        pytest.param(mjcf("", "<default/>" * 2000), "more than 1000 bodies", id="2,000 defaults"),
        pytest.param(mjcf("<body/>" * 2000), "more than 1000 bodies", id="2,000 bodies"),
        pytest.param(mjcf("<body>" * 300 + "</body>" * 300), "nests more than 200", id="deep"),
        pytest.param(" " * 5_000_001, "more than 5 MB", id="large"),
        pytest.param("<!DOCTYPE a [<!ENTITY b 'c'>]><a/>", "has a document type", id="entities"),
        pytest.param(mjcf("", "<include file='arm.xml'/>"), "more than 49 files", id="in itself"),
        pytest.param(mjcf("<include file='/dev/zero'/>"), "not a folder, pipe", id="device"),
        pytest.param(mjcf("<include file='none.xml'/>"), "No such file", id="missing"),
        pytest.param(mjcf("<include/>"), "include without a file", id="no file"),
        pytest.param(mjcf("<body name='a'><joint name='a'/></body>"), "repeated name", id="twice"),
        pytest.param("<a/>", "cannot be read", id="another format"),
        pytest.param("<mujoco>" + "<!--" * 300_000, "cannot be read", id="comments without end"),
        pytest.param("\0", "cannot be read", id="no text"),
    ],
)
def test_models_that_cost_too_much_are_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        model(tmp_path, text)
    assert len(str(caught.value)) < 1000


def test_a_chain_of_the_longest_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "arm.urdf").write_text(chain(150))
    arm_model = ModelArm(tmp_path / "arm.urdf", "l149", ("j1", "j149"))
    assert arm_model.low.tolist() == [-1.0, -1.0]


def test_includes_stand_where_they_are_named(tmp_path: Path) -> None:
    """They have their own folder, comments as vendors write them, and an undeclared prefix."""
    whole = mjcf("<body name='other'><site name='point' pos='0 0 1' material='none'/></body>")
    before, _, after = whole.partition("<body name='other'>")
    part, _, end = after.partition("</body>")
    (tmp_path / "parts").mkdir()
    other = f"<mujocoinclude><body name='other' a:b='c'>{part}</body></mujocoinclude>"
    (tmp_path / "parts" / "other.xml").write_text(f"<!-- -- a -- -->\n{other}")
    arm_model = model(tmp_path, f"{before}<include file='parts/other.xml'/>{end}")
    (tmp_path / "arm.xml").write_text(f"{before}<include file='parts/other.xml'/>{end}")
    reached = ModelArm(tmp_path / "arm.xml", "point", ("a",)).pose(np.zeros(1))[0]
    assert arm_model.low.tolist() == [-1.0]
    np.testing.assert_allclose(reached, [0.0, 0.0, 1.0])


def test_what_a_comment_hides_is_not_built(tmp_path: Path) -> None:
    """MuJoCo gets only the parsed elements: it accepts a "<" in an attribute, XML does not."""
    hidden = mjcf(f"<body name='<!--'/>{NESTED}<body name='-->'/>")
    assert model(tmp_path, hidden).low.tolist() == [-1.0]
