"""Findings of the review of a robot's file, and the source of the data's ranges."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from robot_checkpoints import DATA, statistics, write_checkpoint

from ceed_vla.errors import CheckpointError
from ceed_vla.folders import pretrained_path
from ceed_vla.ros_nodes.robot.arm_model import arm_model
from ceed_vla.ros_nodes.robot.findings import PROBLEM, WARNING, Finding, explained, verdict
from ceed_vla.ros_nodes.robot.policy_setup import physical_velocity
from ceed_vla.ros_nodes.robot.review import feature_lengths, review
from ceed_vla.ros_nodes.robot.robot_config import Action, Linear, RobotConfig
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config
from ceed_vla.serving.data_ranges import ACTION, Range, read_ranges
from ceed_vla.serving.predictor_types import PolicySpec

STATE = "observation.state"
SO101, UR5E, PANDA = DATA
JOINTS = 7  # of the Panda
SPEC = PolicySpec("policy", "act", {}, {}, 7, 8, 8, 0.0)  # does not declare what its actions are


def named(robot: str) -> RobotConfig:
    return load_robot_config(packaged_config().parent / f"{robot}.yaml")


def range_of(low: Any, high: Any, measured: bool = True) -> Range:
    return Range(np.array(low, float), np.array(high, float), "min to max", measured)


def data_of(name: str) -> dict[str, Range | str]:
    return {STATE: range_of(*DATA[name]), ACTION: range_of(*DATA[name])}


def found(robot: RobotConfig, ranges: dict[str, Range | str]) -> list[tuple[str, str, str]]:
    """Return key, rule's name and severity of every finding."""
    model = arm_model(robot)
    findings = review(robot, model, physical_velocity(robot, model), ranges, SPEC)
    assert all(len(str(finding)) < 480 for finding in findings)
    return [(finding.key, finding.allow, finding.severity) for finding in findings]


def test_nothing_is_found_without_statistics() -> None:
    for name in DATA:
        assert found(named(name), {STATE: "no statistics", ACTION: "no statistics"}) == []
    assert found(load_robot_config(), {}) == []


# ---- joints -------------------------------------------------------------------------------------


def test_states_outside_the_limits_are_refused_and_targets_a_little_outside_are_not() -> None:
    """The arm holds if its states are outside; a target outside is clamped."""
    robot, ranges = named(PANDA), data_of(PANDA)
    low, high = (np.array(ends) for ends in DATA[PANDA])
    wide = high + np.eye(8)[1] * (1.9 - high[1])  # joint 2, of 1.7628
    refused = [("limits.position", "statistics", PROBLEM)]
    warned = [("limits.position", "statistics", WARNING)]
    assert found(robot, ranges | {STATE: range_of(low, wide)}) == refused
    assert found(robot, ranges | {ACTION: range_of(low, wide)}) == warned
    # By more than half of the range, because no other sign or order explains it.
    far = wide + np.eye(8)[1] * 3.0
    assert found(robot, ranges | {ACTION: range_of(low, far)}) == refused
    near = high + np.eye(8)[1] * (1.8 - high[1])
    assert found(robot, ranges | {STATE: range_of(low, near)}) == []


def test_another_unit_than_degrees_is_found() -> None:
    robot = named(UR5E)
    low, high = (1000.0 * np.array(ends) for ends in DATA[UR5E])  # milliradians
    scaled = replace(robot, arm=replace(robot.arm, scale=(0.5,) * 6))
    for file, key in ((robot, "arm.unit"), (scaled, "arm.scale")):
        ranges: dict[str, Range | str] = {STATE: range_of([*low[:6], 0], [*high[:6], 0.08])}
        assert (key, "units", PROBLEM) in found(file, ranges)


