"""Shared by the tests of training: a tiny synthetic dataset, a teacher, and its trajectories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CAMERAS = ("observation.images.front", "observation.images.wrist")
INSTRUCTIONS = (
    "put the red cube in the bin",
    "stack the blue cube on the green cube",
    "push the yellow cube",
)


def write_dataset(
    root: Path,
    lengths: Sequence[int] = (14, 15, 9, 12),
    *,
    action_dim: int = 7,
    state_dim: int = 14,
    cameras: Sequence[str] = CAMERAS,
    image_size: int = 96,
    seed: int = 0,
) -> Path:
    """Write a LeRobotDataset v3 whose actions depend on state and instruction.

    With ``action_dim`` 0 it has no actions.
    """
    from lerobot.datasets import LeRobotDataset

    features: dict[str, Any] = {
        name: {
            "dtype": "image",
            "shape": (image_size, image_size, 3),
            "names": ["height", "width", "channels"],
        }
        for name in cameras
    }
    features["observation.state"] = {"dtype": "float32", "shape": (state_dim,), "names": None}
    features["observation.environment_state"] = {"dtype": "float32", "shape": (40,), "names": None}
    if action_dim:
        features["action"] = {"dtype": "float32", "shape": (action_dim,), "names": None}
    dataset = LeRobotDataset.create(f"local/{root.name}", 10, features, root=root, use_videos=False)
    random = np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        which = episode % len(INSTRUCTIONS)
        base = random.integers(0, 200, (image_size, image_size, 3))
        for step in range(length):
            phase = step / max(1, length - 1)
            frame: dict[str, Any] = {
                name: (base + 40 * phase + 15 * i).astype(np.uint8)
                for i, name in enumerate(cameras)
            }
            frame["observation.state"] = (
                np.sin(phase * np.arange(1, state_dim + 1)) + which
            ).astype(np.float32)
            frame["observation.environment_state"] = random.normal(0, 0.1, 40).astype(np.float32)
            if action_dim:
                action = 0.2 * np.cos(phase * 3 + which + np.arange(action_dim))
                action[-1] = 1.0 if phase > 0.5 else -1.0
                frame["action"] = action.astype(np.float32)
            dataset.add_frame({**frame, "task": INSTRUCTIONS[which]})
        dataset.save_episode()
    dataset.finalize()
    return root


def tiny_policy(**changes: Any) -> Any:
    """A policy configuration that trains in seconds."""
    from tests.helpers.tabletop import tabletop_config

    sizes = {
        "width": 32,
        "layers": 1,
        "heads": 2,
        "mlp_width": 32,
        "stem_channels": [8] * 4,
        "chunk_size": 4,
    }
    return tabletop_config(**{**sizes, "n_action_steps": 2, "num_bins": 63, **changes})


def vlm_policy(base: Path, **changes: Any) -> Any:
    """A policy configuration around a tiny image-text-to-text model in the folder `base`."""
    from ceed_vla.backbones.vlm.config import VLMConfig
    from tests.helpers.tabletop import tabletop_config

    settings = {"chunk_size": 4, "n_action_steps": 2, "auxiliary_scale": []}
    backbone = {
        k: changes.pop(k)
        for k in ("weights", "proprio", "dtype", "cameras", "action_ids")
        if k in changes
    }
    return tabletop_config(
        backbone=VLMConfig(path=str(base), **backbone), **{**settings, **changes}
    )


def read_log(folder: Path, key: str = "loss") -> dict[int, float]:
    """Values of `key` by step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@dataclass
class Studio:
    """Datasets, a teacher trained on them, and its trajectories, shared by these tests."""

    demo: Path
    other: Path
    grounding: Path
    teacher_run: Path
    teacher: Path
    trajectories: Path

    vlm_policy = staticmethod(vlm_policy)

    def train_config(self, output: Path, **changes: Any) -> Any:
        """Settings of a short teacher run."""
        from ceed_vla.training.teacher import TrainConfig

        settings = {
            "roots": str(self.demo),
            "grounding_roots": str(self.grounding),
            "output_dir": str(output),
            "policy": tiny_policy(),
            "grounding_steps": 3,
            "steps": 9,
            "batch_size": 8,
            "grounding_batch": 4,
            "lr": 1e-2,
            "muon_lr": 2e-2,
            "warmup": 2,
            "rounds": 0,
            "save_every": 5,
            "log_every": 1,
            "mixed_precision": "no",
        }
        return TrainConfig(**{**settings, **changes})

    def collect_config(self, output: Path, **changes: Any) -> Any:
        """Settings of a collection with the shared teacher."""
        from ceed_vla.training.trajectories import CollectConfig

        settings = {
            "policy_path": str(self.teacher),
            "roots": f"{self.demo},{self.other}",
            "output_dir": str(output),
            "batch_size": 8,
            "frame_stride": 1,
        }
        return CollectConfig(**{**settings, **changes})

    def distill_config(self, output: Path, **changes: Any) -> Any:
        """Settings of a short distillation of the shared teacher."""
        from ceed_vla.training.distill import DistillConfig, TrajectoriesConfig

        settings = {
            "teacher_path": str(self.teacher),
            "trajectories": TrajectoriesConfig(str(self.trajectories)),
            "roots": f"{self.demo},{self.other}",
            "output_dir": str(output),
            "steps": 5,
            "batch_size": 8,
            "eval_frames": 8,
            "eval_every": 0,
            "save_every": 3,
            "log_every": 1,
            "mixed_precision": "no",
        }
        return DistillConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Datasets, teacher and trajectories; tests must not write into them."""
    from ceed_vla.training.teacher import train
    from ceed_vla.training.trajectories import collect

    folder = tmp_path_factory.mktemp("studio")
    studio = Studio(
        demo=write_dataset(folder / "demo"),
        other=write_dataset(folder / "other", (10, 3), seed=7),
        grounding=write_dataset(folder / "grounding", (12,), action_dim=0, seed=1),
        teacher_run=folder / "teacher",
        teacher=folder / "teacher" / "checkpoints" / "final" / "pretrained_model",
        trajectories=folder / "trajectories",
    )
    train(studio.train_config(studio.teacher_run, steps=60, save_every=30))
    collect(studio.collect_config(studio.trajectories))
    return studio


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Interrupt training runs, as by Ctrl-C, before the given step; -1 disables that."""
    from ceed_vla.training.run import Run

    original = Run.optimize

    def arm(step: int) -> None:
        def optimize(run: Any, *arguments: Any) -> None:
            if run.step == step:
                raise KeyboardInterrupt
            original(run, *arguments)

        monkeypatch.setattr(Run, "optimize", optimize)

    return arm


# Helpers, as fixtures: with import-mode importlib a test file cannot import this one.


@pytest.fixture(scope="session", name="write_dataset")
def _write_dataset() -> Callable[..., Path]:
    return write_dataset


@pytest.fixture(scope="session", name="tiny_policy")
def _tiny_policy() -> Callable[..., Any]:
    return tiny_policy


@pytest.fixture(scope="session", name="read_log")
def _read_log() -> Callable[..., dict[int, float]]:
    return read_log


@pytest.fixture(scope="session")
def store(studio: Studio) -> Any:
    """The demonstrations as a store."""
    from ceed_vla.data.frames import open_dataset

    return open_dataset(studio.demo)


@pytest.fixture
def copy(studio: Studio, tmp_path: Path) -> Path:
    """A copy of the demonstrations that a test may damage."""
    return shutil.copytree(studio.demo, tmp_path / "copy", ignore=shutil.ignore_patterns(".frames"))


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Two episodes of four frames as videos."""
    from lerobot.datasets import LeRobotDataset

    features = {
        CAMERAS[0]: {
            "dtype": "video",
            "shape": (64, 64, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    dataset = LeRobotDataset.create(
        "local/video", 10, features, root=tmp_path / "video", use_videos=True
    )
    for step in range(8):
        image = np.full((64, 64, 3), 30 * step, np.uint8)
        vector = np.full(2, step, np.float32)
        dataset.add_frame(
            {CAMERAS[0]: image, "observation.state": vector, "action": vector, "task": "go"}
        )
        if step % 4 == 3:
            dataset.save_episode()
    dataset.finalize()
    return tmp_path / "video"
