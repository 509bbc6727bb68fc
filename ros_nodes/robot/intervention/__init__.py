"""Intervention: a person takes over from the policy with a device, one file per kind of device.

`person` decides who is in charge; `guides` and `twist_guide` make commands from what the person
wants. Importing this package registers the devices that it contains.
"""

from ceed_vla.ros_nodes.robot.intervention import joy, leader, twist

__all__ = ["joy", "leader", "twist"]
