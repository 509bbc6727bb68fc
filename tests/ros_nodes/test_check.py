"""``ceed-vla robot check`` and ``ros-demo --simulated_time``: offline and in simulated time,
without a ROS graph.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from ceed_vla.cli.entry import main
from ceed_vla.folders import pretrained_path
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_setup import make_setup
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config


def test_a_robot_that_fits_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["robot", "check", str(packaged_config())]) == 0
    shown = capsys.readouterr().out
    for text in (
        "observation.images.wrist",
        "wrist/image_raw",
        "14 values",
        "ee_delta, 10 per second",
        "joint7",
    ):
        assert text in shown


def test_all_that_does_not_fit_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(packaged_config().read_text())
    values["arm"]["model"] = str(packaged_config().parent / values["arm"]["model"])
    values["arm"]["home"][0] = 3.5
    del values["images"]["observation.images.wrist"]
    values["gripper"]["action"] = "none"
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(values))
    assert main(["robot-check", str(tmp_path / "robot.yaml"), "--checkpoint", "teacher"]) == 1
    told = capsys.readouterr().err
    for text in (
        "needs 'observation.images.wrist'",
        "actions of 7 values",
        "arm.home: joint1 is at 3.5 rad",
    ):
        assert text in told
    assert main(["robot-check", str(tmp_path / "none.yaml")]) == 1
    assert main(["robot-check", str(packaged_config()), "--checkpoint", str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def brought(tmp_path: Path) -> tuple[Path, Path]:
    """A user's file, and a checkpoint with a template that has other limits, topics and signs."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(pretrained_path("student"), checkpoint)
    values = yaml.safe_load(packaged_config().read_text())
    values["arm"]["model"] = str(packaged_config().parent / values["arm"]["model"])
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    values["arm"]["sign"] = [-1] * 7
    values["limits"]["velocity"] = [9.0] * 7
    values["images"]["observation.images.front"]["topic"] = "their/camera"
    del values["limits"]["step"]
    (checkpoint / "robot.yaml").write_text("# made by them\n" + yaml.safe_dump(values))
    return tmp_path / "own.yaml", checkpoint


def test_a_template_is_compared_and_printed(
    brought: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own, checkpoint = brought
    assert main(["robot", "check", str(own), "--checkpoint", str(checkpoint)]) == 0
    rows = capsys.readouterr().out.partition("key that differs")[2].splitlines()
    told = {
        cells[1].strip(): (cells[2].strip(), cells[3].strip())
        for cells in (row.split("│") for row in rows)
        if cells[1:]
    }
    assert set(told) == {
        "arm.sign",
        "limits.velocity",
        "images.observation.images.front.topic",
        "limits.step",
    }
    assert told["images.observation.images.front.topic"] == ("'front/image_raw'", "'their/camera'")
    assert told["arm.sign"] == ("-", "[-1, -1, -1, -1, -1, -1, -1]")
    assert told["limits.step"][1] == "-"
    assert main(["robot", "check", "--checkpoint", str(checkpoint)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == (checkpoint / "robot.yaml").read_text().rstrip(
        "\n"
    )
    (checkpoint / "robot.yaml").unlink()
    assert main(["robot", "check", "--checkpoint", str(checkpoint)]) == 1
    assert "has no robot.yaml; name a robot's file" in capsys.readouterr().err
    assert main(["robot", "check", str(own), "--checkpoint", str(checkpoint)]) == 0
    assert "differs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["a: *b", "a: !!python/name:os.system", "a: \x1b[2J", "[" * 5000, "a" * 100_001]
)
def test_a_template_is_plain_and_short(
    brought: tuple[Path, Path], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own, checkpoint = brought
    (checkpoint / "robot.yaml").write_text(text)
    for words in (["--checkpoint", str(checkpoint)], [str(own), "--checkpoint", str(checkpoint)]):
        assert main(["robot", "check", *words]) == 1
        told = capsys.readouterr()
        assert "robot.yaml cannot be read" in told.err
        assert "\x1b" not in told.out + told.err


def test_nothing_of_a_template_moves_an_arm(brought: tuple[Path, Path]) -> None:
    """Limits, topics and signs come from the named file, as if the checkpoint had no template."""
    own, checkpoint = brought
    given = {"robot_config": str(own), "checkpoint": str(checkpoint), "max_joint_velocity": 10.0}
    setups = []
    for _ in range(2):
        worker = SimpleNamespace(ready=False, failed=None, begin=lambda: None)
        values = {**defaults(POLICY_PARAMETERS), **given}
        setups.append(make_setup(values, lambda: None, 0.0, lambda *_, worker=worker, **__: worker))
        (checkpoint / "robot.yaml").unlink(missing_ok=True)
    for setup in setups:
        assert (setup.robot.source, setup.robot.limits) == (own, load_robot_config(own).limits)
        np.testing.assert_array_equal(
            setup.safety.limits.max_velocity, [2.2, 2.2, 2.2, 2.2, 2.6, 2.6, 3.5]
        )
        assert [camera.source.topic for camera in setup.observations.cameras] == [
            "front/image_raw",
            "wrist/image_raw",
        ]
        assert (np.array(setup.robot.arm.units.scale) > 0.0).all()


def test_wrong_usage_is_another_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["robot", "check", "--file", str(packaged_config()), "--robot", "x"]) == 2
    assert "unknown flag" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timed
def test_success_against_latency_in_simulated_time(tmp_path: Path) -> None:
    flags = [
        "--latencies_ms",
        "16,400",
        "--rivals",
        "student:cap1,student",
        "--episodes",
        "2",
        "--seed",
        "40000",
    ]
    runs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        words = [
            "ros-demo",
            "--simulated_time",
            "true",
            "--task",
            "push_cube",
            "--output_dir",
            str(folder),
            *flags,
        ]
        assert main(words) == 0
        assert (folder / "simulated_time.png").stat().st_size > 1000
        runs.append(json.loads((folder / "simulated_time.json").read_text())["rows"])
    assert runs[0] == runs[1]  # independent of the load
    assert [(row["rival"], row["latency_ms"]) for row in runs[0]] == [
        *(("student:cap1", latency) for latency in (16.0, 400.0)),
        *(("student", latency) for latency in (16.0, 400.0)),
    ]
    for row in runs[0]:
        assert row["observation_to_command_ms"]["p50"] >= row["latency_ms"]
        assert row["episodes"] == 2
    assert runs[0][2]["success"] == 2
