"""Files that would move an arm wrongly: `robot check` and the node's configuration refuse them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from robot_checkpoints import DATA, statistics, write_checkpoint

from ceed_vla.cli.entry import main
from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_setup import make_setup
from ceed_vla.ros_nodes.robot.robot_file import packaged_config

CONFIG = packaged_config().parent
SO101, UR5E, PANDA = DATA
URDF = """<robot name="so101"><link name="base"/>{joints}</robot>"""
JOINT = """<link name="{name}_link"/>
<joint name="{name}" type="revolute"><parent link="{parent}"/><child link="{name}_link"/>
<axis xyz="0 0 1"/><limit lower="{low}" upper="{high}" velocity="{velocity}" effort="9"/></joint>"""

Values = dict[str, Any]


def named(robot: str) -> Values:
    """A robot's file of launch/config."""
    values: Values = yaml.safe_load((CONFIG / f"{robot}.yaml").read_text())
    return values


def with_model(values: Values, folder: Path, **limits: Any) -> Values:
    """Return the file with a URDF of its joints, with the file's limits or those in `limits`."""
    position, names = values["limits"]["position"], values["arm"]["joints"]
    joints = ""
    parent = "base"
    for place, name in enumerate(names):
        own = {"low": position["low"][place], "high": position["high"][place], "velocity": 10.0}
        joints += JOINT.format(name=name, parent=parent, **own | limits)
        parent = f"{name}_link"
    (folder / "arm.urdf").write_text(URDF.format(joints=joints))
    values["arm"] |= {"model": str(folder / "arm.urdf"), "tcp": parent}
    return values


def edited(robot: str, path: str, value: Any) -> Callable[[Path], Values]:
    """Return a function that sets a value at a path such as "limits.step"; None removes it."""

    def make(folder: Path) -> Values:
        values = named(robot)
        *parents, key = path.split(".")
        at = values
        for parent in parents:
            at = at[parent]
        if value is None:
            del at[key]
        else:
            at[key] = value
        return values

    return make


def with_gripper_exchanged(folder: Path) -> Values:
    values = named(UR5E)
    values["gripper"] |= {"closed": 0.085, "open": 0.0}
    return values


def with_joints_exchanged(folder: Path) -> Values:
    """Return a file with the model's limits and with joints 4 and 6 exchanged."""
    values = with_model(named(PANDA), folder)
    joints = values["arm"]["joints"]
    joints[3], joints[5] = joints[5], joints[3]
    del values["limits"]["position"], values["arm"]["home"]
    return values


