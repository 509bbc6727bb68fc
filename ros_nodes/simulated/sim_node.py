"""The tabletop scene as a robot with the topics of a ros2_control arm and two cameras.

Physics and rendering share the single thread of the executor: two 96 px images take about 1 ms, a
period of physics 0.05 ms.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

if sys.platform == "linux":
    # Read when mujoco is imported; EGL renders without a screen.
    os.environ.setdefault("MUJOCO_GL", "egl")
# Without shared memory: a write to that of a killed process may block for a second, and the robot
# with it.
os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")

# messages is imported first, because its error explains a missing ROS.
from ceed_vla.ros_nodes.robot.messages import (  # noqa: I001
    COMMAND,
    LATCHED,
    SENSOR,
    array_to_image,
)

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import TwistStamped
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.time import Time
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import Image, JointState, Joy
from std_msgs.msg import Bool, Float64MultiArray, Header, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from ceed_vla.errors import ConfigError, SimulationError
from ceed_vla.ros_nodes.robot import parameters
from ceed_vla.ros_nodes.simulated.commands import obey
from ceed_vla.ros_nodes.simulated.parameters import SIM_PARAMETERS
from ceed_vla.ros_nodes.simulated.robot import JOINTS, SimRobot
from ceed_vla.ros_nodes.robot.diagnostics import status_message
from ceed_vla.ros_nodes.robot.spinning import end_process, run
from ceed_vla.sim.tabletop.scene import CAMERAS

JOINT_STATE_RATE = 100.0  # [Hz]
EXPERT_RATE = 50.0  # [Hz]
REFUSAL_SHOWN = 5.0  # time for which diagnostics warn of a refused command [s]
MAX_LAG = 0.25  # longest time caught up after a stall; the rest is skipped, or the arm leaps [s]


class SimNode(Node):
    """The simulated robot's node.

    `CeedVLAError`: The parameters contradict each other, or there is no GL context.
    """

    def __init__(self, **node_options: Any) -> None:
        super().__init__("sim", **node_options)
        parameters.declare_parameters(self, SIM_PARAMETERS)
        parameters.refuse_unknown(self)
        values = parameters.values(self, SIM_PARAMETERS)
        if values["real_time_factor"] != 1.0 and not values["publish_clock"]:
            raise ConfigError(
                f"real_time_factor is {values['real_time_factor']}; other nodes follow a faster or "
                "slower time only with publish_clock:=true here and use_sim_time:=true there."
            )
        if self.get_parameter("use_sim_time").value and not values["publish_clock"]:
            raise ConfigError(
                "use_sim_time is set, but this node is the simulation; set publish_clock too, or "
                "neither."
            )
        self._factor = values["real_time_factor"]
        self._publishes_clock = values["publish_clock"]
        self._robot = SimRobot(values["split"], values["image_size"], values["command_timeout"])
        self._wall_clock = Clock(clock_type=ClockType.SYSTEM_TIME)
        self._refused: dict[str, int] = {}
        self._last_refusal, self._refused_at = "", -math.inf
        self._solved = False
        self._make_topics()
        self._reset_episode()
        self._wall = time.monotonic()
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # independent of the system's time
        self.create_timer(1.0 / (JOINT_STATE_RATE * self._factor), self._tick, clock=steady)
        self._camera_timer = self.create_timer(
            self._camera_period, self._on_camera_time, clock=steady
        )
        self.create_timer(1.0, self._publish_diagnostics, clock=steady)
        if values["publish_expert"]:
            self._expert = self.create_publisher(Joy, "~/expert", COMMAND)
            self.create_timer(
                1.0 / (EXPERT_RATE * self._factor), self._publish_expert, clock=steady
            )
        self.add_on_set_parameters_callback(
            partial(parameters.refusal, SIM_PARAMETERS, configured=True)
        )
        self.add_post_set_parameters_callback(self._take_parameters)

    def _make_topics(self) -> None:
        self._joint_states = self.create_publisher(JointState, "joint_states", COMMAND)
        self._images = {
            name: self.create_publisher(Image, f"{name}/image_raw", SENSOR) for name in CAMERAS
        }
        self._success = self.create_publisher(Bool, "~/success", LATCHED)
        self._instruction = self.create_publisher(String, "policy/instruction", LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, "diagnostics", COMMAND)
        self._clock_topic = (
            self.create_publisher(ClockMessage, "/clock", SENSOR) if self._publishes_clock else None
        )
        robot = self._robot

        def move(message: Any) -> None:
            obey(robot, message, 1e-9 * self._now().nanoseconds)

        self._obey("forward_position_controller/commands", Float64MultiArray, move)
        self._obey(
            "gripper_controller/commands",
            Float64MultiArray,
            lambda told: robot.command_gripper(told.data),
        )
        self._obey("joint_trajectory_controller/joint_trajectory", JointTrajectory, move)
        self._obey("servo_node/delta_twist_cmds", TwistStamped, move)
        self.create_service(Trigger, "~/reset_episode", self._on_reset)

    def _obey(self, topic: str, message_type: Any, act: Callable[[Any], None]) -> None:
        """Pass every message of a command topic to `act`; count and log refused messages."""

        def callback(message: Any) -> None:
            self._catch_up()  # so that the command takes effect now, not at the last tick
            try:
                act(message)
            except SimulationError as error:
                self._refused[topic] = self._refused.get(topic, 0) + 1
                self._last_refusal = f"{topic}: {error}"
                self._refused_at = time.monotonic()
                self.get_logger().warning(f"Refused a command: {error}", throttle_duration_sec=1.0)

        self.create_subscription(message_type, topic, callback, COMMAND)

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self.get_parameter("advance_seed").value:
            self.set_parameters([Parameter("seed", value=self.get_parameter("seed").value + 1)])
        try:
            response.success, response.message = True, self._reset_episode()
        except SimulationError as error:
            response.success = False
            response.message = str(error)
        return response

    def _reset_episode(self) -> str:
        """Draw the scene for `task` and `seed`, publish it at once, and return the instruction."""
        seed = self.get_parameter("seed").value
        self._robot.reset(seed, self.get_parameter("task").value)
        self._solved = False
        self._wall = time.monotonic()
        self._success.publish(Bool(data=False))
        if self.get_parameter("publish_instruction").value:
            self._instruction.publish(String(data=self._robot.instruction))
        self._publish_joint_states()
        self._publish_images()
        self.get_logger().info(
            f"Episode of seed {seed}, {self._robot.family}: {self._robot.instruction}"
        )
        return self._robot.instruction

    def _take_parameters(self, changes: Sequence[Parameter]) -> None:
        if any(change.name == "camera_rate" for change in changes):
            self._camera_timer.timer_period_ns = round(1e9 * self._camera_period)

    @property
    def _camera_period(self) -> float:
        """Time between images, in real time [s]."""
        return 1.0 / (self.get_parameter("camera_rate").value * self._factor)

    def _now(self) -> Time:
        """The time of message stamps: simulated with publish_clock, else the system's."""
        return Time(seconds=self._robot.time) if self._publishes_clock else self._wall_clock.now()

    def _catch_up(self) -> None:
        wall = time.monotonic()
        self._robot.advance(min(wall - self._wall, MAX_LAG) * self._factor)
        self._wall = wall

    def _tick(self) -> None:
        self._catch_up()
        if self._clock_topic is not None:
            self._clock_topic.publish(ClockMessage(clock=self._now().to_msg()))
        self._publish_joint_states()
        if not self._solved and self._robot.success:
            self._solved = True
            self._success.publish(Bool(data=True))

    def _on_camera_time(self) -> None:
        self._catch_up()
        self._publish_images()

    def _publish_joint_states(self) -> None:
        message = JointState(
            header=Header(stamp=self._now().to_msg(), frame_id="base_link"), name=list(JOINTS)
        )
        message.position = self._robot.positions.tolist()
        message.velocity = self._robot.velocities.tolist()
        message.effort = self._robot.efforts.tolist()
        self._joint_states.publish(message)

    def _publish_images(self) -> None:
        stamp = self._now().to_msg()
        for name, pixels in self._robot.images().items():
            self._images[name].publish(
                array_to_image(pixels, stamp, f"{name}_camera_optical_frame")
            )

    def _publish_expert(self) -> None:
        """Publish what the scripted expert would do now."""
        action = self._robot.expert_action()
        opens = int(action[6] > 0.0)
        message = Joy(axes=action[:6].tolist(), buttons=[opens, 1 - opens])
        message.header.stamp = self._now().to_msg()
        self._expert.publish(message)

    def _publish_diagnostics(self) -> None:
        kinds = (Float64MultiArray, JointTrajectory, TwistStamped)
        topics = [
            subscription.topic_name
            for subscription in self.subscriptions
            if subscription.msg_type in kinds
        ]
        commanders = {topic: self.count_publishers(topic) for topic in topics}
        crowded = [topic for topic, count in commanders.items() if count > 1]
        level, message = DiagnosticStatus.OK, "running"
        if crowded:
            level = DiagnosticStatus.ERROR
            message = f"more than one node commands {', '.join(crowded)}"
        elif time.monotonic() - self._refused_at < REFUSAL_SHOWN:
            level = DiagnosticStatus.WARN
            message = f"refused a command: {self._last_refusal}"
        values = {
            "episode_seed": self.get_parameter("seed").value,
            "task": self._robot.family,
            "instruction": self._robot.instruction,
            "success": self._solved,
            "holds": self._robot.holds,
            **{f"commanders_of_{topic}": count for topic, count in commanders.items()},
            **{f"refused_on_{topic}": count for topic, count in self._refused.items()},
        }
        stamp = self._now().to_msg()
        name = f"{self.get_name()}: robot"
        self._diagnostics.publish(
            status_message(name, "tabletop simulation", level, message, values, stamp)
        )

    def destroy_node(self) -> None:
        self._robot.close()
        super().destroy_node()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; arguments and result are as in `run`."""
    # no other machine needs this robot
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    return run(SimNode, "sim_node", arguments)


def program() -> NoReturn:
    """Run the node as this process; entry point of ``sim_node``."""
    end_process(main())


if __name__ == "__main__":
    program()
