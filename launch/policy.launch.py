"""The policy node alone, for a robot whose drivers and controllers run already.

ros2 launch ceed_vla policy.launch.py robot_config:=/path/to/robot.yaml checkpoint:=/path/to/checkpoint
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

CONFIG = PathJoinSubstitution([FindPackageShare("ceed_vla"), "launch", "config", "policy.yaml"])
# Argument -> (default, description, type). Each overrides the parameter of its name.
PARAMETERS = {
    "checkpoint": ("student", "LeRobot checkpoint folder, or teacher or student for the shipped ones", str),
    "robot_config": ("", "robot's YAML file; empty: the simulated arm's", str),
    "action_interface": ("forward_position", "forward_position, joint_trajectory, servo_twist, or your own", str),
    "decoding": ("ceed", "how CEED-VLA checkpoints decode: ceed, jacobi, ar, cap2, ...", str),
    "discover_packages": ("", "packages of your own, comma-separated", str),
    "instruction": ("", "what to do; ~/instruction changes it", str),
    "autostart": ("true", "configure and activate; false: wait for a lifecycle manager", bool),
    "start_enabled": ("false", "move at once; false: wait for ~/enable (dry run)", bool),
    "use_sim_time": ("false", "follow /clock", bool),
}
# Argument -> topic that it replaces.
TOPICS = {"front_topic": "front/image_raw", "wrist_topic": "wrist/image_raw", "joint_states_topic": "joint_states"}


def generate_launch_description() -> LaunchDescription:
    """One node."""
    described = {
        "namespace": ("", "namespace of the node"),
        "params_file": (CONFIG, "parameters of the node"),
        **{name: (default, text) for name, (default, text, _) in PARAMETERS.items()},
        **{name: (topic, f"replaces {topic}") for name, topic in TOPICS.items()},
    }
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in described.items()
    ]
    overrides = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, (_, _, kind) in PARAMETERS.items()
    }
    policy = Node(
        package="ceed_vla",
        executable="policy_node",
        name="policy",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), overrides],
        remappings=[(topic, LaunchConfiguration(name)) for name, topic in TOPICS.items()],
        output="screen",
    )
    return LaunchDescription([*arguments, policy])
