"""Launch files: structure, parameters and topics against the nodes; and the node run in the way of
`ros2 launch`.

ROS's own `launch` is not available as a wheel, so stand-in modules record what a file creates; if
`launch_ros` is installed, the real one reads the files too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from lifecycle_msgs.srv import GetState
from rcl_interfaces.srv import GetParameters

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.record.parameters import RECORD_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, with_topics
from ceed_vla.ros_nodes.simulated.parameters import SIM_PARAMETERS

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
FILES = ("policy.launch.py", "record.launch.py", "sim_demo.launch.py")
DECLARED = {
    "policy_node": {parameter.name: parameter for parameter in POLICY_PARAMETERS},
    "record_node": {parameter.name: parameter for parameter in RECORD_PARAMETERS},
    "sim_node": {parameter.name: parameter for parameter in SIM_PARAMETERS},
}


class Made:
    """Replaces any class of launch, and records its arguments."""

    kind = ""

    def __init__(self, *parts: Any, **named: Any) -> None:
        self.parts, self.named = parts, named

    def perform(self, context: dict[str, str]) -> str:
        """Return the value of a `LaunchConfiguration` in a launch with these arguments."""
        return context[self.parts[0]]


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install recording modules in place of launch's."""
    for name, classes in {
        "launch": ("LaunchDescription",),
        "launch.actions": (
            "DeclareLaunchArgument",
            "IncludeLaunchDescription",
            "OpaqueFunction",
            "Shutdown",
        ),
        "launch.launch_description_sources": ("PythonLaunchDescriptionSource",),
        "launch.substitutions": ("LaunchConfiguration", "PathJoinSubstitution"),
        "launch_ros.actions": ("Node",),
        "launch_ros.parameter_descriptions": ("ParameterValue",),
        "launch_ros.substitutions": ("FindPackageShare",),
    }.items():
        module = type(sys)(name)
        for kind in classes:
            setattr(module, kind, type(kind, (Made,), {"kind": kind}))
        monkeypatch.setitem(sys.modules, name, module)


def made(file: str, monkeypatch: pytest.MonkeyPatch, kind: str, **given: str) -> list[Made]:
    """Return the actions of a kind in a launch file that gets these arguments."""
    stand_ins(monkeypatch)
    description = runpy.run_path(str(LAUNCH / file))["generate_launch_description"]()
    assert description.kind == "LaunchDescription"
    parts = list(description.parts[0])
    context = {
        part.parts[0]: part.named["default_value"]
        for part in parts
        if part.kind == "DeclareLaunchArgument"
    }
    for part in parts[:]:
        parts += part.named["function"](context | given) if part.kind == "OpaqueFunction" else []
    return [part for part in parts if part.kind == kind]


def entry_points() -> dict[str, str]:
    """Return the console scripts of setup.py: name -> "module:function"."""
    return dict(re.findall(r'"(\w+) = ([\w.]+:\w+)"', (ROOT / "setup.py").read_text()))


