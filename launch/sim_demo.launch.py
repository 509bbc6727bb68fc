"""Start the simulated tabletop robot and the policy node that drives it.

ros2 launch ceed_vla sim_demo.launch.py task:=cube_in_bin seed:=1
"""

import os

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

LAUNCH = PathJoinSubstitution([FindPackageShare("ceed_vla"), "launch"])
# Launch argument -> (default, description). These override the simulation node's parameters.
SIMULATION = {
    "task": ("mixed", "mixed, cube_in_bin, cube_on_plate, push_cube or stack_cubes"),
    "seed": ("0", "decides the scene"),
}
# Arguments that are passed on to policy.launch.py.
POLICY = {
    "namespace": ("", "namespace of both nodes"),
    "checkpoint": (
        "student",
        "LeRobot checkpoint folder, or teacher or student for the shipped ones",
    ),
    "action_interface": ("forward_position", "forward_position, joint_trajectory or servo_twist"),
    "start_enabled": ("true", "move at once; false: wait for policy/enable"),
    "dry_run": (
        "false",
        "command nothing; policy/preview_command and policy/planned show what would be",
    ),
    "device": ("cpu", "where the policy runs: cpu, cuda, mps"),
    "inference_url": ("", "server that runs the policy, ws://HOST:PORT; empty: this computer"),
}


def generate_launch_description() -> LaunchDescription:
    """Start both nodes; when one ends, so does the other.

    Only nodes on this machine are discovered, unless the environment sets another range.
    """
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in (SIMULATION | POLICY).items()
    ]
    types = {"task": str, "seed": int}
    overrides = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind)
        for name, kind in types.items()
    }
    sim = Node(
        package="ceed_vla",
        executable="sim_node",
        name="sim",
        namespace=LaunchConfiguration("namespace"),
        parameters=[overrides],
        output="screen",
        on_exit=Shutdown(),
    )
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([LAUNCH, "policy.launch.py"])),
        launch_arguments={name: LaunchConfiguration(name) for name in POLICY}.items(),
    )
    return LaunchDescription([*arguments, sim, policy])
