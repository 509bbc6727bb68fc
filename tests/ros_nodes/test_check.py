"""``ceed-vla robot check`` and ``ros-demo --simulated_time``: offline and in simulated time, without a ROS graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from ceed_vla.cli import main
from ros_nodes.robot.robot_file import packaged_config


def test_a_robot_that_fits_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["robot", "check", str(packaged_config())]) == 0
    shown = capsys.readouterr().out
    for text in ("observation.images.wrist", "wrist/image_raw", "14 values", "ee_delta, 10 a second", "joint7"):
        assert text in shown


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(packaged_config().read_text())
    values["arm"]["model"] = str(packaged_config().parent / values["arm"]["model"])
    values["arm"]["home"][0] = 3.5
    del values["images"]["observation.images.wrist"]
    values["gripper"]["action"] = "none"
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(values))
    assert main(["robot-check", str(tmp_path / "robot.yaml"), "--checkpoint", "teacher"]) == 1
    told = capsys.readouterr().err
    for text in ("wants 'observation.images.wrist'", "actions of 7 values", "arm.home of joint1 is 3.5, outside"):
        assert text in told
    assert main(["robot-check", str(tmp_path / "none.yaml")]) == 1
    assert main(["robot-check", str(packaged_config()), "--checkpoint", str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_success_against_latency_in_simulated_time(tmp_path: Path) -> None:
    flags = ["--latencies_ms", "16,400", "--rivals", "student:cap1,student", "--episodes", "2", "--seed", "40000"]
    runs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        words = ["ros-demo", "--simulated_time", "true", "--task", "push_cube", "--output_dir", str(folder), *flags]
        assert main(words) == 0
        assert (folder / "simulated_time.png").stat().st_size > 1000
        runs.append(json.loads((folder / "simulated_time.json").read_text())["rows"])
    assert runs[0] == runs[1]  # whatever the load
    assert [(row["rival"], row["latency_ms"]) for row in runs[0]] == [
        *(("student:cap1", latency) for latency in (16.0, 400.0)),
        *(("student", latency) for latency in (16.0, 400.0)),
    ]
    for row in runs[0]:
        assert row["observation_to_command_ms"]["p50"] >= row["latency_ms"]
        assert row["episodes"] == 2
    assert runs[0][2]["solved"] == 2
