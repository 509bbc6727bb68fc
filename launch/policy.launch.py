"""The policy node alone, for a robot whose drivers and controllers run already.

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
# Arguments that are parameters of the node, which describe them. One that is given overrides
# `params_file`,
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
    "command_rate",
    "blend_in",
    "max_joint_velocity",
    "max_joint_step",
)
DEFAULTS = {"autostart": "true", "start_enabled": "false"}  # and these do so always
PARAMETERS = {
    parameter.name: (type(parameter.default), parameter.description)
    for parameter in POLICY_PARAMETERS
    if parameter.name in ARGUMENTS
} | {"use_sim_time": (bool, "Follow /clock.")}
# Argument -> what it replaces the topic of; a camera that the robot's file does not have is an
# error.
TOPICS = {"front_topic": "front", "wrist_topic": "wrist", "joint_states_topic": "joint_states"}


def generate_launch_description() -> LaunchDescription:
    """One node."""
    described = {
        "namespace": ("", "namespace of the node"),
        "params_file": (
            CONFIG,
            "parameters of the node; given arguments, autostart and start_enabled override them",
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
    """The node with what the arguments say."""
    names = {name: LaunchConfiguration(name) for name in (*PARAMETERS, "topics", *TOPICS)}
    given = {name: value for name, value in names.items() if value.perform(context)}
    overrides = {
        name: ParameterValue(given[name], value_type=PARAMETERS[name][0])
        for name in given
        if name in PARAMETERS
    }
    topics = [
        part for name in given if name in TOPICS for part in (f",{TOPICS[name]}=", given[name])
    ]
    if topics or "topics" in given:
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
