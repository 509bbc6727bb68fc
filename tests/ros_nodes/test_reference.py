"""docs/robots.md says what the code does. (`test_faults` compares the topics with those of running
nodes.)
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

import robots_page

from ceed_vla.ros_nodes.robot.diagnostics import HARMLESS
from ceed_vla.ros_nodes.robot.safety import CLAMPS, DISPLACED, MOVED, UNSETTLED

ROOT = Path(__file__).resolve().parents[2]
TEXT = robots_page.PAGE.read_text(encoding="utf-8")


def test_tables_are_those_of_the_code() -> None:
    assert robots_page.filled(TEXT) == TEXT, "run python tests/helpers/robots_page.py"
    assert set(re.findall(r"<!-- (.*?) -->", TEXT)) == {*robots_page.tables(), "end"}


def test_every_hold_is_explained() -> None:
    source = "".join(path.read_text() for path in (ROOT / "ros_nodes").rglob("*.py"))
    raised = (
        set(re.findall(r'Hold\(\s*"(\w+)"', source))
        | set(re.findall(r'"(\w+_joint_states)"', source))
        | set(HARMLESS)
    )
    raised |= {DISPLACED, MOVED, UNSETTLED}
    assert {"estop", "stale", "implausible_joint_states", "frozen_joint_states"} <= raised
    explained = set(re.findall(r"`(\w+)`", TEXT.split("## 3.")[1].split("## 4.")[0]))
    assert raised <= explained
    assert "Clamps are counted by kind" in TEXT
    assert CLAMPS


def test_files_that_the_page_names_exist() -> None:
    for name in re.findall(r"`((?:launch|docs)/[\w./]+)`", TEXT):
        assert (ROOT / name).exists(), name
