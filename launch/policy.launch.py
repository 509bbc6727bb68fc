"""Start the policy node alone, for a robot whose drivers and controllers already run.

ros2 launch ceed_vla policy.launch.py robot_config:=/path/to/robot.yaml
checkpoint:=/path/to/checkpoint
"""

from typing import Any

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS

CONFIG = PathJoinSubstitution([FindPackageShare("ceed_vla"), "launch", "config", "policy.yaml"])
# Launch arguments that set the node's parameter of the same name, which also describes them. A
# non-empty argument overrides `params_file`.
ARGUMENTS = (
    "checkpoint",
    "robot_config",
    "action_interface",
    "decoding",
    "discover_packages",
    "instruction",
    "autostart",
    "start_enabled",
    "dry_run",
    "inference_python",
    "device",
    "engine",
    "inference_url",
    "inference_key_file",
    "inference_ca_file",
    "command_rate",
    "blend_in",
    "max_joint_velocity",
    "max_joint_step",
)
DEFAULTS = {"autostart": "true", "start_enabled": "false"}  # always override `params_file`
PARAMETERS = {
    parameter.name: (type(parameter.default), parameter.description)
    for parameter in POLICY_PARAMETERS
    if parameter.name in ARGUMENTS
} | {"use_sim_time": (bool, "Follow /clock.")}
# Launch argument -> the input whose topic it replaces. A camera that is missing in the robot's file
# is an error.
TOPICS = {"front_topic": "front", "wrist_topic": "wrist", "joint_states_topic": "joint_states"}


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and start the node."""
    described = {
        "namespace": ("", "namespace of the node"),
        "params_file": (
            CONFIG,
            "parameters of the node; set arguments, autostart and start_enabled override them",
        ),
        **{name: (DEFAULTS.get(name, ""), text) for name, (_, text) in PARAMETERS.items()},
        "topics": (
            "",
            "topics of cameras with other names: top=/camera/image_raw,left=/left/image_raw",
        ),
        **{
            name: ("", f"topic of {source} instead of the robot's file's")
            for name, source in TOPICS.items()
        },
    }
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in described.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=policy_node)])


def policy_node(context: Any) -> list[Node]:
    """Build the node from the launch arguments."""
    names = {name: LaunchConfiguration(name) for name in (*PARAMETERS, "topics", *TOPICS)}
    passed = {name: value for name, value in names.items() if value.perform(context)}
    overrides = {
        name: ParameterValue(passed[name], value_type=PARAMETERS[name][0])
        for name in passed
        if name in PARAMETERS
    }
    topics = [
        part for name in passed if name in TOPICS for part in (f",{TOPICS[name]}=", passed[name])
    ]
    if topics or "topics" in passed:
        overrides["topics"] = ParameterValue([names["topics"], *topics], value_type=str)
    return [
        Node(
            package="ceed_vla",
            executable="policy_node",
            name="policy",
            namespace=LaunchConfiguration("namespace"),
            parameters=[LaunchConfiguration("params_file"), overrides],
            output="screen",
            on_exit=Shutdown(),
        )
    ]
