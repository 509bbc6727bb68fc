"""LeRobot's own training command drives the policy: train, resume, and load what it wrote."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ceed_vla

REPOSITORY = Path(__file__).parents[2]
PLUGIN = "lerobot_policy_ceed_vla"
TASKS = ("put the red cube in the bin", "push the blue cube")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    from lerobot.datasets import LeRobotDataset

    image = {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]}
    sizes = {"observation.state": 14, "observation.environment_state": 40, "action": 7}
    vectors = {name: {"dtype": "float32", "shape": (size,), "names": None} for name, size in sizes.items()}
    cameras = {f"observation.images.{name}": image for name in ("front", "wrist")}
    root, random = tmp_path / "data", np.random.default_rng(0)
    dataset = LeRobotDataset.create("local/data", 10, {**cameras, **vectors}, root=root, use_videos=False)
    for task in TASKS:
        for _ in range(10):
            pictures = {name: random.integers(0, 256, (96, 96, 3), dtype=np.uint8) for name in cameras}
            numbers = {name: random.uniform(-1, 1, size).astype(np.float32) for name, size in sizes.items()}
            dataset.add_frame({**pictures, **numbers, "task": task})
        dataset.save_episode()
    dataset.finalize()
    return root


def lerobot_train(*arguments: str) -> str:
    """Run `lerobot-train` and return what it printed."""
    try:
        importlib.metadata.distribution(PLUGIN)
        discover = []
    except importlib.metadata.PackageNotFoundError:
        discover = [f"--discover_packages_path={PLUGIN}"]
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train", *discover, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    output = process.stdout + process.stderr
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
def test_lerobot_train(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings: dict[str, Any] = {
        "policy.type": "ceed_vla",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "policy.backbone.width": 32,
        "policy.backbone.layers": 1,
        "policy.backbone.heads": 2,
        "policy.backbone.mlp_width": 32,
        "policy.backbone.stem_channels": "[8,8,8,8]",
        "policy.auxiliary_scale": "[10,10,10]",
        "dataset.repo_id": "local/data",
        "dataset.root": dataset,
        "output_dir": output,
        "steps": 2,
        "batch_size": 4,
        "num_workers": 0,
        "log_freq": 1,
        "wandb.enable": "false",
    }
    printed = lerobot_train(*(f"--{key}={value}" for key, value in settings.items()))
    assert "ar_loss" in printed
    assert "auxiliary_loss" in printed
    assert "unknown word" not in printed

    first = output / "checkpoints" / "000002"
    again = f"--config_path={first / 'pretrained_model' / 'train_config.json'}"
    lerobot_train(again, "--resume=true", "--steps=3", "--save_freq=1")

    policy, pre, _ = ceed_vla.load(output / "checkpoints" / "000003")
    assert policy.config.action_tokens.action_high[:6] != [1.0] * 6  # quantiles of the data
    observation = {f"observation.images.{name}": torch.rand(3, 96, 96) for name in ("front", "wrist")}
    batch = pre({**observation, "observation.state": torch.zeros(14), "task": TASKS[0]})
    assert policy.decode(batch, "ceed").actions.shape == (1, 8, 7)
    assert (batch["observation.language.tokens"] > 1).sum() == 7  # every word is known
