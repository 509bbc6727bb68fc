"""The simulated robot as a process: topics, the three interfaces, episodes, and rest after its
commander is killed.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TwistStamped
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ceed_vla.ros_nodes.robot.messages import LATCHED, SENSOR, image_to_array, seconds
from ceed_vla.ros_nodes.robot.pose_trust import by_name
from ceed_vla.ros_nodes.simulated import sim_node
from ceed_vla.sim.tabletop.env import TabletopEnv

ARM = [f"joint{index}" for index in range(1, 8)]
AT_REST = 0.05  # [rad/s]

# A commander in a separate process: moves the arm at 100 Hz until it is killed.
COMMANDER = """
import time, rclpy
from std_msgs.msg import Float64MultiArray
rclpy.init()
node = rclpy.create_node("commander")
publisher = node.create_publisher(Float64MultiArray, "/forward_position_controller/commands", 10)
q, start = {start}, time.monotonic()
while True:
    moved = 1.0 * (time.monotonic() - start)
    publisher.publish(Float64MultiArray(data=[q[0] + moved, *q[1:6], q[6] + moved]))
    time.sleep(0.01)
"""


def positions(states: list[JointState]) -> np.ndarray:
    """Return the arm joints (7,) of the newest state [rad]."""
    return by_name(states[-1].name, states[-1].position, ARM, "positions")


def speed(state: JointState) -> float:
    """Return the largest arm joint speed [rad/s]."""
    return float(np.abs(by_name(state.name, state.velocity, ARM, "velocities")).max())


def ready(graph: Any, *arguments: str) -> list[JointState]:
    """Start the simulated robot; return the growing list of its joint states."""
    states = graph.listen("/joint_states", JointState)
    graph.start("sim_node", *arguments)
    graph.wait(lambda: states, "joint states")
    return states


def test_publishes_what_a_robot_publishes(graph: Any) -> None:
    images = {
        name: graph.listen(f"/{name}/image_raw", Image, SENSOR) for name in ("front", "wrist")
    }
    instruction = graph.listen("/policy/instruction", String, LATCHED)
    success = graph.listen("/sim/success", Bool, LATCHED)
    diagnostics = graph.listen("/diagnostics", DiagnosticArray)
    states = ready(graph, "-p", "seed:=5", "-p", "task:=push_cube")
    graph.wait(
        lambda: instruction and success and diagnostics and all(images.values()), "all topics"
    )

    env = TabletopEnv(task="mixed")
    observation, info = env.reset(seed=5, options={"task": "push_cube"})
    env.close()
    assert instruction[-1].data == info["instruction"]
    assert success[-1].data is False
    assert list(states[0].name) == [*ARM, "finger_left", "finger_right"]
    assert len(states[0].velocity) == 9
    for name, messages in images.items():
        assert messages[0].encoding == "rgb8"
        assert (
            np.abs(image_to_array(messages[0]).astype(int) - observation["pixels"][name]).mean()
            < 1.0
        )
        assert abs(seconds(messages[-1].header.stamp) - time.time()) < 5.0

    count, shots, start = len(states), len(images["front"]), time.monotonic()
    graph.spin(2.0)
    elapsed = time.monotonic() - start
    assert 60.0 < (len(states) - count) / elapsed < 120.0  # 100 Hz, with room for a busy machine
    assert 10.0 < (len(images["front"]) - shots) / elapsed < 40.0  # 30 Hz
    stamps = [seconds(state.header.stamp) for state in states]
    assert all(later > earlier for earlier, later in itertools.pairwise(stamps))
    values = {value.key: value.value for value in diagnostics[-1].status[0].values}
    assert values["episode_seed"] == "5"
    assert values["commanders_of_/forward_position_controller/commands"] == "0"


@pytest.mark.parametrize(("given", "used"), [(None, "LOCALHOST"), ("SUBNET", "SUBNET")])
def test_only_this_machine_finds_it_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None, used: str
) -> None:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", given or "")
    if given is None:
        monkeypatch.delenv("ROS_AUTOMATIC_DISCOVERY_RANGE")
    monkeypatch.setattr(sim_node, "run", lambda *_: os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"])
    assert str(sim_node.main()) == used


@pytest.mark.slow
def test_reset_starts_the_episode_that_the_parameters_name(graph: Any) -> None:
    instruction = graph.listen("/policy/instruction", String, LATCHED)
    states = ready(graph, "-p", "seed:=1")
    assert all(
        result.successful for result in graph.set_parameters("/sim", seed=8, task="stack_cubes")
    )
    response = graph.call("/sim/reset_episode", Trigger)
    assert response.success
    env = TabletopEnv(task="mixed", cameras=())
    env.reset(seed=8, options={"task": "stack_cubes"})
    assert response.message == env.instruction
    graph.wait(lambda: instruction and instruction[-1].data == env.instruction, "the instruction")
    graph.spin(0.2)
    np.testing.assert_allclose(positions(states), env.data.qpos[:7], atol=2e-3)

    (refused,) = graph.set_parameters("/sim", task="juggle")
    assert not refused.successful
    assert "cube_in_bin" in refused.reason
    (refused,) = graph.set_parameters("/sim", seed=-3)
    assert not refused.successful
    (refused,) = graph.set_parameters("/sim", split="heldout")
    assert not refused.successful  # read-only
    graph.set_parameters("/sim", advance_seed=True, seed=20, task="mixed")
    env.reset(seed=21)
    assert graph.call("/sim/reset_episode", Trigger).message == env.instruction
    env.close()


def test_obeys_positions_gripper_and_refuses_nonsense(graph: Any) -> None:
    diagnostics = graph.listen("/diagnostics", DiagnosticArray)
    states = ready(graph, "-p", "seed:=1")
    arm = graph.node.create_publisher(
        Float64MultiArray, "/forward_position_controller/commands", 10
    )
    hand = graph.node.create_publisher(Float64MultiArray, "/gripper_controller/commands", 10)
    graph.wait(lambda: arm.get_subscription_count() and hand.get_subscription_count(), "discovery")
    goal = positions(states) + 0.1
    for _ in range(60):
        arm.publish(Float64MultiArray(data=goal.tolist()))
        graph.spin(0.01)
    np.testing.assert_allclose(positions(states), goal, atol=5e-3)
    hand.publish(Float64MultiArray(data=[0.0]))
    graph.wait(lambda: sum(states[-1].position[7:]) < 0.005, "the fingers to close")

    arm.publish(Float64MultiArray(data=[0.0] * 6))
    arm.publish(Float64MultiArray(data=[float("nan")] * 7))
    graph.wait(
        lambda: any(
            value.key == "refused_on_forward_position_controller/commands" and value.value == "2"
            for message in diagnostics
            for value in message.status[0].values
        ),
        "the refusals in the diagnostics",
    )
    assert "not finite" in diagnostics[-1].status[0].message
    np.testing.assert_allclose(positions(states), goal, atol=5e-3)


@pytest.mark.slow
def test_obeys_trajectories_and_twists(graph: Any) -> None:
    states = ready(graph, "-p", "seed:=1")
    follow = graph.node.create_publisher(
        JointTrajectory, "/joint_trajectory_controller/joint_trajectory", 10
    )
    twist = graph.node.create_publisher(TwistStamped, "/servo_node/delta_twist_cmds", 10)
    graph.wait(
        lambda: follow.get_subscription_count() and twist.get_subscription_count(), "discovery"
    )
    goal = positions(states) + 0.1
    point = JointTrajectoryPoint(positions=goal.tolist(), velocities=[0.0] * 7)
    point.time_from_start.nanosec = 300_000_000
    follow.publish(JointTrajectory(joint_names=ARM, points=[point]))
    graph.wait(lambda: np.abs(positions(states) - goal).max() < 5e-3, "the end of the trajectory")

    message = TwistStamped()
    message.header.frame_id = "base_link"
    message.twist.angular.z = 1.0
    for _ in range(40):
        twist.publish(message)
        graph.spin(0.01)
    graph.spin(0.3)
    assert np.abs(positions(states) - goal).max() > 0.1
    assert speed(states[-1]) < AT_REST


@pytest.mark.slow
def test_killing_the_commander_in_mid_motion_leaves_the_arm_at_rest(graph: Any) -> None:
    """``ceed-vla ros-demo --kill true`` measures the time; here the arm must not go far."""
    states = ready(graph, "-p", "seed:=1")
    program = COMMANDER.format(start=positions(states).tolist())
    environment = os.environ | {"ROS_DOMAIN_ID": str(graph.domain)}
    commander = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        graph.wait(lambda: speed(states[-1]) > 0.5, "the arm to move")
        commander.send_signal(signal.SIGKILL)
        killed = positions(states)
    finally:
        commander.kill()
        commander.wait()
    graph.wait(lambda: speed(states[-1]) < AT_REST, "the arm to rest", timeout=5.0)
    graph.spin(0.5)
    rest = positions(states)
    np.testing.assert_allclose(rest, killed, atol=0.3)
    graph.spin(0.5)
    np.testing.assert_allclose(positions(states), rest, atol=2e-3)


@pytest.mark.slow
def test_simulated_time_runs_faster_on_demand(graph: Any) -> None:
    clock = graph.listen("/clock", Clock, SENSOR)
    states = ready(graph, "-p", "publish_clock:=true", "-p", "real_time_factor:=3.0")
    graph.wait(lambda: clock, "the clock")
    first, start = seconds(clock[-1].clock), time.monotonic()
    graph.spin(1.0)
    factor = (seconds(clock[-1].clock) - first) / (time.monotonic() - start)
    assert 2.0 < factor < 3.5
    assert seconds(states[-1].header.stamp) < 60.0  # stamped with simulated, not with system time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "task:=juggle"), "juggle"),
        (("-p", "real_time_factor:=2.0"), "publish_clock"),
        (("-p", "use_sim_time:=true"), "publish_clock"),
        (("-p", "image_size:=7"), "image_size"),
    ],
)
def test_impossible_parameters_end_it_with_one_line(
    graph: Any, arguments: tuple[str, ...], message: str
) -> None:
    process = graph.start("sim_node", *arguments)
    assert process.wait(30.0) == 1
    assert message in graph.output("sim_node")
    assert "Traceback" not in graph.output("sim_node")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly(graph: Any, how: signal.Signals) -> None:
    ready(graph)
    assert graph.stop("sim_node", how) == 0
    assert "Traceback" not in graph.output("sim_node")