DEGREES = {"low": [-110, -100, -97, -95, -157], "high": [110, 100, 97, 95, 163]}
# Name -> the robot, the change to its file, the key and a part of the error.
WRONG: dict[str, tuple[str, Callable[[Path], Values], str, str]] = {
    "limits in degrees": (
        SO101,
        edited(SO101, "limits.position", DEGREES),
        "limits.position",
        "wrist_roll (and 4 more) may move from -157 to 163 rad; a joint has at most 12.6 rad",
    ),
    "30 rad/s": (
        UR5E,
        edited(UR5E, "limits.velocity", [30.0] * 6),
        "limits.velocity",
        "shoulder_pan_joint (and 5 more) may move at 30 rad/s; no joint of an arm is faster",
    ),
    "a step of 3 rad": (
        PANDA,
        edited(PANDA, "limits.step", [0.1] * 6 + [3.0]),
        "limits.step",
        "commands of panda_joint7 may be 3 rad from the measured position; it must be at most 0.5",
    ),
    "a gripper of 70 m": (
        PANDA,
        edited(PANDA, "gripper.open", 70.0),
        "gripper.open",
        "the gripper goes from 0 to 70 m; no gripper opens wider than 0.5 m",
    ),
    "no action_scale": (
        SO101,
        edited(SO101, "gripper.action_scale", None),
        "gripper.action_scale",
        "Give gripper.action_scale, metres per unit of the data: about 0.00126 here",
    ),
    "limits wider than the URDF's": (
        SO101,
        lambda folder: with_model(named(SO101), folder, low=-1.5, high=1.5),
        "limits.position",
        "the model's limits are -1.5 to 1.5 rad",
    ),
    "unit: deg forgotten": (
        SO101,
        edited(SO101, "arm.unit", None),
        "arm.unit",
        "The data are in degrees: write arm.unit: deg",
    ),
    "a flipped sign": (
        PANDA,
        edited(PANDA, "arm.sign", [1, 1, 1, -1, 1, 1, 1]),
        "arm.sign",
        "With the opposite sign it fits: correct arm.sign",
    ),
    "joints in another order": (
        PANDA,
        with_joints_exchanged,
        "arm.joints",
        "With panda_joint6 and panda_joint4 exchanged it fits",
    ),
    "a gripper in millimetres": (
        UR5E,
        edited(UR5E, "gripper.open", 85.0),
        "gripper.open",
        "no gripper opens wider than 0.5 m",
    ),
    "closed and open exchanged": (
        UR5E,
        with_gripper_exchanged,
        "gripper.open",
        "is 0.0; it must be more than closed (0.085)",
    ),
    "radians called degrees": (
        UR5E,
        edited(UR5E, "arm.unit", "deg"),
        "arm.unit",
        "The data are in radians already",
    ),
}
UNREADABLE = ("closed and open exchanged",)  # refused when the file is read


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Map each robot to a checkpoint whose data are plausible for it."""
    made = {}
    for robot, ends in DATA.items():
        values = statistics(*ends)
        made[robot] = write_checkpoint(tmp_path_factory.mktemp(robot), values, values)
    return made


def configure(file: Path, checkpoint: Path) -> Any:
    """Configure as the node does, without the process that loads the policy."""
    worker = SimpleNamespace(ready=False, failed=None, begin=lambda: None)
    given = {"robot_config": str(file), "checkpoint": str(checkpoint)}
    values = defaults(POLICY_PARAMETERS) | given | {"action_interface": "joint_trajectory"}
    return make_setup(values, lambda: None, 0.0, lambda *_, **__: worker)


Checked = tuple[int, str, str]


def checked(file: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Checked:
    """Return exit code, output and errors of `robot check`."""
    code = main(["robot", "check", str(file), "--checkpoint", str(checkpoint)])
    told = capsys.readouterr()
    return code, told.out, told.err


def write(folder: Path, values: Values) -> Path:
    (folder / "robot.yaml").write_text(yaml.safe_dump(values))
    return folder / "robot.yaml"


@pytest.mark.parametrize("robot", DATA)
@pytest.mark.parametrize("modelled", [False, True])
def test_good_files_fit(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    robot: str,
    modelled: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = with_model(named(robot), tmp_path) if modelled else named(robot)
    code, out, err = checked(write(tmp_path, values), checkpoints[robot], capsys)
    assert (code, out.splitlines()[-1], err) == (0, "fits", "")
    assert ("not checked: the file names no arm.model" in out) is not modelled
    assert out.count("compared (q01 to q99)") == 2
    assert configure(tmp_path / "robot.yaml", checkpoints[robot]).warnings == ()


@pytest.mark.parametrize("name", WRONG)
def test_dangerous_files_are_refused_by_check_and_node(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    robot, make, key, text = WRONG[name]
    file = write(tmp_path, make(tmp_path))
    code, out, err = checked(file, checkpoints[robot], capsys)
    with pytest.raises(ConfigError) as refused:
        configure(file, checkpoints[robot])
    told = str(refused.value)
    assert code == 1
    assert len(told) < 1500
    for message in (err, told[:500]):  # the node shows at most 500 characters
        assert key in message
        assert text in message
    problems = [line for line in out.splitlines() if line[:1].isdigit()]
    numbers = [int(line.partition(".")[0]) for line in problems]
    assert numbers == list(range(1, len(problems) + 1))
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    assert out.splitlines()[-1] == f"does not fit: {count}"
    if name not in UNREADABLE:
        assert problems[0].startswith(f"1. {key}: ")
        assert told.startswith(f"does not fit: {count}. {problems[0]}")
    print(f"{name}: exit code {code}, {out.splitlines()[-1]}: {problems[0]}")  # shown by -rP


ALLOWED = {
    "30 rad/s": "velocity",
    "a step of 3 rad": "step",
    "a gripper of 70 m": "gripper",
    "limits wider than the URDF's": "position_limits",
    "limits in degrees": "units",
    "a flipped sign": "statistics",
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_file_allows_is_a_warning(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    robot, make, key, _ = WRONG[name]
    others = [rule for rule in ALLOWED.values() if rule != ALLOWED[name]]
    values = make(tmp_path)
    code, out, _ = checked(write(tmp_path, values | {"allow": others}), checkpoints[robot], capsys)
    assert code == 1
    assert f"If it is meant, write allow: [{ALLOWED[name]}]." in out
    file = write(tmp_path, values | {"allow": [ALLOWED[name]]})
    code, out, err = checked(file, checkpoints[robot], capsys)
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    count = f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}"
    assert (code, out.splitlines()[-1], err) == (0, f"fits, with {count}", "")
    assert warnings[0].startswith(f"warning: {key}: ")
    assert warnings[0].endswith(f"The file allows it (allow: [{ALLOWED[name]}]).")
    told = configure(tmp_path / "robot.yaml", checkpoints[robot]).warnings
    assert [f"warning: {warning}" for warning in told] == warnings


def test_an_unknown_name_is_not_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["robot", "check", str(write(tmp_path, named(UR5E) | {"allow": ["speed"]}))]) == 1
    choices = "action_names, gripper, position_limits, rate, statistics, step, units, velocity"
    assert f"allow has 'speed'; choose from {choices}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_node_refuses_a_dangerous_file_at_configure(
    graph: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    robot, make, key, text = WRONG["unit: deg forgotten"]
    file = write(tmp_path, make(tmp_path))
    parameters = {"robot_config": file, "checkpoint": checkpoints[robot], "autostart": "true"}
    parameters["action_interface"] = "joint_trajectory"
    flags = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    assert graph.start("policy_node", *flags).wait(60) == 1
    told = graph.output("policy_node")
    assert f"does not fit: 1 problem. 1. {key}: " in told
    assert text in told
    assert "Traceback" not in told
