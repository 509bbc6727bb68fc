"""Weights and inputs on a GPU: no tensor is created on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
from fake_cuda import stays_on_its_device
from tiny_vlms import FAMILIES

# Its language model adds image features behind some layers, at positions that it searches for.
READS_WHILE_IT_RUNS = ("qwen3_vl",)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in READS_WHILE_IT_RUNS])
def test_prefill_and_block_stay_on_the_device(
    family: str, rows: int, backbone: Any, observe: Any
) -> None:
    model, step = backbone(family)
    observation = observe(step, rows)
    reason = "transformers puts image features in the places of image tokens, which it looks for"
    stays_on_its_device(model, observation, reads_on_host=reason)
