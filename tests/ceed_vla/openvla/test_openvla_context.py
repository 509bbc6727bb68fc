"""OpenVLA with some of its image patches equals the whole prompt with the other patches masked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ceed_vla.axes.context.scorer import ContextScorer
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings
from ceed_vla.convert import ConvertConfig
from ceed_vla.convert.openvla import published_policy
from ceed_vla.decoding import prefill

FRONT = "observation.images.front"
TASKS = ["Put the red cube on the plate", "open the drawer", "open"]
PATCHES = 4  # 28 pixels, 14 per patch


@pytest.fixture
def model(published: Callable[[str], Path], pictures: np.ndarray) -> tuple[Any, Any]:
    """A policy with a random scorer, and prompts of three lengths."""
    policy, pre, _ = published_policy(
        ConvertConfig(str(published("fused")), unnorm_key="kitchen", chunk_size=3)
    )
    scorer, generator = ContextScorer(16, PATCHES), torch.Generator().manual_seed(0)
    for parameter in scorer.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    policy.backbone.context = (scorer.requires_grad_(False),)
    image = torch.from_numpy(pictures[:3]).permute(0, 3, 1, 2).float() / 255
    return policy, pre({FRONT: image, "task": TASKS})


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.slow
def test_it_is_the_whole_prompt_under_a_mask(model: tuple[Any, Any], kept: int) -> None:
    policy, batch = model
    backbone = policy.backbone
    whole = backbone.embed_prefix(batch)
    assert whole.patches.sum(1).tolist() == [PATCHES] * 3
    assert not (whole.patches & ~whole.real).any()
    scores = backbone.context[0](*backbone.prefix_tokens(whole))
    seen = whole.real.clone()  # (B, P)
    for row in range(3):
        places = whole.patches[row].nonzero().flatten()
        seen[row, places[scores[row].argsort(descending=True)[kept:]]] = False
    positions = (whole.real.cumsum(1) - 1).clamp(min=0)  # of the unpruned prompt
    masked = PrefixEmbeddings(
        whole.embeds,
        seen,
        whole.next_position,
        {"position_ids": positions, "attention_mask": seen.long()},
    )
    expected, pruned = (
        backbone.prefill_embeddings(masked),
        prefill(backbone, batch, policy.decoding_config(f"keep{kept}")),
    )
    torch.testing.assert_close(pruned.logits, expected.logits, rtol=1e-4, atol=1e-4)
    tokens = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(kept))
    found, wanted = (backbone.block_logits(prefix, tokens) for prefix in (pruned, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # Cost: prefix tokens x layers.
    assert (expected.cache.prefix_length - pruned.cache.prefix_length) == PATCHES - kept
    assert pruned.dropped == PATCHES - kept
    # Single rows, without padding, choose the same patches and have the same logits.
    alone = {name: value[2:] for name, value in batch.items() if torch.is_tensor(value)}
    own = prefill(backbone, alone, policy.decoding_config(f"keep{kept}"))
    torch.testing.assert_close(own.logits, pruned.logits[2:], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_patches_are_as_ever_and_none_trains_otherwise(model: tuple[Any, Any]) -> None:
    policy, batch = model
    usual, whole = policy.decode(batch, "jacobi"), policy.decode(batch, f"keep{PATCHES}")
    assert torch.equal(usual.tokens, whole.tokens)
    assert bool(whole.exact.all())
    few = policy.decode(batch, "keep1")
    assert not few.exact.any()
    assert few.exact_tokens.tolist() == [0] * 3
    backbone = policy.backbone
    embeddings = backbone.embed_prefix(batch)
    rows = embeddings[torch.tensor([2, 0])]
    assert torch.equal(rows.patches, embeddings.patches[[2, 0]])
    kept = backbone.keep_tokens(
        embeddings, torch.arange(embeddings.embeds.shape[1] - 2).expand(3, -1)
    )
    _, (packed,) = backbone.packed_logits(kept, [few.tokens])
    behind = backbone.block_logits(backbone.prefill_embeddings(kept), few.tokens[:, :-1])
    torch.testing.assert_close(packed[:, 1:], behind, rtol=1e-4, atol=1e-4)
