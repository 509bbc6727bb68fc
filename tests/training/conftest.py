"""A tiny synthetic data set, a teacher trained on it and its trajectories, made once for all tests of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CAMERAS = ("observation.images.front", "observation.images.wrist")
INSTRUCTIONS = ("put the red cube in the bin", "stack the blue cube on the green cube", "push the yellow cube")


def write_dataset(
    root: Path,
    lengths: Sequence[int] = (14, 15, 9, 12),
    *,
    action_dim: int = 7,
    state_dim: int = 14,
    cameras: Sequence[str] = CAMERAS,
    image_size: int = 96,
    seed: int = 0,
    finalize: bool = True,
) -> Path:
    """Write a LeRobotDataset v3 whose actions depend on state and instruction; ``action_dim`` 0 leaves them out."""
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
                name: (base + 40 * phase + 15 * i).astype(np.uint8) for i, name in enumerate(cameras)
            }
            frame["observation.state"] = (np.sin(phase * np.arange(1, state_dim + 1)) + which).astype(np.float32)
            frame["observation.environment_state"] = random.normal(0, 0.1, 40).astype(np.float32)
            if action_dim:
                action = 0.2 * np.cos(phase * 3 + which + np.arange(action_dim))
                action[-1] = 1.0 if phase > 0.5 else -1.0
                frame["action"] = action.astype(np.float32)
            dataset.add_frame({**frame, "task": INSTRUCTIONS[which]})
        dataset.save_episode()
    if finalize:
        dataset.finalize()
    return root
