"""The policy node alone, for a robot whose drivers and controllers run already.

ros2 launch ceed_vla policy.launch.py robot_config:=/path/to/robot.yaml checkpoint:=/path/to/checkpoint
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, Shutdown
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
    "start_enabled": ("false", "move at once; false: wait for ~/enable", bool),
    "dry_run": ("false", "command nothing: ~/preview_command and ~/planned show what would be", bool),
    "inference_python": ("", "Python with torch and lerobot, if the node's has none", str),
    "device": ("cpu", "where the policy runs: cpu, cuda, mps", str),
    "engine": ("eager", "eager, or compiled: some minutes to load, then faster", str),
    "command_rate": ("100.0", "commands per second [Hz]", float),
    "blend_in": ("0.0", "motion begins gently, over so long [s]", float),
    "max_joint_velocity": ("10.0", "can only lower the robot's own limits [rad/s]", float),
    "max_joint_step": ("1.0", "can only lower the robot's own limits [rad]", float),
    "use_sim_time": ("false", "follow /clock", bool),
}
# Argument -> what it replaces the topic of; a camera that the robot's file does not have is an error.
TOPICS = {"front_topic": "front", "wrist_topic": "wrist", "joint_states_topic": "joint_states"}


def generate_launch_description() -> LaunchDescription:
    """One node."""
    described = {
        "namespace": ("", "namespace of the node"),
        "params_file": (CONFIG, "parameters of the node"),
        **{name: (default, text) for name, (default, text, _) in PARAMETERS.items()},
        "topics": ("", "topics of cameras with other names: top=/camera/image_raw,left=/left/image_raw"),
        **{name: ("", f"topic of {source} instead of the robot's file's") for name, source in TOPICS.items()},
    }
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in described.items()
    ]
    overrides = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, (_, _, kind) in PARAMETERS.items()
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
