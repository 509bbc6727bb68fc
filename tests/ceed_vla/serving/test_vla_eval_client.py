"""The harness vla-eval, unmodified, in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.serving_calls import wait_until_ready
from tests.ros_nodes.conftest import tiny_act

HERE = Path(__file__).parent
PACKAGE = "vla-eval==0.8.0"
MAP = (
    "images/agentview=observation.images.front,images/wrist=observation.images.wrist,"
    "states=observation.state"
)
BENCHMARK = "vla_eval_benchmark:Tabletop"
RESET_SECONDS = 45.0  # longer than the time in which other clients must answer a ping

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the harness."""
    folder = tmp_path_factory.mktemp("harness") / "venv"
    uv = [sys.executable, "-m", "uv", "-q"]
    subprocess.run([*uv, "venv", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([*uv, "pip", "install", "--python", python, PACKAGE], check=True)
    return folder


@pytest.fixture(scope="module")
def port(serving: Callable[..., Any]) -> int:
    server = serving("--protocol=vla_eval", f"--map={MAP}")
    wait_until_ready(server.port)
    port: int = server.port
    return port


def harness(venv: Path, folder: Path, *arguments: str) -> str:
    """What ``vla-eval`` prints and logs; it must succeed."""
    tools = Path(sys.executable).parent  # has uv
    environment = {
        **os.environ,
        "VIRTUAL_ENV": str(venv),
        "PATH": f"{venv / 'bin'}:{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),
    }
    done = subprocess.run(
        ["vla-eval", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def evaluated(venv: Path, folder: Path, port: int, **settings: Any) -> dict[str, Any]:
    """The results of a run of the test's benchmark."""
    config = {"benchmarks": [{"benchmark": BENCHMARK, "name": "tabletop", **settings}]}
    (folder / "tabletop.yaml").write_text(json.dumps(config))
    url = f"ws://127.0.0.1:{port}"
    printed = harness(
        venv, folder, "run", "--no-docker", "-c", "tabletop.yaml", "--server-url", url,
        "--output-dir", "results",
    )  # fmt: skip
    print(*re.findall("stale=[0-9]+%", printed))  # of live episodes: ticks without a new action
    results: dict[str, Any] = json.loads((folder / "results/tabletop_aggregate.json").read_text())
    return results


def test_a_benchmark_is_evaluated(venv: Path, port: int, tmp_path: Path) -> None:
    results = evaluated(venv, tmp_path, port, episodes_per_task=2)
    assert results["server_info"]["checkpoint"] == "student"
    known, unknown = results["tasks"]
    assert [episode["metrics"]["success"] for episode in known["episodes"]] == [True, True]
    # The policy's error ends an episode, but not the run.
    assert results["num_errors"] == 2
    for episode in unknown["episodes"]:
        assert episode["failure_reason"] == "model_act"
        assert "Server error: {'error': \"0 of the 2 words of the" in episode["failure_detail"]


@pytest.mark.parametrize("wait", [False, True])
def test_a_simulators_clock_goes_on(venv: Path, port: int, tmp_path: Path, wait: bool) -> None:
    """Episodes follow each other on one connection; no server is asked to be in time."""
    settings = {"hz": 20, "wait_first_action": wait, "max_tasks": 1, "episodes_per_task": 3}
    results = evaluated(
        venv, tmp_path, port, mode="live", params={"steps": 40}, max_steps=80, **settings
    )
    assert (results["mode"], results["mean_success"], results["num_errors"]) == ("live", 1.0, 0)
    for episode in results["tasks"][0]["episodes"]:
        assert episode["steps"] == 40


def test_a_simulator_resets_for_long(venv: Path, port: int, tmp_path: Path) -> None:
    """The harness answers no ping meanwhile, and does not lose its connection."""
    params = {"reset_seconds": RESET_SECONDS}
    results = evaluated(venv, tmp_path, port, max_tasks=1, params=params)
    assert (results["mean_success"], results["num_errors"]) == (1.0, 0)


@pytest.mark.realtime  # the harness waits half a minute for the hello
def test_its_smoke_test_passes(venv: Path, tmp_path: Path) -> None:
    """It sends two cameras, a state of 8 numbers, and an instruction that the student refuses."""
    tiny_act(tmp_path / "act", joints=8, spread=1.0)
    config = {
        "script": str(HERE / "vla_eval_script.py"),
        "args": {
            "python": sys.executable,
            "policy.path": str(tmp_path / "act"),
            "map": "images/agentview=observation.images.top,state=observation.state",
        },
    }
    (tmp_path / "ours.yaml").write_text(json.dumps(config))
    printed = harness(venv, tmp_path, "test", "-c", "ours.yaml")
    assert "3 steps, success=True" in printed
    assert "1 passed, 0 failed, 0 skipped" in printed
