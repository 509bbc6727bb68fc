"""Two processes (gloo, torchrun) give what one gives: losses, trajectories, and a run that goes on after a kill."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import ceed_vla
from training.adapters import LoRAConfig
from training.distill import distill
from training.distill_data import TrajectoriesConfig
from training.teacher import train

WORKER = """
import os, pickle, signal, sys
sys.path[:0] = [sys.argv[1]]
from training.distill import distill
from training.run import Run
from training.teacher import train
from training.trajectories import collect

kill_at = int(sys.argv[3])
if kill_at >= 0 and os.environ["RANK"] == "1":
    original = Run.optimize
    def optimize(run, *arguments):
        if run.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        original(run, *arguments)
    Run.optimize = optimize
with open(sys.argv[2], "rb") as file:  # written by the test
    for name, config in pickle.load(file):
        {"train": train, "collect": collect, "distill": distill}[name](config)
"""


@pytest.fixture
def together(tmp_path: Path) -> Callable[..., int]:
    """Run ("train" | "collect" | "distill", settings) in two processes; the second is killed before a step."""

    def launch(*jobs: tuple[str, Any], kill_at: int = -1) -> int:
        script, settings = tmp_path / "worker.py", tmp_path / "jobs.pickle"
        script.write_text(WORKER)
        settings.write_bytes(pickle.dumps(jobs))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        arguments = [str(script), str(Path(__file__).parents[2]), str(settings), str(kill_at)]
        done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=400)
        if kill_at < 0:
            assert done.returncode == 0, done.stderr[-3000:]
        return done.returncode

    return launch


@pytest.fixture
def assert_equal_losses(read_log: Callable[..., dict[int, float]]) -> Callable[..., None]:
    """Losses of two runs agree at every step."""

    def check(one: Path, other: Path, steps: int, key: str = "loss", tolerance: float = 1e-4) -> None:
        first, second = read_log(one, key), read_log(other, key)
        assert sorted(first) == sorted(second) == list(range(1, steps + 1))
        np.testing.assert_allclose(list(second.values()), list(first.values()), rtol=tolerance)

    return check


def test_teacher_and_trajectories(
    studio: Any, tmp_path: Path, together: Callable[..., int], assert_equal_losses: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = {"steps": 20, "grounding_steps": 0, "save_every": 50}  # with augmentation
    train(studio.train_config(tmp_path / "one", **settings))
    together(
        ("train", studio.train_config(tmp_path / "two", threads=1, **settings)),
        ("collect", studio.collect_config(tmp_path / "trajectories")),
    )
    assert_equal_losses(tmp_path / "one", tmp_path / "two", 20)
    assert_equal_losses(tmp_path / "one", tmp_path / "two", 20, "grounding_loss")
    ceed_vla.load(tmp_path / "two" / "checkpoints" / "final")
    for file in studio.trajectories.glob("*.parquet"):
        assert pq.read_table(tmp_path / "trajectories" / file.name) == pq.read_table(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "trust_region"},
        {"loss": "paper", "states": "stored", "gradient_accumulation": 2},
        {"trajectories": TrajectoriesConfig(online=True), "lora": LoRAConfig(rank=2)},
    ],
    ids=["trust_region", "paper", "online_lora"],
)
def test_student(
    studio: Any, tmp_path: Path, together: Callable[..., int], assert_equal_losses: Callable[..., None],
    changes: dict[str, Any],
) -> None:  # fmt: skip
    settings = {"steps": 20, "save_every": 50, **changes}
    distill(studio.distill_config(tmp_path / "one", **{**settings, "gradient_accumulation": 1}))
    together(("distill", studio.distill_config(tmp_path / "two", threads=1, **settings)))
    assert_equal_losses(tmp_path / "one", tmp_path / "two", 20)
    assert_equal_losses(tmp_path / "one", tmp_path / "two", 20, "anchor_loss", 1e-3)
    assert_equal_losses(tmp_path / "one", tmp_path / "two", 20, "state_accuracy")


@pytest.mark.slow
def test_a_killed_process_and_a_run_that_goes_on(
    studio: Any, tmp_path: Path, together: Callable[..., int], assert_equal_losses: Callable[..., None]
) -> None:
    settings = {"steps": 10, "grounding_steps": 0, "save_every": 4}
    train(studio.train_config(tmp_path / "whole", **settings))
    config = studio.train_config(tmp_path / "run", **settings)
    assert together(("train", config), kill_at=6) != 0
    config.resume = True
    assert together(("train", config), kill_at=9) != 0  # goes on from step 4, and from step 8 the next time
    train(config)  # one process may go on where two began
    assert_equal_losses(tmp_path / "whole", tmp_path / "run", 10)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    studio: Any, tmp_path: Path, assert_equal_losses: Callable[..., None], accumulation: int
) -> None:
    for name, runner, config in (
        ("teacher", train, studio.train_config),
        ("student", distill, studio.distill_config),
    ):
        runner(config(tmp_path / name / "one", steps=5))
        runner(config(tmp_path / name / "parts", steps=5, gradient_accumulation=accumulation))
        steps = 8 if name == "teacher" else 5
        assert_equal_losses(tmp_path / name / "one", tmp_path / name / "parts", steps)
