"""Every family: Jacobi equals AR and transformers' own `generate()`, and training has the logits of
decoding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import greedy, jacobi
from engines import assert_same_tokens
from tiny_vlms import FAMILIES

from ceed_vla.backbones.vlm.model import MASK_KEY, STATE_KEY, VLMBackbone
from ceed_vla.compiled.engine import compiled
from ceed_vla.tokens.uniform import ActionTokenizer

SLIDING = ("llava+sliding", "qwen2_5_vl+sliding")


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
@torch.no_grad()
def test_jacobi_is_ar_is_generate(
    family: str, rows: int, backbone: Any, observe: Any, generate: Any
) -> None:
    model, step = backbone(family)
    observation = observe(step, rows, seed=rows)
    assert model.check_observation(observation) == rows
    prefix = model.prefill(observation)
    ar = greedy(model, prefix).tokens
    assert torch.equal(ar, generate(model, observation))
    assert torch.equal(ar, without_cache(model, observation))
    for seed in range(3):
        guess = torch.randint(255, ar.shape, generator=torch.Generator().manual_seed(seed))
        strict = jacobi(model, prefix, guess, tokens_per_step=7)
        assert torch.equal(strict.tokens, ar)
        assert strict.forwards < model.block_length
    assert len(ar.unique()) > 5 * rows  # the answer depends on the input


def without_cache(model: VLMBackbone, observation: dict[str, torch.Tensor]) -> torch.Tensor:
    """The greedy block (B, n); every token comes from a forward over all earlier ones."""
    embeddings = model.embed_prefix(observation)
    tokens = torch.zeros(len(embeddings), 0, dtype=torch.long)
    for _ in range(model.block_length):
        inputs = embeddings.joined(model.embed_tokens(tokens))
        hidden = model.decoder(use_cache=False, **inputs).last_hidden_state[:, -1:]
        tokens = torch.cat([tokens, model.score(hidden).argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"action_ids": "added"},
        {"action_ids": "last_reversed"},
        {"state_dim": 5},
        {"layout": "stacked"},
    ],
    ids=["added", "last_reversed", "state", "stacked"],
)
@torch.no_grad()
def test_other_vocabularies_states_and_layouts(
    family: str, settings: dict[str, Any], backbone: Any, observe: Any, generate: Any
) -> None:
    model, step = backbone(family, **settings)
    observation = observe(step, 3)
    expected = generate(model, {**observation})
    prefix = model.prefill(observation)
    assert torch.equal(greedy(model, prefix).tokens, expected)
    assert torch.equal(jacobi(model, prefix, expected.flip(1), tokens_per_step=7).tokens, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_projected_state_is_one_token(family: str, backbone: Any, observe: Any) -> None:
    model, step = backbone(family, state_dim=5, project_state=True)
    observation = observe(step, 3)
    prefix = model.prefill(observation)
    ar = greedy(model, prefix).tokens
    strict = jacobi(model, prefix, ar.flip(1), tokens_per_step=7)
    assert torch.equal(strict.tokens, ar)
    moved = {**observation, STATE_KEY: observation[STATE_KEY] + torch.tensor([[1.0], [0.0], [0.0]])}
    changed = (model.prefill(moved).logits - prefix.logits).abs().amax(1) > 1e-4
    assert changed.tolist() == [True, False, False]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_do_not_influence_each_other(family: str, backbone: Any, observe: Any) -> None:
    model, step = backbone(family)
    observation = observe(step, 4)
    assert not observation[MASK_KEY].bool().all()  # some rows are padded
    together = greedy(model, model.prefill(observation)).tokens
    for row in range(4):
        part = {k: v[row : row + 1] for k, v in observation.items() if "vlm" in k}  # still padded
        assert torch.equal(greedy(model, model.prefill(part)).tokens[0], together[row])
    embeddings = model.embed_prefix(observation)[torch.tensor([2, 0])]
    few = greedy(model, model.prefill_embeddings(embeddings)).tokens
    assert torch.equal(few, together[[2, 0]])


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
def test_training_and_depth(
    family: str, backbone: Any, observe: Any, keeps_the_contract: Any
) -> None:
    model, step = backbone(family)
    keeps_the_contract(model, observe(step, 3))


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("qwen2_5_vl+sliding", 2),
        *(
            pytest.param(family, rows, marks=pytest.mark.slow)
            for family in (*FAMILIES, SLIDING[0])
            for rows in (1, 4)
        ),
    ],
)
@pytest.mark.slow
def test_compiled_tokens_are_the_eager_ones(
    family: str, rows: int, backbone: Any, observe: Any
) -> None:
    model, step = backbone(family)
    tokens = ActionTokenizer([-1.0] * 7, [1.0] * 7, 2, num_bins=255)
    assert_same_tokens(model, compiled(model, "eager"), observe(step, rows), tokens)
