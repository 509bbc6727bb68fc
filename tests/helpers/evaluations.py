"""Options of evaluations, and an untrained policy to evaluate."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ceed_vla.checkpoints import save
from ceed_vla.decoding import DecodingConfig
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.sim.evaluate import EvalConfig
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from ceed_vla.sim.tabletop.tasks import TASKS, combinations
from tests.helpers.tabletop import tabletop_config


def save_untrained(folder: Path) -> Path:
    """Save a tiny policy with random weights in `folder`."""
    torch.manual_seed(0)
    config = tabletop_config(
        width=16,
        layers=1,
        heads=2,
        mlp_width=16,
        stem_channels=[4, 4, 4, 4],
        chunk_size=4,
        n_action_steps=2,
        decoding=DecodingConfig(method="jacobi", max_iterations=2, watch="executed"),
    )
    stats = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    instructions = [command.text for family in TASKS for command in combinations(family, "all")]
    pre, post = make_ceed_vla_pre_post_processors(config, stats, instructions=instructions)
    return save(folder, CeedVLAPolicy(config), pre, post)


def options(checkpoint: Path, folder: Path, **changes: object) -> EvalConfig:
    """Options of an evaluation of the tabletop that takes seconds."""
    values: dict[str, object] = {
        "policy": CheckpointPath(str(checkpoint)),
        "decoders": "ar,jacobi,ceed",
        "episodes": 2,
        "executed_steps": 2,
        "env": {},
        "timing_chunks": 4,
        "clips": False,
        "output_dir": str(folder),
    }
    values |= changes
    env: Any = values.pop("env")
    # Few steps: an untrained policy solves nothing anyway.
    env = CeedTabletopEnv(**{"task": "mixed", "episode_length": 8, **env})
    return EvalConfig(env=env, **values)  # type: ignore[arg-type]


def quiet() -> Console:
    """A console whose output is a string."""
    return Console(file=StringIO(), width=120)
