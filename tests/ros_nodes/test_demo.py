"""``ceed-vla ros-demo``: settings it refuses, its report, and a whole run whose bag another reader
opens.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rerun_files import entities_of

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from rich.console import Console

from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.report.command import write_page
from ceed_vla.ros_nodes.demo.report import rest_after
from ceed_vla.ros_nodes.demo.ros_demo import RosDemoConfig, ros_arguments, ros_demo
from ceed_vla.ros_nodes.demo.session import Session

KEYS = [
    *(
        "command_rate_hz",
        "missed_ticks_fraction",
        "jitter_ms",
        "episodes",
        "success_rate",
        "success_ci95",
    ),
    *("seam_step_ratio", "observation_to_command_ms", "decode_ms", "holds", "clamps"),
]
MS = 1_000_000  # [ns]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"episodes": 0},
            ConfigError,
            r"--episodes is 0; it must be a whole number in \[1, 10000\]",
        ),
        ({"stream_seconds": -1.0}, ConfigError, "--stream_seconds"),
        (
            {"action_interface": "wheels"},
            ConfigError,
            "no interface 'wheels'; it has forward_position",
        ),
        ({"task": "juggle"}, ConfigError, "juggle"),
        ({"latencies_ms": ["fast"]}, ConfigError, "--latencies_ms"),
        ({"latencies_ms": [-1.0]}, ConfigError, r"--latencies_ms is \[-1.0\]; it must be"),
        (
            {"simulated_time": True, "rivals": ["nowhere:ar"]},
            CheckpointError,
            "No checkpoint folder",
        ),
        (
            {"simulated_time": True, "action_interface": "wheels"},
            ConfigError,
            "no interface 'wheels'",
        ),
        ({"checkpoint": "nowhere"}, CheckpointError, "No checkpoint folder"),
        (
            {"simulated_time": True, "decoding": "ar"},
            ConfigError,
            "--decoding is not used with --simulated_time True",
        ),
        ({"reaction": True}, ConfigError, "--reaction is not used with --simulated_time False"),
    ],
)
def test_options_that_cannot_work_start_nothing(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        ros_demo(RosDemoConfig(output_dir=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_an_interrupt_on_the_way_out_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.__new__(Session)
    session._processes = {name: subprocess.Popen(["sleep", "60"]) for name in ("sim", "policy")}
    sim, policy = session._processes.values()

    def interrupted(timeout: float | None = None) -> int:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(policy, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.close()
    assert sim.poll() is not None
    assert policy.poll() is not None


def test_texts_are_quoted_for_ros() -> None:
    assert ros_arguments({"a": "1e5", "b": 2.0}) == ["-p", 'a:="1e5"', "-p", "b:=2.0"]


def test_time_to_rest_is_the_last_moving_state() -> None:
    states = [
        (t * MS, SimpleNamespace(velocity=[0.0, v]))
        for t, v in ((0, 1), (10, -1), (20, 0.2), (30, 0))
    ]
    assert rest_after(states, 5 * MS) == 15.0
    assert rest_after(states[:3], 5 * MS) is None
    assert rest_after(states, 40 * MS) is None  # no joint state shows it


@pytest.mark.slow
@pytest.mark.timed
def test_a_run_writes_its_numbers_and_a_bag(tmp_path: Path) -> None:
    rosbags = pytest.importorskip("rosbags.highlevel", reason="rosbags is not installed")
    config = RosDemoConfig(
        episodes=2,
        task="push_cube",
        output_dir=str(tmp_path / "run"),
        stream_seconds=2.0,
        kill=True,
        rerun=str(tmp_path / "run.rrd"),
    )
    with (tmp_path / "console.txt").open("w") as file:
        report = ros_demo(config, Console(file=file, width=100))
    assert list(report) == KEYS
    assert json.loads((tmp_path / "run" / "ros.json").read_text()) == report
    assert set(report["jitter_ms"]) == set(report["observation_to_command_ms"]) == {"p50", "p99"}
    assert set(report["decode_ms"]) == {"p50", "p95", "p99"}
    details = json.loads((tmp_path / "run" / "details.json").read_text())
    logged = entities_of(tmp_path / "run.rrd")
    assert {"/front/image_raw", "/wrist/image_raw", "/joint_states/position"} <= logged
    assert {"/policy/instruction", "/diagnostics/decode_ms_p50"} <= logged
    page = write_page([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "% of 2 episodes solved" in page
    assert f"at {report['command_rate_hz']:.2f} commands a second" in page
    assert [episode["seed"] for episode in details["per_episode"]] == [50000, 50001]
    assert details["rest_after_kill_ms"] is not None
    assert details["commands"] > 300
    assert details["load"] > 0
    assert "policy node killed in mid-motion" in (tmp_path / "console.txt").read_text()
    with pytest.raises(ConfigError, match="did not make"):
        ros_demo(replace(config, output_dir=str(tmp_path)))  # console.txt is a user's file
    with rosbags.AnyReader([tmp_path / "run" / "bag.mcap"]) as reader:
        counts = {connection.topic: connection.msgcount for connection in reader.connections}
    assert counts["/forward_position_controller/commands"] >= details["commands"]
    assert {
        "/front/image_raw",
        "/wrist/image_raw",
        "/joint_states",
        "/diagnostics",
        "/sim/success",
    } <= set(counts)


def quiet(config: RosDemoConfig, file: Path) -> dict[str, Any]:
    with file.open("w") as output:
        return ros_demo(config, Console(file=output, width=100))


@pytest.mark.slow
def test_behind_a_server_episodes_in_simulated_time_are_the_same(tmp_path: Path) -> None:
    rows = []
    for remote in (False, True):
        config = RosDemoConfig(
            episodes=4,
            seed=40000,
            output_dir=str(tmp_path / str(remote)),
            simulated_time=True,
            rivals=["student:ceed"],
            latencies_ms=[20.0],
            remote=remote,
        )
        rows += quiet(config, tmp_path / "console.txt")["rows"]
    local, behind = rows
    assert local == behind


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.realtime
def test_a_run_with_a_server(tmp_path: Path) -> None:
    config = RosDemoConfig(
        episodes=1, task="push_cube", output_dir=str(tmp_path / "run"), remote=True
    )
    report = quiet(config, tmp_path / "console.txt")
    assert report["episodes"] == 1
    assert report["decode_ms"]["p50"] > 0
    assert "Listening" not in (tmp_path / "run" / "policy.log").read_text()
    assert "The policy is ready" in (tmp_path / "run" / "server.log").read_text()
