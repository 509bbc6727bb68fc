"""Checkpoints for the robot files in launch/config: settings and statistics of an ACT policy.

`lerobot-train` writes the same files; only the weights, which are not read here, are empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CAMERAS = ("observation.images.front", "observation.images.wrist")
PIXELS = 64  # side of the images
KINDS = ("min", "max", "mean", "std", "q01", "q99")

# Per robot: lowest and highest joint positions and gripper of plausible data.
DATA: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "so101_follower": ([-60, -98, -40, -20, -120, 1], [65, 40, 95, 95, 100, 98]),
    "ur5e": ([-1.0, -2.4, 0.5, -2.6, -1.8, -1.0, 0.0], [1.1, -0.6, 2.4, -0.6, -1.2, 2.0, 0.085]),
    "franka_panda": (
        [-0.9, -0.8, -0.7, -2.8, -0.6, 1.0, 0.2, 0.0],
        [0.8, 1.1, 0.6, -1.2, 0.5, 3.2, 1.5, 0.08],
    ),
}


def statistics(low: Sequence[float], high: Sequence[float]) -> dict[str, Any]:
    """Statistics in LeRobot's format of a feature between `low` and `high`."""
    ends = np.array([low, high], dtype=np.float64)
    middle = ends.mean(axis=0)
    spread = np.ptp(ends, axis=0)
    return {
        "min": ends[0],
        "max": ends[1],
        "mean": middle,
        "std": 0.25 * spread + 1e-6,
        "q01": ends[0] + 0.01 * spread,
        "q99": ends[1] - 0.01 * spread,
    }


def write_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    action: Mapping[str, Any],
    kinds: Sequence[str] = KINDS,
) -> Path:
    """Write a checkpoint with these statistics of ``observation.state`` and ``action``.

    Only the statistics `kinds` are written, as in datasets of other versions.
    """
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.factory import make_pre_post_processors

    def length(values: Mapping[str, Any]) -> tuple[int]:
        return (len(values["mean"]),)

    camera = PolicyFeature(type=FeatureType.VISUAL, shape=(3, PIXELS, PIXELS))
    cameras = dict.fromkeys(CAMERAS, camera)
    config = ACTConfig(
        input_features={
            **cameras,
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=length(state)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=length(action))},
        device="cpu",
        chunk_size=16,
        n_action_steps=8,
    )
    stats: dict[str, Any] = {
        feature: {kind: torch.tensor(np.array(values[kind]), dtype=torch.float32) for kind in kinds}
        for feature, values in (("observation.state", state), ("action", action))
    }
    stats |= {name: {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)} for name in CAMERAS}
    for part in (config, *make_pre_post_processors(config, dataset_stats=stats)):
        part.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder
