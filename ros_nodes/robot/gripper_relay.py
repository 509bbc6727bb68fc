"""Node between the policy node's gripper topic and a gripper driver that only has an action.

It sends every new opening as a goal of ``control_msgs/action/GripperCommand``, which replaces the
goal before. An opening is sent while it is new: after a stop, a driver that starts again gets none
until somebody commands one. With `joint`, it publishes the position of the driver's last feedback
as joint states at 50 Hz, from the first feedback on; so the gripper must be commanded once after
every start of the driver.
"""

# ceed_vla.ros_nodes.robot.messages is imported first, because its error explains a missing ROS.
from __future__ import annotations  # noqa: I001

import math
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from ceed_vla.ros_nodes.robot.messages import COMMAND

from action_msgs.msg import GoalStatus
from rclpy.action import ActionClient
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot import parameters
from ceed_vla.ros_nodes.robot.parameters import START, NodeParameter
from ceed_vla.ros_nodes.robot.ros_types import message_class
from ceed_vla.ros_nodes.robot.spinning import end_process, run

# Time for which an opening is sent [s]; the policy node repeats its own every 0.1 s in motion.
NEW = 0.5

RELAY_PARAMETERS = (
    NodeParameter(
        "topic",
        "gripper_controller/commands",
        "Topic of commands (std_msgs/Float64MultiArray), gripper.topic of the robot's file.",
        START,
    ),
    NodeParameter(
        "action",
        "gripper_controller/gripper_cmd",
        "Action of the driver.",
        START,
    ),
    NodeParameter(
        "action_type", "control_msgs/action/GripperCommand", "Type of the action.", START
    ),
    NodeParameter(
        "scale",
        1.0,
        "Position of the driver = scale x command + offset. A command is an opening [m], or with "
        "gripper.command joint the position of the joint.",
        START,
    ),
    NodeParameter("offset", 0.0, "See scale.", START),
    NodeParameter("max_effort", 20.0, "Effort of every goal [N].", START, (0, 10000)),
    NodeParameter(
        "tolerance",
        0.001,
        "Smallest change of the command that is sent.",
        START,
        (0, 1),
    ),
    NodeParameter(
        "joint",
        "",
        "Publish the driver's position on joint_states under this name, in the unit of the "
        "commands; for a driver that does not publish it. Empty: do not publish.",
        START,
    ),
)


class GripperRelay(Node):
    """The relay; see the module. `ConfigError`: The action type is not installed."""

    def __init__(self, **node_options: Any) -> None:
        super().__init__("gripper_relay", **node_options)
        parameters.declare_parameters(self, RELAY_PARAMETERS)
        parameters.refuse_unknown(self)
        values = parameters.values(self, RELAY_PARAMETERS)
        if not values["scale"]:
            raise ConfigError("scale is 0; the position of the driver must depend on the opening.")
        self._scale = values["scale"]
        self._offset = values["offset"]
        self._effort = values["max_effort"]
        self._tolerance = values["tolerance"]
        self._joint = values["joint"]
        self._wanted: float | None = None  # newest opening [m]
        self._arrived = -math.inf  # its steady time [s]
        self._sent: float | None = None  # opening of the last goal [m]
        try:
            self._type = message_class(values["action_type"])
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"The action type {values['action_type']} is not installed ({error}); install its "
                "package, for example ros-jazzy-control-msgs."
            ) from error
        self._client = ActionClient(self, self._type, values["action"])
        self._states = (
            self.create_publisher(JointState, "joint_states", COMMAND) if self._joint else None
        )
        commands = self.create_subscription(
            Float64MultiArray, values["topic"], self._on_opening, COMMAND
        )
        self._topic = commands.topic_name
        self._opening: float | None = None  # newest feedback [m]
        self.create_timer(0.1, self._send)
        if self._states is not None:
            self.create_timer(0.02, self._publish)

    def _on_opening(self, message: Float64MultiArray) -> None:
        if len(message.data) != 1 or not math.isfinite(message.data[0]):
            self.get_logger().warning(
                f"An opening is {list(message.data)}; it must be one finite number.",
                throttle_duration_sec=1.0,
            )
            return
        self._wanted = float(message.data[0])
        self._arrived = time.monotonic()

    def _send(self) -> None:
        """Send the newest opening, unless the last goal has it or it is old."""
        if time.monotonic() - self._arrived > NEW:
            self._wanted = None
        wanted = self._wanted
        ready = self._client.server_is_ready()
        if not ready:
            self._sent = None  # a driver that starts again gets a repeated opening again
            self._opening = None  # and may have moved the gripper
        if wanted is None:
            return
        if not ready:
            self.get_logger().warning(
                "The gripper's action server is not there.", throttle_duration_sec=5.0
            )
            return
        if self._sent is not None and abs(wanted - self._sent) < max(self._tolerance, 1e-9):
            return
        self._sent = wanted
        goal = self.make_goal(self._scale * wanted + self._offset)
        future = self._client.send_goal_async(
            goal, feedback_callback=lambda message: self._tell(message.feedback)
        )
        future.add_done_callback(lambda done: self._on_answer(done, wanted))

    def _on_answer(self, done: Any, wanted: float) -> None:
        handle = done.result()
        if not handle.accepted:
            self.get_logger().warning(f"The gripper refused the opening {wanted:g} m.")
            if self._sent == wanted:
                self._sent = None  # try again
            return
        handle.get_result_async().add_done_callback(lambda done: self._on_result(done.result()))

    def _on_result(self, answer: Any) -> None:
        """Take the position of a goal that ended by itself.

        The result of a replaced goal may be blank, and so may that of one that failed otherwise
        than by a stall.
        """
        stalled = getattr(answer.result, "stalled", False)
        aborted = answer.status == GoalStatus.STATUS_ABORTED
        if answer.status == GoalStatus.STATUS_SUCCEEDED or (aborted and stalled):
            self._tell(answer.result)

    def _tell(self, message: Any) -> None:
        """Take a position of the driver."""
        position = self.position_of(message)
        if position is not None:
            self._opening = (position - self._offset) / self._scale

    def _publish(self) -> None:
        """Publish the last position of the driver."""
        if self._states is None or not self._client.server_is_ready():
            return
        if self._opening is None:
            self.get_logger().warning(
                f"The position of {self._joint} is unknown until the gripper was commanded once: "
                f'ros2 topic pub -1 {self._topic} std_msgs/msg/Float64MultiArray "{{data: [...]}}"',
                throttle_duration_sec=10.0,
            )
            return
        states = JointState(name=[self._joint], position=[self._opening])
        states.header.stamp = self.get_clock().now().to_msg()
        self._states.publish(states)

    def make_goal(self, position: float) -> Any:
        """The goal of a position of the driver."""
        goal = self._type.Goal()
        goal.command.position = position
        goal.command.max_effort = self._effort
        return goal

    def position_of(self, message: Any) -> float | None:
        """The position in a feedback or a result; None if it has none."""
        return float(message.position)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; arguments and result are as in `run`."""
    return run(GripperRelay, "gripper_relay", arguments)


def program() -> NoReturn:
    """Run the node as this process; entry point of ``gripper_relay``."""
    end_process(main())


if __name__ == "__main__":
    program()
