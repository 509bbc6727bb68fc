"""Generated tables of the reference pages of the ROS nodes: topics, services and parameters.

``python tests/helpers/robots_page.py`` writes the tables into the pages; a test compares pages and
code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ceed_vla.ros_nodes.demo.bag import type_name
from ceed_vla.ros_nodes.record.parameters import RECORD_PARAMETERS
from ceed_vla.ros_nodes.robot.gripper_relay import RELAY_PARAMETERS
from ceed_vla.ros_nodes.robot.parameters import LIVE, SETUP, START, Table
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.ros_nodes.simulated.parameters import SIM_PARAMETERS

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
HOLDS_PAGE = REFERENCE / "holds.md"  # hold codes and diagnostics keys, not generated
# Page -> the markers of its generated tables.
PAGES = {
    REFERENCE / "gripper-relay.md": ("relay parameters",),
    REFERENCE / "policy-node.md": ("policy topics", "policy parameters"),
    REFERENCE / "record-node.md": ("record topics", "record parameters"),
    REFERENCE / "sim-node.md": ("sim topics", "sim parameters"),
}
IN, OUT, SERVICE = "in", "out", "service"
DRY = ("policy/preview_command", "policy/planned")  # with dry_run only
OF_POLICY = (
    "policy/state",
    "policy/commanded",
    "policy/task",
    "policy/task_result",
    *DRY,
)
_TYPES = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}
_WHEN = {START: "start only (read-only)", SETUP: "while unconfigured", LIVE: "any time"}

Row = tuple[str, str, str, str]


def policy_topics() -> list[Row]:
    """(default name, direction, type, meaning) of each topic and service of the policy node.

    The names are those of the packaged robot's file.
    """
    robot = load_robot_config()
    said = "commands at `command_rate`, with `action_interface`"
    assert robot.gripper is not None
    return [
        *(
            (i.topic, IN, _TYPES[i.transport], f"`{i.feature}`; best effort, newest image used")
            for i in robot.images
        ),
        (robot.joint_states, IN, "sensor_msgs/msg/JointState", "joints, matched by name"),
        ("policy/instruction", IN, "std_msgs/msg/String", "task for the policy; latched"),
        *(
            (one.topic, OUT, type_name(one.message_class), f"{said} `{name}`")
            for name, one in robot.interfaces.items()
        ),
        (
            robot.gripper.topic,
            OUT,
            "std_msgs/msg/Float64MultiArray",
            "opening in metres, or the joint's position with `gripper.command: joint`",
        ),
        ("diagnostics", OUT, "diagnostic_msgs/msg/DiagnosticArray", "once a second"),
        (
            "policy/state",
            OUT,
            "std_msgs/msg/String",
            "the state and its reason, at every change; latched",
        ),
        (
            "policy/commanded",
            OUT,
            "sensor_msgs/msg/JointState",
            "every command that is sent: arm joints, and the opening as `gripper`; for recordings",
        ),
        ("policy/preview_command", OUT, "type of the command", "replaces commands with `dry_run`"),
        (
            "policy/planned",
            OUT,
            "trajectory_msgs/msg/JointTrajectory",
            "every chunk when it takes over, with `dry_run`",
        ),
        (
            "policy/task",
            IN,
            "std_msgs/msg/String",
            "a task: an instruction, or JSON with `instruction`, `time_limit` [s] and `id`",
        ),
        (
            "policy/task_result",
            OUT,
            "std_msgs/msg/String",
            "JSON with `id`, `outcome`, `reason` and `seconds` of every task; latched",
        ),
        (
            "policy/cancel_task",
            SERVICE,
            "std_srvs/srv/Trigger",
            "cancel the task that runs and those that wait",
        ),
        ("policy/estop", SERVICE, "std_srvs/srv/Trigger", "stop; latched until `policy/reset`"),
        (
            "policy/reset",
            SERVICE,
            "std_srvs/srv/Trigger",
            "unlatch the stop and accept the pose; does not enable motion",
        ),
        ("policy/enable", SERVICE, "std_srvs/srv/SetBool", "true allows motion, false forbids it"),
        (
            "policy/go_home",
            SERVICE,
            "std_srvs/srv/Trigger",
            "move to `arm.home` at 0.2 rad/s, then disable motion",
        ),
        (
            "policy/change_state",
            SERVICE,
            "lifecycle_msgs/srv/ChangeState",
            "lifecycle transitions: configure, activate, ...",
        ),
    ]


def record_topics() -> list[Row]:
    """The same rows for the record node."""
    robot = load_robot_config()
    inputs = [*(image.topic for image in robot.images), robot.joint_states]
    return [
        *(
            (name, way, kind, what.replace("newest image used", "every image used"))
            for name, way, kind, what in policy_topics()
            if name in inputs and way == IN
        ),
        (
            robot.commands.topic,
            IN,
            "sensor_msgs/msg/JointState",
            "what the arm is commanded; `commands` of the robot file",
        ),
        ("record/instruction", IN, "std_msgs/msg/String", "task of the next episode; latched"),
        ("record/state", OUT, "std_msgs/msg/String", "the state, at every change; latched"),
        ("record/episode", OUT, "std_msgs/msg/String", "begin and end of every episode; latched"),
        ("diagnostics", OUT, "diagnostic_msgs/msg/DiagnosticArray", "once a second"),
        ("record/start", SERVICE, "std_srvs/srv/Trigger", "begin an episode"),
        (
            "record/stop",
            SERVICE,
            "std_srvs/srv/SetBool",
            "end the episode and store it, as a success (true) or a failure (false)",
        ),
        ("record/discard", SERVICE, "std_srvs/srv/Trigger", "drop the episode"),
        (
            "record/change_state",
            SERVICE,
            "lifecycle_msgs/srv/ChangeState",
            "lifecycle transitions: configure, activate, ...",
        ),
    ]


def sim_topics() -> list[Row]:
    """The same rows for the simulated robot."""
    mirrored = {IN: OUT, OUT: IN}
    said = {
        "joint_states": "arm and finger joints, 100 Hz",
        "front/image_raw": "images at `camera_rate`",
        "wrist/image_raw": "images at `camera_rate`",
        "policy/instruction": (
            "the episode's instruction, unless `publish_instruction` is false; latched"
        ),
    }
    return [
        *(
            (
                name,
                mirrored[way],
                kind,
                said.get(name, "executed; refused commands are in the diagnostics"),
            )
            for name, way, kind, _ in policy_topics()
            if way in mirrored and name not in ("diagnostics", *OF_POLICY)
        ),
        ("sim/success", OUT, "std_msgs/msg/Bool", "true when the episode is solved; latched"),
        ("sim/expert", OUT, "sensor_msgs/msg/Joy", "with `publish_expert`: a scripted person"),
        ("clock", OUT, "rosgraph_msgs/msg/Clock", "with `publish_clock`"),
        ("diagnostics", OUT, "diagnostic_msgs/msg/DiagnosticArray", "once a second"),
        (
            "sim/reset_episode",
            SERVICE,
            "std_srvs/srv/Trigger",
            "draw the scene of `task` and `seed`",
        ),
    ]


def parameter_rows(table: Table) -> list[Row]:
    """(name, default, allowed and when, meaning) of every parameter."""
    return [
        (p.name, _value(p.default), f"{p.allowed}; {_WHEN[p.when]}", p.description) for p in table
    ]


def tables() -> dict[str, str]:
    """Marker -> table in Markdown."""
    topic, parameter = (
        ("name", "direction", "type", "meaning"),
        ("parameter", "default", "allowed; when", "meaning"),
    )
    return {
        "policy topics": _table(topic, policy_topics()),
        "policy parameters": _table(parameter, parameter_rows(POLICY_PARAMETERS)),
        "relay parameters": _table(parameter, parameter_rows(RELAY_PARAMETERS)),
        "record topics": _table(topic, record_topics()),
        "record parameters": _table(parameter, parameter_rows(RECORD_PARAMETERS)),
        "sim topics": _table(topic, sim_topics()),
        "sim parameters": _table(parameter, parameter_rows(SIM_PARAMETERS)),
    }


def filled(page: str) -> str:
    """The text of a page with its tables between ``<!-- NAME -->`` and ``<!-- end -->``.

    Blank lines and delimiter rows are those that the formatter of the docs writes.
    """
    for name, table in tables().items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, after = page.partition(start)
        if found:
            page = f"{before}{start}\n{table}\n\n{end}{after.partition(end)[2]}"
    return page


def _table(head: Sequence[str], rows: Iterable[Row]) -> str:
    lines = [head, ["--"] * len(head), *((f"`{row[0]}`", *row[1:]) for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return re.sub(r"\[([^]]*)\]:", r"\[\1\]:", text)  # else "[s]:" looks like a link's target


def _value(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "empty"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"Written: {page}", file=sys.stderr)
