"""The reference pages of the ROS nodes agree with the code. (`test_faults` compares the topics with
those of running nodes.)
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

import robots_page

from ceed_vla.ros_nodes.robot.diagnostics import HARMLESS
from ceed_vla.ros_nodes.robot.mode import LATE_CHUNK, POLICY_ERROR
from ceed_vla.ros_nodes.robot.safety import CLAMPS, DISPLACED, MOVED, UNSETTLED

ROOT = Path(__file__).resolve().parents[2]
HOLDS = robots_page.HOLDS_PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", robots_page.PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert robots_page.filled(text) == text, "run python tests/helpers/robots_page.py"
    assert re.findall(r"<!-- (.*?) -->", text) == [
        marker for table in robots_page.PAGES[page] for marker in (table, "end")
    ]


def test_every_table_has_a_page() -> None:
    assert {table for tables in robots_page.PAGES.values() for table in tables} == {
        *robots_page.tables()
    }


def test_every_hold_is_explained() -> None:
    source = "".join(path.read_text() for path in (ROOT / "ros_nodes").rglob("*.py"))
    raised = (
        set(re.findall(r'Hold\(\s*"(\w+)"', source))
        | set(re.findall(r'"(\w+_joint_states)"', source))
        | set(HARMLESS)
    )
    raised |= {DISPLACED, MOVED, UNSETTLED, LATE_CHUNK, POLICY_ERROR}
    assert {"estop", "stale", "implausible_joint_states", "frozen_joint_states"} <= raised
    codes = HOLDS.split("## Hold codes")[1].split("\n## ")[0]
    assert raised <= set(re.findall(r"`(\w+)`", codes))


def test_every_kind_of_clamp_is_explained() -> None:
    clamps = HOLDS.split("## Clamps")[1].split("\n## ")[0]
    assert set(CLAMPS) <= set(re.findall(r"`(\w+)`", clamps))


def test_files_that_the_pages_name_exist() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for name in re.findall(r"`((?:launch|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page}: {name}"
