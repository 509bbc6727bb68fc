"""``forward_command_controller``."""

from __future__ import annotations

from typing import Any

from ceed_vla.ros_nodes.robot.interfaces.base import (
    ActionInterface,
    Command,
    CommandedArm,
    register_interface,
)


@register_interface("forward_position")
class ForwardPosition(ActionInterface):
    """Sends the positions, in the controller's fixed order of joints."""

    message_type = "std_msgs/msg/Float64MultiArray"

    def message(self, command: Command, arm: CommandedArm) -> Any:
        return self.message_class(data=command.positions.tolist())
