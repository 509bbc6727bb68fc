"""The policy node alone, for a robot whose drivers and controllers run already.

ros2 launch ceed_vla policy.launch.py robot_config:=/path/to/robot.yaml checkpoint:=/path/to/checkpoint
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, Shutdown
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from ros_nodes.robot.policy_parameters import POLICY_PARAMETERS

CONFIG = PathJoinSubstitution([FindPackageShare("ceed_vla"), "launch", "config", "policy.yaml"])
# Arguments that override the parameters of their names, which describe them, whatever `params_file` says.
ARGUMENTS = (
    "checkpoint", "robot_config", "action_interface", "decoding", "discover_packages", "instruction", "autostart",
    "start_enabled", "dry_run", "inference_python", "device", "engine", "command_rate", "blend_in",
    "max_joint_velocity", "max_joint_step",
)  # fmt: skip
DEFAULTS = {"autostart": True, "start_enabled": False}  # where they are not the parameters' own
PARAMETERS = {
    parameter.name: (DEFAULTS.get(parameter.name, parameter.default), parameter.description)
    for parameter in POLICY_PARAMETERS
    if parameter.name in ARGUMENTS
} | {"use_sim_time": (False, "Follow /clock.")}
# Argument -> what it replaces the topic of; a camera that the robot's file does not have is an error.
TOPICS = {"front_topic": "front", "wrist_topic": "wrist", "joint_states_topic": "joint_states"}


def generate_launch_description() -> LaunchDescription:
    """One node."""
    described = {
        "namespace": ("", "namespace of the node"),
        "params_file": (CONFIG, "parameters of the node"),
        **{name: (str(default).lower(), text) for name, (default, text) in PARAMETERS.items()},
        "topics": ("", "topics of cameras with other names: top=/camera/image_raw,left=/left/image_raw"),
        **{name: ("", f"topic of {source} instead of the robot's file's") for name, source in TOPICS.items()},
    }
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in described.items()
    ]
    overrides = {
        name: ParameterValue(LaunchConfiguration(name), value_type=type(default))
        for name, (default, _) in PARAMETERS.items()
    }
    replaced = [part for name, source in TOPICS.items() for part in (f",{source}=", LaunchConfiguration(name))]
    overrides["topics"] = ParameterValue([LaunchConfiguration("topics"), *replaced], value_type=str)
    policy = Node(
        package="ceed_vla",
        executable="policy_node",
        name="policy",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), overrides],
        output="screen",
        on_exit=Shutdown(),
    )
    return LaunchDescription([*arguments, policy])
