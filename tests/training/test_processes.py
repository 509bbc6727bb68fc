"""Two processes (gloo, `accelerate launch` with the recipes' settings) equal one.

They resume after a kill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_vlms import make_tiny_vlm

import ceed_vla
from ceed_vla.errors import ConfigError
from ceed_vla.training.adapters import LoRAConfig
from ceed_vla.training.distill import distill
from ceed_vla.training.distill_data import TrajectoriesConfig
from ceed_vla.training.teacher import train

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "accelerate"
FINAL = Path("checkpoints/final/pretrained_model")

WORKER = """
import json, os, signal, sys
sys.path[:0] = [sys.argv[1]]
import torch
from accelerate import Accelerator

torch.set_num_threads(1)
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    # accelerate shards on accelerators only; on the CPU torch's own fully_shard works all the same.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__
    def begin_as_gpus(state, *arguments, **settings):
        new = not state._shared_state
        begin(state, *arguments, **settings)
        if new:
            state.distributed_type = DistributedType.MULTI_GPU
    PartialState.__init__ = begin_as_gpus

import draccus
from ceed_vla.training.distill import DistillConfig, distill
from ceed_vla.training.run import Run
from ceed_vla.training.teacher import TrainConfig, train
from ceed_vla.training.trajectories import CollectConfig, collect

commands = {
    "train": (train, TrainConfig),
    "collect": (collect, CollectConfig),
    "distill": (distill, DistillConfig),
}
kill_at = int(sys.argv[3])
if kill_at >= 0 and os.environ["RANK"] == "1":
    original = Run.optimize
    def optimize(run, *arguments):
        if run.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        original(run, *arguments)
    Run.optimize = optimize
with open(sys.argv[2]) as file:  # written by the test
    jobs = json.load(file)
end = Accelerator.end_training
for number, (name, settings) in enumerate(jobs, 1):
    # A run ends with its process group; the next job in these processes needs it still.
    Accelerator.end_training = end if number == len(jobs) else Accelerator.wait_for_everyone
    function, kind = commands[name]
    function(draccus.decode(kind, settings))
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    # After two sharded jobs in one process the interpreter's exit aborts about every second time
    # ("terminate called without an active exception"; cause not found). Both jobs are done by here;
    # their files are what is checked.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
