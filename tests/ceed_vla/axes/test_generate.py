"""Drafts and shallow forwards are exact for any exits: they return the tokens of transformers' own
`generate()`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ceed_vla.axes import AXES
from ceed_vla.decoding import BlockRequest, DecodingConfig

EXACT = {
    "drafts": ("spec1x1", "spec1x4", "spec2x3", "spec3x9", "ngram4"),
    "depth": ("depth1", "depth3", "depth1-2"),
}
NAMES = [name for axis, names in EXACT.items() if axis in AXES for name in names]
if "drafts" in AXES and "depth" in AXES:
    NAMES.append("del")  # del chooses among exits


def decoded(backbone: Any, prefix: Any, name: str, guess: Tensor, period: int) -> Any:
    prefix.cache.roll_back()
    config = DecodingConfig(method=name)
    request = BlockRequest(config, guess, tokens_per_step=period)
    return config.decoder.decode(backbone, prefix, request)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 4),
    layout=st.sampled_from([(1, 2), (7, 1), (7, 3), (5, 5), (7, 8)]),
    vocabulary=st.sampled_from([2, 31, 255]),
    right=st.floats(0, 1),
)
def test_llama_drafts_are_generate(
    llama: Any,
    generate: Any,
    seed: int,
    batch: int,
    layout: tuple[int, int],
    vocabulary: int,
    right: float,
) -> None:
    period, steps = layout
    backbone, observation = llama(seed, batch, period * steps, vocabulary, layers=4)
    generator = torch.Generator().manual_seed(seed)
    if "depth" in AXES:
        from ceed_vla.axes.depth.exits import make_exits

        backbone.exits = make_exits(backbone, [1, 2, 3], "linear")
    for own in backbone.exits.values():  # from the model's own last norm to noise
        own.requires_grad_(False)
        for parameter in own.parameters():
            parameter += (1 - right) * torch.randn(parameter.shape, generator=generator)
    with torch.inference_mode():
        expected = generate(backbone, observation)
        prefix = backbone.prefill(observation)
        for name in NAMES:
            noise = torch.randint(vocabulary, expected.shape, generator=generator)
            keep = torch.rand(expected.shape, generator=generator) < right
            result = decoded(backbone, prefix, name, torch.where(keep, expected, noise), period)
            assert torch.equal(result.tokens, expected), name
            assert result.exact.all()
            assert result.forwards <= max(period * steps - 1, 1) + 2 * name.startswith("depth")
