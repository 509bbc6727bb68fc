"""LeRobot's training command with the policy: train, resume, and load the result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
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
    vectors = {
        name: {"dtype": "float32", "shape": (size,), "names": None} for name, size in sizes.items()
    }
    cameras = {f"observation.images.{name}": image for name in ("front", "wrist")}
    root, random = tmp_path / "data", np.random.default_rng(0)
    dataset = LeRobotDataset.create(
        "local/data", 10, {**cameras, **vectors}, root=root, use_videos=False
    )
    for task in TASKS:
        for _ in range(10):
            pictures = {
                name: random.integers(0, 256, (96, 96, 3), dtype=np.uint8) for name in cameras
            }
            numbers = {
                name: random.uniform(-1, 1, size).astype(np.float32) for name, size in sizes.items()
            }
            dataset.add_frame({**pictures, **numbers, "task": task})
        dataset.save_episode()
    dataset.finalize()
    return root


def lerobot_train(*arguments: str) -> str:
    """Run `lerobot-train` and return its output."""
    try:
        importlib.metadata.distribution(PLUGIN)
        discover = []
    except importlib.metadata.PackageNotFoundError:
        discover = [f"--discover_packages_path={PLUGIN}"]
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train", *discover, *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output[-3000:]
    return output


def settings(root: Path, output: Path, **changes: Any) -> list[str]:
    """Arguments that train a small new policy on the dataset in `root`."""
    values: dict[str, Any] = {
        "policy.type": "ceed_vla",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "policy.backbone.width": 32,
        "policy.backbone.layers": 1,
        "policy.backbone.heads": 2,
        "policy.backbone.mlp_width": 32,
        "policy.backbone.stem_channels": "[8,8,8,8]",
        "dataset.repo_id": "local/data",
        "dataset.root": root,
        "output_dir": output,
        "batch_size": 4,
        "num_workers": 0,
        "log_freq": 1,
        "wandb.enable": "false",
        **changes,
    }
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.mark.slow
def test_lerobot_train(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    changes = {"policy.auxiliary_scale": "[10,10,10]", "steps": 2}
    printed = lerobot_train(*settings(dataset, output, **changes))
    assert "ar_loss" in printed
    assert "auxiliary_loss" in printed
    assert "unknown word" not in printed

    first = output / "checkpoints" / "000002"
    again = f"--config_path={first / 'pretrained_model' / 'train_config.json'}"
    lerobot_train(again, "--resume=true", "--steps=3", "--save_freq=1")

    policy, pre, _ = ceed_vla.load(output / "checkpoints" / "000003")
    assert policy.config.action_tokens.action_high[:6] != [1.0] * 6  # quantiles of the data
    observation = {
        f"observation.images.{name}": torch.rand(3, 96, 96) for name in ("front", "wrist")
    }
    batch = pre({**observation, "observation.state": torch.zeros(14), "task": TASKS[0]})
    assert policy.decode(batch, "ceed").actions.shape == (1, 8, 7)
    assert (batch["observation.language.tokens"] > 1).sum() == 7  # every word is known


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A dataset in which quantiles per episode differ from those of all data: two of eight episodes
    have the large motions.

    It has a gripper with the values 0 and 255, a dimension that moves in two frames, and features
    that the policy does not use.
    """
    from lerobot.datasets import LeRobotDataset

    shapes = {
        "observation.state": (5,),
        "observation.force": (6,),
        "observation.depth": (8, 12),
        "next.reward": (1,),
    }
    vectors = {
        name: {"dtype": "float32", "shape": shape, "names": None} for name, shape in shapes.items()
    }
    names = ["dx", "dy", "dz", "tool", "spare", "gripper"]
    action = {"dtype": "float32", "shape": (6,), "names": names}
    image = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    features = {"observation.images.front": image, **vectors, "action": action}
    root, random = tmp_path / "uneven", np.random.default_rng(0)
    dataset = LeRobotDataset.create("local/data", 10, features, root=root, use_videos=False)
    for episode in range(8):
        for step in range(30):
            reach = {0: 1.0, 4: -1.0}.get(episode, 0.05)
            move = np.zeros(6, np.float32)
            move[:3] = reach * random.uniform(0.6, 1, 3)
            move[3] = random.normal()
            move[4] = {5: 0.7, 6: 0.35}.get(step, 0.0) if episode == 3 else 0.0
            move[5] = 255.0 if step > 20 else 0.0
            numbers = {
                name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
            }
            picture = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            frame = {
                "observation.images.front": picture,
                **numbers,
                "action": move,
                "task": TASKS[0],
            }
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.mark.slow
def test_lerobot_train_takes_from_the_data_what_ceed_vla_train_takes(
    uneven: Path, tmp_path: Path
) -> None:
    from ceed_vla.data.frames import open_dataset
    from ceed_vla.training.defaults import describe, take_from_data

    printed = lerobot_train(
        *settings(uneven, tmp_path / "run", steps=1, **{"policy.backbone.image_size": 32})
    )
    policy, _, _ = ceed_vla.load(tmp_path / "run" / "checkpoints" / "000001")

    store = open_dataset(uneven, decode=False)
    ours = ceed_vla.CeedVLAConfig(device="cpu", push_to_hub=False)
    stats = take_from_data(ours, [store], [], None)
    ours.action_tokens.fit(6, stats["action"])
    assert policy.config.action_tokens == ours.action_tokens
    assert policy.config.action_tokens.gripper_dims == [5]
    assert policy.config.delta_dims == ours.delta_dims == [0, 1, 2]
    assert policy.config.input_features == ours.input_features
    averaged = json.loads((uneven / "meta" / "stats.json").read_text())["action"]["q99"]
    high = policy.config.action_tokens.action_high
    # values that LeRobot's statistics would clip
    assert max(averaged[:3]) < 0.3 < 0.9 < min(high[:3])
    assert high[4] == pytest.approx(0.7)

    pattern = r"cameras observation.images.front .*"
    (logged,) = re.findall(pattern, printed)
    assert logged == describe(ours, policy.tokenizer, store, 0)
    assert (
        "ignored: observation.force float32 (6,), observation.depth float32 (8, 12), next.reward "
        "float32 (1,)" in logged
    )
    weights = (tmp_path / "run" / "checkpoints" / "000001" / "pretrained_model").glob(
        "*.safetensors"
    )
    assert not any(b"observation.depth" in file.read_bytes() for file in weights)