def test_what_bins_could_say_is_only_a_warning() -> None:
    robot = named(PANDA)
    ends = np.full(8, 20.0)
    told = found(robot, {ACTION: range_of(-ends, ends, False)})
    assert {severity for *_, severity in told} == {WARNING}


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (0.01, []),
        (0.02, [("limits.velocity", "", WARNING)]),  # 0.3 rad/s
        (0.5, [("arm.unit", "units", PROBLEM)]),  # 7.5 rad/s, twice what the joints reach
    ],
)
def test_increments_need_speeds(largest: float, expected: list[Any]) -> None:
    robot = named(PANDA)
    robot = replace(robot, action=Action("joint_delta", robot.action.dt))
    ends = np.array([largest] * 7 + [0.08])
    assert found(robot, {ACTION: range_of([*-ends[:7], 0.0], ends)}) == expected


def test_velocities_are_part_of_states() -> None:
    robot = named(PANDA)
    robot = replace(robot, states={STATE: ("joint_velocities", "joint_positions")})
    low, high = (np.array(ends[:JOINTS]) for ends in DATA[PANDA])
    slow, fast = np.full(JOINTS, 1.0), np.full(JOINTS, 50.0)
    assert found(robot, {STATE: range_of([*-slow, *low], [*slow, *high])}) == []
    told = found(robot, {STATE: range_of([*-fast, *low], [*fast, *high])})
    assert told == [("arm.unit", "units", PROBLEM)]


def test_the_models_velocities_count(tmp_path: Path) -> None:
    text = '<robot name="a"><link name="base"/><link name="tip"/><joint name="{}" type="revolute">'
    text += '<parent link="base"/><child link="tip"/><axis xyz="0 0 1"/>'
    text += '<limit lower="-1" upper="1" velocity="{}" effort="1"/></joint></robot>'
    robot = named(PANDA)
    limits = robot.limits
    one = replace(
        robot,
        arm=replace(robot.arm, joints=("a",), model=tmp_path / "a.urdf", tcp="tip", home=()),
        limits=replace(limits, low=(), high=(), velocity=(2.0,), step=(0.1,), physical_velocity=()),
    )
    (tmp_path / "a.urdf").write_text(text.format("a", 1.5))
    assert found(one, {}) == [("limits.velocity", "velocity", PROBLEM)]
    (tmp_path / "a.urdf").write_text(text.format("a", 2.0))
    assert found(one, {}) == []


def test_a_physical_velocity_that_no_joint_has_is_a_warning() -> None:
    robot = named(PANDA)
    robot = replace(robot, limits=replace(robot.limits, physical_velocity=(99.0,) * JOINTS))
    assert found(robot, {}) == [("limits.physical_velocity", "", WARNING)]


# ---- grippers and poses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "low", "high", "expected"),
    [
        ("opening", 0.0, 0.08, []),
        ("opening", 0.0, 0.11, [("gripper.action_scale", "gripper", WARNING)]),
        ("opening", 0.0, 80.0, [("gripper.action_scale", "gripper", PROBLEM)]),  # millimetres
        ("opening", 0.2, 0.4, [("gripper.action_scale", "gripper", PROBLEM)]),
        ("opening", 0.0, 0.001, [("gripper.action_scale", "", WARNING)]),
        ("binary", -1.0, 1.0, []),
        ("binary", 0.0, 1.0, []),
        ("binary", 0.2, 1.0, [("gripper.action", "", WARNING)]),  # never closes
        ("binary", -1.0, 0.0, [("gripper.action", "", WARNING)]),  # never opens
        ("binary", 0.0, 100.0, [("gripper.action", "gripper", PROBLEM)]),
    ],
)
def test_grippers(kind: str, low: float, high: float, expected: list[Any]) -> None:
    robot = named(PANDA)
    assert robot.gripper is not None
    robot = replace(robot, gripper=replace(robot.gripper, action=kind))
    ends = [[*values[:JOINTS]] for values in DATA[PANDA]]
    assert found(robot, {ACTION: range_of([*ends[0], low], [*ends[1], high])}) == expected


def test_a_gripper_that_counts_backwards_is_mapped_before_it_is_compared() -> None:
    robot = named(PANDA)
    assert robot.gripper is not None
    robot = replace(robot, gripper=replace(robot.gripper, policy=Linear(-0.0008, 0.08)))
    ends = [[*values[:JOINTS]] for values in DATA[PANDA]]
    assert found(robot, {ACTION: range_of([*ends[0], 0.0], [*ends[1], 100.0])}) == []


