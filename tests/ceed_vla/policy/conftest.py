"""A tiny policy with random weights, its processors, an observation and a checkpoint of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ceed_vla import CeedVLAConfig, CeedVLAPolicy
from ceed_vla.checkpoints import save
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from tests.helpers.edits import unsealed
from tests.helpers.tabletop import tabletop_config

FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"
ENVIRONMENT = "observation.environment_state"
TASKS = ["put the red cube in the bin", "push the blue cube"]


def tiny_config(**changes: Any) -> CeedVLAConfig:
    sizes = {
        "width": 32,
        "layers": 2,
        "heads": 2,
        "mlp_width": 32,
        "stem_channels": [8] * 4,
        "chunk_size": 4,
    }
    return tabletop_config(**{**sizes, "n_action_steps": 2, "num_bins": 31, **changes})


def make_policy(**changes: Any) -> CeedVLAPolicy:
    torch.manual_seed(0)
    policy = CeedVLAPolicy(tiny_config(**changes))
    with torch.no_grad():  # make every token matter, as in a trained policy
        policy.backbone.action_tokens.weight.mul_(50)
        policy.backbone.head.weight.mul_(20)
    return policy.eval()


def raw_observation(rows: int = 2, size: int = 96, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        FRONT: torch.rand(rows, 3, size, size, generator=generator),
        WRIST: torch.rand(rows, 3, size, size, generator=generator),
        STATE: torch.randn(rows, 14, generator=generator),
        "task": [TASKS[i % 2] for i in range(rows)],
    }


@pytest.fixture(scope="session")
def policy() -> CeedVLAPolicy:
    return make_policy()


@pytest.fixture(scope="session")
def processors(policy: CeedVLAPolicy) -> tuple[Any, Any]:
    stats = {STATE: {"mean": torch.full((14,), 0.5), "std": torch.full((14,), 2.0)}}
    return make_ceed_vla_pre_post_processors(policy.config, stats, instructions=TASKS)


@pytest.fixture
def batch(processors: tuple[Any, Any]) -> dict[str, Any]:
    return processors[0](raw_observation())


@pytest.fixture(scope="session")
def checkpoint(
    policy: CeedVLAPolicy, processors: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint") / "policy", policy, *processors)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint without a manifest, whose files tests change."""
    return unsealed(shutil.copytree(checkpoint, tmp_path / "policy"))


@pytest.fixture
def training_batch(batch: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    pad = torch.tensor([[False] * 4, [False, False, True, True]])
    return {
        **batch,
        "action": torch.rand(2, 4, 7, generator=generator) * 2 - 1,
        "action_is_pad": pad,
        ENVIRONMENT: torch.randn(2, 40, generator=generator) * 0.1,
    }


# Helpers are fixtures, because with import-mode importlib a test file cannot import this one.


@pytest.fixture(scope="session", name="tiny_config")
def _tiny_config() -> Callable[..., CeedVLAConfig]:
    return tiny_config


@pytest.fixture(scope="session", name="make_policy")
def _make_policy() -> Callable[..., CeedVLAPolicy]:
    return make_policy


@pytest.fixture(scope="session", name="raw_observation")
def _raw_observation() -> Callable[..., dict[str, Any]]:
    return raw_observation
