"""Weights and inputs on a GPU: no tensor is created on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import stays_on_its_device

from ceed_vla.convert.config import ConvertConfig
from ceed_vla.convert.openvla import published_policy


@pytest.mark.parametrize("kind", ["fused", "siglip", "clip"])
def test_prefill_and_block_stay_on_the_device(
    kind: str, published: Callable[[str], Path], pictures: np.ndarray
) -> None:
    source = ConvertConfig(str(published(kind)), unnorm_key="kitchen", chunk_size=3)
    policy, pre, _ = published_policy(source)
    image = torch.from_numpy(pictures[:1]).permute(0, 3, 1, 2).float() / 255
    batch = pre({"observation.images.front": image, "task": ["open the drawer"]})
    reason = "patches go behind the first word of a row, whose place is read"
    stays_on_its_device(policy.backbone, batch, reads_on_host=reason)