@pytest.mark.parametrize(
    ("reach", "expected"),
    [
        (1.0, []),
        (0.01, [("action.kind", "statistics", WARNING)]),  # metres
        (3.0, [("action.kind", "statistics", WARNING)]),
        (30.0, [("action.kind", "statistics", PROBLEM)]),  # millimetres
    ],
)
def test_steps_of_a_pose_are_shares(reach: float, expected: list[Any]) -> None:
    ends = np.array([reach] * 6 + [1.0])
    assert found(load_robot_config(), {ACTION: range_of(-ends, ends)}) == expected


def test_positions_of_the_tool_are_in_metres() -> None:
    robot = load_robot_config()
    low, high = np.zeros(14), np.ones(14)
    high[7] = 0.1  # the opening
    assert found(robot, {STATE: range_of(low, high)}) == []
    high[:3] = 400.0
    assert found(robot, {STATE: range_of(low, high)}) == [(f"state.{STATE}", "units", PROBLEM)]


def test_a_home_outside_the_limits_is_refused_whatever_is_allowed() -> None:
    robot = named(PANDA)
    home = (0.0, -0.8, 0.0, 0.5, 0.0, 1.6, 0.8)
    robot = replace(robot, arm=replace(robot.arm, home=home), allow=("position_limits", "units"))
    assert found(robot, {}) == [("arm.home", "", PROBLEM)]


# ---- texts --------------------------------------------------------------------------------------


def test_the_text_is_bounded_and_begins_with_the_first_problem() -> None:
    problems = [str(Finding(f"key{i}", "x" * 300, "a rule", "A remedy.")) for i in range(9)]
    text = explained(named(PANDA), "c" * 5000, problems)
    assert text.startswith("does not fit: 9 problems. 1. key0: xxx")
    assert "And 6 more." in text
    assert len(text) < 2000
    assert verdict(problems[:1], ["w"]) == "does not fit: 1 problem"
    assert verdict([], ["w", "w"]) == "fits, with 2 warnings"


# ---- statistics ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all statistics."""
    ends = DATA[PANDA]
    return write_checkpoint(tmp_path_factory.mktemp("act"), statistics(*ends), statistics(*ends))


@pytest.mark.parametrize(
    ("kinds", "source", "share"),
    [
        (("mean", "std", "min", "max", "q01", "q99"), "q01 to q99", 0.01),
        (("mean", "std", "min", "max"), "min to max", 0.0),
        (("mean", "std"), "mean -+ std", 0.25),
    ],
)
def test_the_best_statistics_count(
    tmp_path: Path,
    kinds: tuple[str, ...],
    source: str,
    share: float,
) -> None:
    low, high = (np.array(ends) for ends in DATA[PANDA])
    values = statistics(low, high)
    write_checkpoint(tmp_path, values, values, kinds)
    ranges = read_ranges(str(tmp_path), {STATE: 8, ACTION: 8})
    for seen in ranges.values():
        assert isinstance(seen, Range)
        assert seen.source == source
        np.testing.assert_allclose(seen.low, low + share * (high - low), atol=1e-5)
        np.testing.assert_allclose(seen.high, high - share * (high - low), atol=1e-5)
    missing = read_ranges(str(tmp_path), {STATE: 3, ACTION: 4})
    assert missing == dict.fromkeys((STATE, ACTION), "the checkpoint has no statistics of it")


def rewritten(folder: Path, checkpoint: Path, name: str, change: Any) -> str:
    """Return a copy of a checkpoint whose JSON file `name` was changed."""
    shutil.copytree(checkpoint, folder / "copy")
    values = json.loads((folder / "copy" / name).read_text())
    change(values)
    (folder / "copy" / name).write_text(json.dumps(values))
    return str(folder / "copy")


