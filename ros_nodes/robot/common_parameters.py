"""Parameters that several nodes of a robot have."""

from ceed_vla.ros_nodes.robot.parameters import START, NodeParameter

# Declared first, because the packages register choices of other parameters.
DISCOVER_PACKAGES = NodeParameter(
    "discover_packages",
    "",
    "Your Python packages, comma-separated, that register interfaces, backbones, decoders, ...",
    START,
)
ROBOT_CONFIG = NodeParameter(
    "robot_config",
    "",
    "YAML file of the robot (topics, joints, limits); empty: the simulated arm.",
)
TOPICS = NodeParameter(
    "topics",
    "",
    "Topics that replace those in the robot's file, for example "
    "front=/camera/image_raw, joint_states=/left/joint_states.",
)
AUTOSTART = NodeParameter(
    "autostart",
    False,
    "Configure and activate the node at the start, without a lifecycle manager.",
    START,
)
