"""Start the record node for a robot whose drivers run, beside the policy node or without it.

ros2 launch ceed_vla record.launch.py robot_config:=/path/to/robot.yaml root:=/path/to/dataset
"""

from typing import Any

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from ceed_vla.ros_nodes.record.parameters import RECORD_PARAMETERS

DEFAULTS = {"autostart": "true"}  # of a launch; the node's own is used for the others
# Launch arguments that set the node's parameter of the same name, which also describes them.
PARAMETERS = {
    parameter.name: (type(parameter.default), parameter.description)
    for parameter in RECORD_PARAMETERS
} | {"use_sim_time": (bool, "Follow /clock.")}


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and start the node."""
    described = {
        "namespace": ("", "namespace of the node"),
        "instruction_topic": (
            "",
            "topic of the instruction instead of record/instruction, such as policy/instruction",
        ),
        **{name: (DEFAULTS.get(name, ""), text) for name, (_, text) in PARAMETERS.items()},
    }
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in described.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=record_node)])


def record_node(context: Any) -> list[Node]:
    """Build the node from the launch arguments."""
    names = {name: LaunchConfiguration(name) for name in (*PARAMETERS, "instruction_topic")}
    passed = {name: value for name, value in names.items() if value.perform(context)}
    topic = passed.pop("instruction_topic", None)
    overrides = {
        name: ParameterValue(value, value_type=PARAMETERS[name][0])
        for name, value in passed.items()
    }
    return [
        Node(
            package="ceed_vla",
            executable="record_node",
            name="record",
            namespace=LaunchConfiguration("namespace"),
            parameters=[overrides],
            remappings=[("~/instruction", topic)] if topic is not None else [],
            output="screen",
            on_exit=Shutdown(),
        )
    ]