def arguments(file: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return launch arguments and their defaults."""
    return {
        one.parts[0]: one.named["default_value"]
        for one in made(file, monkeypatch, "DeclareLaunchArgument")
    }


@pytest.mark.parametrize("file", FILES)
def test_every_argument_is_declared_once_and_described(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = made(file, monkeypatch, "DeclareLaunchArgument")
    names = [one.parts[0] for one in declared]
    assert len(set(names)) == len(names)
    assert all(one.named["description"] for one in declared)
    used = set(re.findall(r'LaunchConfiguration\("(\w+)"\)', (LAUNCH / file).read_text()))
    assert used <= set(names)


@pytest.mark.parametrize(
    ("file", "executable", "some"),
    [
        ("policy.launch.py", "policy_node", {"topics", "max_joint_velocity"}),
        ("record.launch.py", "record_node", {"root", "resume", "memory_mb"}),
        ("sim_demo.launch.py", "sim_node", {"seed"}),
    ],
)
def test_nodes_exist_and_know_their_parameters(
    file: str, executable: str, some: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = arguments(file, monkeypatch)
    (node,) = made(
        file, monkeypatch, "Node", **{name: value or "x" for name, value in defaults.items()}
    )
    assert (node.named["package"], node.named["executable"]) == ("ceed_vla", executable)
    module, function = entry_points()[executable].split(":")
    assert importlib.util.find_spec(module) is not None
    assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert node.named["on_exit"].kind == "Shutdown"  # the launch ends with the node
    overrides = node.named["parameters"][-1]
    assert set(overrides) > some
    for name, value in overrides.items():
        if name == "use_sim_time":
            continue
        parameter = DECLARED[executable][name]
        if defaults[name] and value.named["value_type"] is not str:
            assert isinstance(yaml.safe_load(defaults[name]), value.named["value_type"])
        assert type(parameter.default) is value.named["value_type"]


def test_arguments_that_nobody_gives_leave_the_parameter_file_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (node,) = made("policy.launch.py", monkeypatch, "Node", max_joint_velocity="0.3", engine="")
    file, overrides = node.named["parameters"]
    assert file.parts == ("params_file",)
    assert set(overrides) == {"autostart", "start_enabled", "max_joint_velocity"}
    defaults = arguments("policy.launch.py", monkeypatch)
    assert (defaults["autostart"], defaults["start_enabled"]) == ("true", "false")


def test_recorder_leaves_the_nodes_own_values_and_may_follow_the_policys_instruction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (node,) = made("record.launch.py", monkeypatch, "Node", root="/data/cups")
    assert set(node.named["parameters"][0]) == {"root", "autostart"}
    assert node.named["remappings"] == []
    (node,) = made("record.launch.py", monkeypatch, "Node", instruction_topic="policy/instruction")
    ((source, target),) = node.named["remappings"]
    assert (source, target.parts) == ("~/instruction", ("instruction_topic",))


def test_policy_topics_are_the_packaged_robots(monkeypatch: pytest.MonkeyPatch) -> None:
    robot = load_robot_config()
    chosen = {"front_topic": "/cam/image", "joint_states_topic": "/left/joint_states"}
    (node,) = made("policy.launch.py", monkeypatch, "Node", **chosen)
    parts = node.named["parameters"][-1]["topics"].parts[0]
    given = "".join(
        part if isinstance(part, str) else chosen.get(part.parts[0], "") for part in parts
    )
    changed = with_topics(robot, given)
    assert {image.name: image.topic for image in changed.images} == {
        "front": "/cam/image",
        "wrist": "wrist/image_raw",
    }
    assert changed.joint_states == "/left/joint_states"
    assert with_topics(robot, ",front=,wrist=,joint_states=") == robot
    with pytest.raises(ConfigError, match=r"names 'top'; .* has joint_states, front, wrist"):
        with_topics(robot, "top=/cam/image")
    for wrong in ("front", "front=/a//b", "front=/a-b"):
        with pytest.raises(ConfigError, match="write camera=topic"):
            with_topics(robot, wrong)


def test_demo_passes_on_what_the_policy_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    (include,) = made("sim_demo.launch.py", monkeypatch, "IncludeLaunchDescription")
    file = include.parts[0].parts[0].parts[0][-1]
    assert (LAUNCH / file).is_file()
    passed = dict(include.named["launch_arguments"])
    assert set(passed) <= set(arguments(file, monkeypatch))


@pytest.mark.parametrize(("given", "used"), [(None, "LOCALHOST"), ("SUBNET", "SUBNET")])
def test_the_demo_stays_on_this_machine_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None, used: str
) -> None:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", given or "")
    if given is None:
        monkeypatch.delenv("ROS_AUTOMATIC_DISCOVERY_RANGE")
    made("sim_demo.launch.py", monkeypatch, "Node")
    assert os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] == used


@pytest.mark.parametrize("file", FILES)
def test_config_files_that_launch_files_name_are_installed(file: str) -> None:
    installed = {path.name for path in (LAUNCH / "config").iterdir()}
    named = set(re.findall(r'"config", "([\w.]+)"', (LAUNCH / file).read_text()))
    assert named or file != "policy.launch.py"
    assert named <= installed
    setup = (ROOT / "setup.py").read_text()
    assert "launch/*.launch.py" in setup
    assert "launch/config/*.yaml" in setup
    assert "launch/config/*.xml" in setup


def test_the_parameter_file_fits_the_declarations() -> None:
    values = yaml.safe_load((LAUNCH / "config" / "policy.yaml").read_text())["/**"][
        "ros__parameters"
    ]
    for name, value in values.items():
        parameter = DECLARED["policy_node"][name]
        assert type(value) is type(parameter.default)
        assert parameter.problem(value) is None


@pytest.mark.slow
def test_the_node_runs_as_launch_runs_it(graph: Any, tmp_path: Path) -> None:
    """It has an installed executable, a namespace, a parameter file, launch's own parameter file
    and a remapping.
    """
    module, function = entry_points()["policy_node"].split(":")
    executable = tmp_path / "lib" / "ceed_vla" / "policy_node"
    executable.parent.mkdir(parents=True)
    executable.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\n"
        f"if __name__ == '__main__':\n    sys.exit({function}())\n"  # as pip and colcon write them
    )
    executable.chmod(0o755)
    overrides = {
        "checkpoint": "student",
        "robot_config": "",
        "instruction": "stack the cubes",
        "autostart": True,
    }
    own = tmp_path / "launch_params_x1"
    own.write_text(yaml.safe_dump({"/**": {"ros__parameters": overrides}}))
    command = [str(executable), "--ros-args", "-r", "__node:=policy", "-r", "__ns:=/left_arm"]
    command += ["--params-file", str(LAUNCH / "config" / "policy.yaml"), "--params-file", str(own)]
    command += ["-p", "topics:=front=overhead/image_raw,wrist=,joint_states=/joint_states"]
    environment = os.environ | {"ROS_DOMAIN_ID": str(graph.domain), "PYTHONPATH": str(ROOT)}
    with (tmp_path / "launched.txt").open("wb") as output:
        graph.processes["launched"] = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT
        )
    count = graph.node.count_subscribers
    graph.wait(lambda: count("/left_arm/overhead/image_raw"), "the remapped camera", timeout=90.0)
    graph.wait(
        lambda: count("/joint_states") and count("/left_arm/wrist/image_raw"), "the other inputs"
    )
    assert not count("/left_arm/front/image_raw")
    graph.wait(
        lambda: graph.node.count_publishers("/left_arm/forward_position_controller/commands"),
        "commands",
    )
    assert graph.call("/left_arm/policy/get_state", GetState).current_state.label == "active"
    request = GetParameters.Request(names=["instruction", "image_timeout"])
    instruction, timeout = graph.call(
        "/left_arm/policy/get_parameters", GetParameters, request
    ).values
    assert (instruction.string_value, timeout.double_value) == ("stack the cubes", 0.5)
    assert graph.stop("launched") == 0


@pytest.mark.parametrize("file", FILES)
def test_real_launch_reads_the_file(file: str) -> None:
    pytest.importorskip("launch_ros", reason="needs ROS 2's launch, which is no wheel")
    from launch.launch_description_sources import get_launch_description_from_python_launch_file

    description = get_launch_description_from_python_launch_file(str(LAUNCH / file))
    declared = {argument.name for argument in description.get_launch_arguments()}
    assert {"checkpoint", "namespace"} <= declared
