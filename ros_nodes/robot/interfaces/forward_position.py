"""``forward_command_controller``."""

from __future__ import annotations

from std_msgs.msg import Float64MultiArray

from ceed_vla.ros_nodes.robot.interfaces.base import (
    ActionInterface,
    Command,
    CommandedArm,
    register_interface,
)


@register_interface("forward_position")
class ForwardPosition(ActionInterface):
    """Sends the positions, in the controller's fixed order of joints."""

    message_type = Float64MultiArray

    def message(self, command: Command, arm: CommandedArm) -> Float64MultiArray:
        return Float64MultiArray(data=command.positions.tolist())