def test_bins_stand_for_the_statistics_of_actions(tmp_path: Path, trained: Path) -> None:
    def forget(values: dict[str, Any]) -> None:
        for step in values["steps"]:
            step.pop("state_file", None)

    checkpoint = rewritten(tmp_path, trained, "policy_preprocessor.json", forget)
    file = Path(checkpoint) / "policy_postprocessor.json"
    values = json.loads(file.read_text())
    forget(values)
    file.write_text(json.dumps(values))
    assert isinstance(read_ranges(checkpoint, {ACTION: 8})[ACTION], str)
    config = Path(checkpoint) / "config.json"
    settings = json.loads(config.read_text())
    for tokens, measured in (
        ({"action_range": "quantile", "action_low": [-1.0] * 8, "action_high": [2] * 8}, True),
        ({"action_range": "fixed", "action_low": [-1.0] * 8, "action_high": [2] * 8}, False),
        ({"q01": [-1] * 8, "q99": [2] * 8}, True),
    ):
        config.write_text(json.dumps(settings | {"action_tokens": tokens}))
        seen = read_ranges(checkpoint, {ACTION: 8})[ACTION]
        assert isinstance(seen, Range)
        assert (seen.low[0], seen.high[7], seen.measured) == (-1.0, 2.0, measured)
    for wrong in ({"action_low": [-1] * 8, "action_high": ["x"] * 8}, [], "x"):
        config.write_text(json.dumps(settings | {"action_tokens": wrong}))
        assert isinstance(read_ranges(checkpoint, {ACTION: 8})[ACTION], str)


def test_relative_actions_are_not_compared(tmp_path: Path, trained: Path) -> None:
    step = {"registry_name": "relative_actions_processor", "config": {"enabled": True}}

    def add(values: dict[str, Any]) -> None:
        values["steps"].append(step)

    checkpoint = rewritten(tmp_path, trained, "policy_preprocessor.json", add)
    ranges = read_ranges(checkpoint, {STATE: 8, ACTION: 8})
    assert ranges[ACTION] == "its actions are relative to the state"
    assert isinstance(ranges[STATE], Range)


def test_the_shipped_student_is_read() -> None:
    ranges = read_ranges("student", feature_lengths(load_robot_config()))
    seen = ranges[STATE]
    assert isinstance(seen, Range)
    assert seen.low.shape == (14,)
    assert found(load_robot_config(), ranges) == []


def header(tensors: Any, size: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + b"\0" * 64


def entry(kind: str = "F32", shape: Any = (8,), offsets: Any = (0, 32)) -> dict[str, Any]:
    return {f"{STATE}.min": {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff" * 100, id="endless header"),
        pytest.param(header([1]), id="no mapping"),
        pytest.param(header({}, 10**6), id="cut header"),
        pytest.param(header({f"{STATE}.min": 3}), id="no entry"),
        pytest.param(header(entry(offsets=(0, 10**15))), id="many bytes"),
        pytest.param(header(entry(offsets=(32, 0))), id="backwards"),
        pytest.param(header(entry(offsets=(0, 8))), id="too few bytes"),
        pytest.param(header(entry(offsets=(10**19, 10**19 + 32))), id="far away"),
        pytest.param(header(entry(shape=(-1, -8))), id="negative"),
        pytest.param(header(entry(shape=("a",))), id="no numbers"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path: Path, trained: Path, content: bytes) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("policy_pre*normalizer*.safetensors")
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"statistics .* do not load"):
        read_ranges(str(tmp_path / "copy"), {STATE: 8})


@pytest.mark.parametrize("change", [entry("I64"), entry(shape=(10**9,)), {}])
def test_statistics_of_another_form_are_none(tmp_path: Path, trained: Path, change: Any) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("policy_pre*normalizer*.safetensors")
    file.write_bytes(header(change))
    assert isinstance(read_ranges(str(tmp_path / "copy"), {STATE: 8})[STATE], str)


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys; from ceed_vla.serving.data_ranges import read_ranges; "
        f"read_ranges({str(pretrained_path('student'))!r}, {{'action': 7}}); "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
