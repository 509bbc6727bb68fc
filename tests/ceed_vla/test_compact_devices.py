"""Weights and inputs on a GPU: no tensor is created on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import stays_on_its_device
from torch import nn

from ceed_vla import load


@pytest.fixture
def compact() -> tuple[Any, dict[str, torch.Tensor]]:
    """The shipped student's model, and an observation of two rows."""
    backbone = load("student")[0].backbone
    observation = {camera: torch.rand(2, 3, 96, 96) for camera in backbone.cameras}
    observation["observation.state"] = torch.randn(2, 14)
    observation["observation.language.tokens"] = torch.ones(2, 12, dtype=torch.int64)
    return backbone, observation


def test_prefill_and_block_stay_on_the_device(compact: Any) -> None:
    stays_on_its_device(*compact)


def test_a_tensor_on_the_cpu_is_found(compact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, observation = compact
    right = backbone.embed_prefix

    def wrong(batch: Any) -> torch.Tensor:
        return right(batch) + torch.zeros(1, 1, 192)

    monkeypatch.setattr(backbone, "embed_prefix", wrong)
    with pytest.raises(RuntimeError, match="two different devices"):
        stays_on_its_device(backbone, observation)
    assert isinstance(backbone, nn.Module)