"""


@pytest.fixture
def together(tmp_path: Path) -> Callable[..., int]:
    """Run ("train" | "collect" | "distill", settings) in two processes.

    With `kill_at`, the second process is killed before that step.
    """

    def launch(*jobs: tuple[str, Any], recipe: str = "ddp", kill_at: int = -1) -> int:
        script, settings = tmp_path / "worker.py", tmp_path / "jobs.json"
        script.write_text(WORKER)
        settings.write_text(json.dumps([(name, draccus.encode(config)) for name, config in jobs]))
        accelerate = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--main_process_port",
            "0",
        ]
        recipe_flags = ["--config_file", str(RECIPES / f"{recipe}.yaml"), "--num_processes", "2"]
        worker = [str(script), str(ROOT), str(settings), str(kill_at)]
        done = subprocess.run(
            [*accelerate, *recipe_flags, *worker], capture_output=True, text=True, timeout=280
        )
        if kill_at < 0:
            assert done.returncode == 0, done.stderr[-3000:]
        return done.returncode

    return launch


@pytest.fixture
def assert_equal_losses(read_log: Callable[..., dict[int, float]]) -> Callable[..., None]:
    """Losses of two runs agree at every step."""

    def check(
        one: Path, other: Path, steps: int, key: str = "loss", tolerance: float = 1e-4
    ) -> None:
        first, second = read_log(one, key), read_log(other, key)
        assert sorted(first) == sorted(second) == list(range(1, steps + 1))
        np.testing.assert_allclose(list(second.values()), list(first.values()), rtol=tolerance)

    return check


@pytest.mark.slow
def test_teacher_trajectories_and_student(
    studio: Any,
    tmp_path: Path,
    together: Callable[..., int],
    assert_equal_losses: Callable[..., None],
) -> None:
    # With augmentation and Muon, at the learning rates of `ceed-vla train`: 20 steps of larger ones
    # are chaotic.
    teacher = {"steps": 20, "grounding_steps": 0, "save_every": 50, "lr": 1e-3, "muon_lr": 2e-3}
    student = {"steps": 20, "save_every": 50}
    train(studio.train_config(tmp_path / "one", **teacher))
    distill(studio.distill_config(tmp_path / "one_student", **student))
    together(
        ("train", studio.train_config(tmp_path / "two", **teacher)),
        ("collect", studio.collect_config(tmp_path / "trajectories")),
        ("distill", studio.distill_config(tmp_path / "two_student", **student)),
    )
    for key in ("loss", "grounding_loss"):
        assert_equal_losses(tmp_path / "one", tmp_path / "two", 20, key)
    for key in ("loss", "state_accuracy"):
        assert_equal_losses(tmp_path / "one_student", tmp_path / "two_student", 20, key)
    ceed_vla.load(tmp_path / "two" / FINAL)
    shards = sorted(file.name for file in studio.trajectories.glob("*.parquet"))
    assert sorted(file.name for file in (tmp_path / "trajectories").glob("*.parquet")) == shards
    for name in shards:
        assert pq.read_table(tmp_path / "trajectories" / name) == pq.read_table(
            studio.trajectories / name
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "paper", "states": "stored", "gradient_accumulation": 2},
        {"trajectories": TrajectoriesConfig(online=True), "lora": LoRAConfig(rank=2)},
    ],
    ids=["paper_accumulated", "online_lora"],
)
def test_other_students(
    studio: Any,
    tmp_path: Path,
    together: Callable[..., int],
    assert_equal_losses: Callable[..., None],
    changes: dict[str, Any],
) -> None:
    settings = {"steps": 20, "save_every": 50, **changes}
    distill(studio.distill_config(tmp_path / "one", **{**settings, "gradient_accumulation": 1}))
    together(("distill", studio.distill_config(tmp_path / "two", **settings)))
    assert_equal_losses(tmp_path / "one", tmp_path / "two", 20)
    assert_equal_losses(tmp_path / "one", tmp_path / "two", 20, "state_accuracy")


@pytest.mark.slow
def test_a_killed_process_and_a_run_that_goes_on(
    studio: Any,
    tmp_path: Path,
    together: Callable[..., int],
    assert_equal_losses: Callable[..., None],
) -> None:
    settings = {"steps": 10, "grounding_steps": 0, "save_every": 4, "lr": 1e-3, "muon_lr": 2e-3}
    train(studio.train_config(tmp_path / "whole", **settings))
    config = studio.train_config(tmp_path / "run", **settings)
    assert together(("train", config), kill_at=6) != 0
    config.resume = True
    # continues from step 4, and later from step 8
    assert together(("train", config), kill_at=9) != 0
    train(config)  # one process may resume a run of two
    assert_equal_losses(tmp_path / "whole", tmp_path / "run", 10)


@pytest.mark.parametrize(
    "checkpointing",
    [
        pytest.param(False, marks=pytest.mark.external),  # three quarters of a minute each
        pytest.param(True, marks=pytest.mark.slow),
    ],
)
def test_sharded_weights(
    studio: Any,
    tmp_path: Path,
    together: Callable[..., int],
    assert_equal_losses: Callable[..., None],
    checkpointing: bool,
) -> None:
    base = make_tiny_vlm("smolvlm", tmp_path / "base")
    common = {
        "muon_lr": 0.0,
        "save_every": 10,
        "batch_size": 4,
        "gradient_checkpointing": checkpointing,
    }
    teacher = {"steps": 20, "grounding_roots": "", "lr": 1e-3, **common}
    student = {
        "teacher_path": str(tmp_path / "one" / FINAL),
        "trajectories": TrajectoriesConfig(online=True),
        "steps": 20,
        **common,
    }
    train(studio.train_config(tmp_path / "one", policy=studio.vlm_policy(base), **teacher))
    distill(studio.distill_config(tmp_path / "one_student", **student))
    resumed = studio.train_config(tmp_path / "two", policy=studio.vlm_policy(base), **teacher)
    assert together(("train", resumed), recipe="fsdp", kill_at=14) != 0
    resumed.resume = True
    together(
        ("train", resumed),
        ("distill", studio.distill_config(tmp_path / "two_student", **student)),
        recipe="fsdp",
    )
    assert_equal_losses(tmp_path / "one", tmp_path / "two", 20)
    assert_equal_losses(tmp_path / "one_student", tmp_path / "two_student", 20)
    one, _, _ = ceed_vla.load(tmp_path / "one" / FINAL)
    two, _, _ = ceed_vla.load(tmp_path / "two" / FINAL)
    for (name, weight), (_, other) in zip(
        one.named_parameters(), two.named_parameters(), strict=True
    ):
        np.testing.assert_allclose(weight.detach(), other.detach(), atol=1e-3, err_msg=name)


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_recipes_are_settings_of_accelerate(recipe: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    settings = load_config_from_file(str(RECIPES / f"{recipe}.yaml"))
    assert settings.num_processes == 8
    arguments = [
        "--config_file",
        str(RECIPES / f"{recipe}.yaml"),
        "--num_machines",
        "2",
        "--num_processes",
        "16",
    ]
    nodes = ["--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--main_process_port", "29500"]
    parsed, _, _ = _validate_launch_command(
        launch_command_parser().parse_args([*arguments, *nodes, "-m", "ceed_vla.cli", "collect"])
    )
    assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 16, 1)
    assert parsed.use_fsdp == (recipe == "fsdp")
    assert parsed.mixed_precision == "bf16"
    if recipe == "fsdp":
        assert (parsed.fsdp_version, parsed.fsdp_auto_wrap_policy) == (2, "TRANSFORMER_BASED_WRAP")


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    studio: Any, tmp_path: Path, assert_equal_losses: Callable[..., None], accumulation: int
) -> None:
    # Stored states: the student's own are argmaxes, where rounding of a gradient may decide.
    for name, runner, config, more in (
        ("teacher", train, studio.train_config, {}),
        ("student", distill, studio.distill_config, {"states": "stored"}),
    ):
        runner(config(tmp_path / name / "one", steps=5, **more))
        runner(
            config(tmp_path / name / "parts", steps=5, gradient_accumulation=accumulation, **more)
        )
        steps = 8 if name == "teacher" else 5
        assert_equal_losses(tmp_path / name / "one", tmp_path / name / "parts", steps)


def test_more_parts_than_rows(studio: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size is 4, fewer than the 5 parts of 1 processes"):
        train(studio.train_config(tmp_path, batch_size=4, gradient_accumulation=5))
