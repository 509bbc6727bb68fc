"""Fixtures for short recordings: options, frames, and a writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Helpers, as fixtures: with import-mode importlib a test file cannot import this one.


@pytest.fixture(scope="session")
def config() -> Callable[..., Any]:
    """Options of a short recording of pushes."""
    from ceed_vla.sim.recording.config import RecordConfig
    from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv

    def make(root: Path, **options: Any) -> RecordConfig:
        env = CeedTabletopEnv(**{"task": "push_cube", **options.pop("env", {})})
        return RecordConfig(root=root, progress=False, env=env, **{"episodes": 2, **options})

    return make


@pytest.fixture(scope="session")
def fake_frames() -> Callable[..., list[dict[str, Any]]]:
    """Frames that `new_writer` takes."""

    def make(length: int, task: str = "do it", seed: int = 0) -> list[dict[str, Any]]:
        rng = np.random.default_rng(seed)
        return [
            {
                "observation.images.front": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
                "action": rng.normal(size=2).astype(np.float32),
                "task": task,
            }
            for _ in range(length)
        ]

    return make


@pytest.fixture(scope="session")
def new_writer() -> Callable[[Path], Any]:
    """A writer of small frames."""
    from ceed_vla.data.writer import DatasetWriter

    axes = ["height", "width", "channels"]
    features = {
        "observation.images.front": {"dtype": "image", "shape": (8, 8, 3), "names": axes},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    return lambda root: DatasetWriter(
        root, repo_id="local/test", fps=10, features=features, robot_type="test"
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights, which tests must not change."""
    import torch

    from ceed_vla.checkpoints import save
    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
    from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
    from ceed_vla.sim.tabletop.tasks import TASKS, combinations
    from tests.helpers.tabletop import tabletop_config

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16}
    config = tabletop_config(chunk_size=4, n_action_steps=2, stem_channels=[4] * 4, **sizes)
    stats = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    instructions = [command.text for family in TASKS for command in combinations(family, "all")]
    pre, post = make_ceed_vla_pre_post_processors(config, stats, instructions=instructions)
    folder = tmp_path_factory.mktemp("policies") / "policy"
    return save(folder, CeedVLAPolicy(config), pre, post)
