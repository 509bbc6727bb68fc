"""The simulated robot without ROS: interfaces, refusals, and rest after commands stop."""

from __future__ import annotations

import numpy as np
import pytest
from denavit_hartenberg import forward_kinematics

from ceed_vla.errors import SimulationError
from ceed_vla.kinematics import matrix_rpy
from ceed_vla.ros_nodes.simulated.robot import ARM_JOINTS, SimRobot
from ceed_vla.sim.tabletop import arm
from ceed_vla.sim.tabletop.env import TabletopEnv
from ceed_vla.sim.tabletop.scene import FINGER_STROKE

AT_REST = 0.05  # [rad/s]
PERIOD = 0.01  # [s]


@pytest.fixture(scope="module")
def shared() -> SimRobot:
    return SimRobot()


@pytest.fixture
def robot(shared: SimRobot) -> SimRobot:
    shared.reset(seed=3, task="cube_in_bin")
    return shared


def speed(robot: SimRobot) -> float:
    """Return the largest arm joint speed [rad/s]."""
    return float(np.abs(robot.velocities[:7]).max())


def move(robot: SimRobot, steps: int = 30, rate: float = 1.0) -> np.ndarray:
    """Drive all joints slightly at 100 Hz; return the last command (7,)."""
    wanted = robot.positions[:7]
    for _ in range(steps):
        wanted = wanted + rate * PERIOD * np.array([1.0, 0.3, 0.2, 0.0, 0.2, 0.5, 1.0])
        robot.command_positions(wanted)
        robot.advance(PERIOD)
    return wanted


def test_a_seed_gives_the_scene_and_instruction_of_the_environment(robot: SimRobot) -> None:
    env = TabletopEnv(task="mixed", cameras=("front", "wrist"))
    observation, info = env.reset(seed=11)
    assert robot.reset(seed=11) == info["instruction"]
    images = robot.images()
    for camera, image in observation["pixels"].items():
        np.testing.assert_array_equal(images[camera], image)
    assert robot.family == env.family
    env.close()


def test_the_same_joint_targets_solve_what_the_environment_solves(robot: SimRobot) -> None:
    env = TabletopEnv(task="mixed", cameras=())
    env.reset(seed=4)
    robot.reset(seed=4)
    holds, deviation = robot.holds, 0.0
    for _ in range(60):
        start = env.data.ctrl[:7].copy()
        env.advance(env.expert_action())
        robot.command_gripper([2 * FINGER_STROKE if env.gripper_open else 0.0])
        for tick in range(10):
            robot.command_positions(start + (env.data.ctrl[:7] - start) * (tick + 1) / 10)
            robot.advance(PERIOD)
        deviation = max(deviation, float(np.abs(env.data.qpos[:7] - robot.positions[:7]).max()))
        if env.is_success():
            break
    assert robot.holds == holds  # no gap between commands
    robot.advance(0.1)
    assert robot.success
    assert deviation < 0.01


def test_time_passes_in_whole_physics_steps_and_nothing_is_lost(robot: SimRobot) -> None:
    before = robot.time
    for _ in range(100):
        robot.advance(PERIOD)
    assert robot.time - before == pytest.approx(1.0, abs=0.004)
    robot.advance(-1.0)
    assert robot.time - before == pytest.approx(1.0, abs=0.004)


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_rests_within_100_ms_when_position_commands_stop(robot: SimRobot, rate: float) -> None:
    holds = robot.holds
    move(robot, rate=rate)
    assert speed(robot) > 0.5 * rate
    robot.advance(0.1)
    assert speed(robot) < AT_REST
    assert robot.holds == holds + 1
    rest = robot.positions
    robot.advance(1.0)
    np.testing.assert_allclose(robot.positions, rest, atol=0.01)


def test_commands_beyond_the_joint_limits_stop_at_them(robot: SimRobot) -> None:
    for _ in range(300):
        robot.command_positions(arm.JOINT_HIGH + 1.0)
        robot.advance(PERIOD)
    assert (robot.positions[:7] <= arm.JOINT_HIGH + 0.01).all()


def test_the_gripper_keeps_its_command_when_the_arm_holds(robot: SimRobot) -> None:
    robot.command_gripper([0.0])
    move(robot, steps=50)
    robot.advance(1.0)
    assert robot.positions[7:].sum() < 0.005
    robot.command_gripper([1.0])
    robot.advance(1.0)
    assert robot.positions[7:].sum() == pytest.approx(2 * FINGER_STROKE, abs=0.005)


@pytest.mark.parametrize(
    "wrong", [[0.0] * 6, [[0.0] * 7], [0.0] * 6 + [float("nan")], [], ["a"] * 7]
)
def test_refuses_positions_that_are_not_seven_numbers(robot: SimRobot, wrong: object) -> None:
    before = robot.positions
    with pytest.raises(SimulationError, match=r"joint positions"):
        robot.command_positions(wrong)  # type: ignore[arg-type]
    robot.advance(0.2)
    np.testing.assert_allclose(robot.positions, before, atol=1e-3)


def test_trajectory_reaches_its_last_point_on_time_and_rests(robot: SimRobot) -> None:
    start = robot.positions[:7]
    goal = start + 0.1
    names = list(reversed(ARM_JOINTS))  # matched by name, not by place
    zero = np.zeros((2, 7))
    robot.command_trajectory(names, [0.2, 0.4], [(start + 0.05)[::-1], goal[::-1]], zero)
    robot.advance(0.2)
    assert speed(robot) < 0.3  # the middle point requests rest
    robot.advance(0.4)
    np.testing.assert_allclose(robot.positions[:7], goal, atol=2e-3)
    assert speed(robot) < AT_REST
    robot.advance(2.0)
    np.testing.assert_allclose(robot.positions[:7], goal, atol=2e-3)


def test_trajectory_in_progress_is_replaced_without_a_jump(robot: SimRobot) -> None:
    start, names = robot.positions[:7], list(ARM_JOINTS)
    path, tick = [], 0.005
    # replanned every 20 ms towards a moving goal: the set-point must stay smooth
    for index in range(20):
        goal = start + 0.5 * (0.02 * index + 0.1)
        robot.command_trajectory(names, [0.1, 0.2], [goal, goal], np.array([[0.5] * 7, [0.0] * 7]))
        for _ in range(4):
            robot.advance(tick)
            path.append(robot._env.data.ctrl[:7].copy())
    steps = np.abs(np.diff(np.array(path[20:]), axis=0))
    assert steps.max() < 2.0 * 0.5 * 0.008  # two physics steps at the commanded speed, with room


@pytest.mark.parametrize(
    ("names", "times", "velocities", "delay", "message"),
    [
        (ARM_JOINTS[:6], [0.1, 0.2], None, 0.0, "names joints"),
        ((*ARM_JOINTS[:6], "elbow"), [0.1, 0.2], None, 0.0, "elbow"),
        ((*ARM_JOINTS[:6], "joint1"), [0.1, 0.2], None, 0.0, "names joints"),
        (ARM_JOINTS, [0.2, 0.2], None, 0.0, "increase strictly"),
        (ARM_JOINTS, [-0.1, 0.2], None, 0.0, "negative"),
        (ARM_JOINTS, [0.1, float("nan")], None, 0.0, "increase strictly"),
        (ARM_JOINTS, [0.1, 0.2], np.ones((2, 7)), 0.0, "must rest"),
        (ARM_JOINTS, [0.1, 0.2], None, -1.0, "past"),
        (ARM_JOINTS, [0.1], None, 0.0, "shape"),
    ],
)
def test_refuses_what_a_trajectory_controller_refuses(
    robot: SimRobot,
    names: tuple[str, ...],
    times: list[float],
    velocities: object,
    delay: float,
    message: str,
) -> None:
    points = np.tile(robot.positions[:7], (2, 1))
    with pytest.raises(SimulationError, match=message):
        robot.command_trajectory(list(names), times, points, velocities, delay)  # type: ignore[arg-type]


def test_empty_trajectory_stops_the_arm(robot: SimRobot) -> None:
    goal = robot.positions[:7] + 1.0
    robot.command_trajectory(list(ARM_JOINTS), [1.0], [goal], None)
    robot.advance(0.5)
    assert speed(robot) > 0.3
    robot.command_trajectory([], [], [])
    robot.advance(0.15)
    assert speed(robot) < AT_REST


def test_twist_moves_the_tool_straight_and_stops_with_the_commands(robot: SimRobot) -> None:
    start, rotation = forward_kinematics(robot.positions[:7])
    for _ in range(50):
        robot.command_twist([0.0, 0.0, 0.1], [0.0, 0.0, 0.4])
        robot.advance(PERIOD)
    robot.advance(0.3)
    end, turned = forward_kinematics(robot.positions[:7])
    # minus its lag when it was stopped
    assert end - start == pytest.approx([0.0, 0.0, 0.05], abs=0.012)
    yaw = matrix_rpy(turned)[2] - matrix_rpy(rotation)[2]
    assert yaw == pytest.approx(0.2, abs=0.05)
    assert speed(robot) < AT_REST


def test_refuses_bad_twists_tasks_seeds_and_settings(robot: SimRobot) -> None:
    with pytest.raises(SimulationError, match="linear"):
        robot.command_twist([0.0, float("inf"), 0.0], [0.0] * 3)
    with pytest.raises(SimulationError, match="gripper"):
        robot.command_gripper([0.0, 0.0])
    with pytest.raises(SimulationError, match="cube_in_bin"):
        robot.reset(0, task="juggle")
    with pytest.raises(SimulationError, match="seed"):
        robot.reset(-1)
    with pytest.raises(SimulationError, match="command_timeout"):
        SimRobot(command_timeout=0.0)
    with pytest.raises(SimulationError, match="split"):
        SimRobot(split="test")


def test_reset_forgets_the_motion_before(robot: SimRobot) -> None:
    move(robot)
    time = robot.time
    robot.reset(seed=5)
    rest = robot.positions
    robot.advance(0.3)
    np.testing.assert_allclose(robot.positions, rest, atol=1e-3)
    assert robot.time >= time
