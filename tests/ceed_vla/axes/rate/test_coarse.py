"""Coarse exits: causal per token, initially zero, equal in training and decoding, unsupported
cases.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ceed_vla.axes import AXES
from ceed_vla.axes.depth.exits import make_exits
from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.compact.model import CompactBackbone
from ceed_vla.backbones.config import PolicyShape
from ceed_vla.compiled.engine import compiled
from ceed_vla.decoding import DecodingConfig, named_config
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.errors import ConfigError
from ceed_vla.tokens.uniform import UniformTokensConfig

ROWS, LAYERS, BINS = 2, 4, 31


def model(
    seed: int, dim: int, steps: int, kind: str = "coarse", trained: bool = True
) -> tuple[Any, dict[str, Tensor]]:
    """A random compact backbone with exits behind its first three layers, and an observation."""
    torch.manual_seed(seed)
    sizes = CompactConfig(
        image_size=32, stem_channels=[8] * 4, width=32, layers=LAYERS, heads=2, mlp_width=48
    )
    tokens = UniformTokensConfig(num_bins=BINS, action_low=[-1.0] * dim, action_high=[1.0] * dim)
    backbone = sizes.build(
        PolicyShape({"observation.images.front": (3, 32, 32)}, 5, dim, steps, tokens)
    ).eval()
    # wide enough for every token to depend on those before it
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    backbone.requires_grad_(False).exits = make_exits(backbone, range(1, LAYERS), kind)
    for own in backbone.exits.values():
        for parameter in own.requires_grad_(False).parameters():
            parameter += 0.1 * trained * torch.randn_like(parameter)
    observation = {
        "observation.images.front": torch.rand(ROWS, 3, 32, 32),
        "observation.state": torch.randn(ROWS, 5),
        "observation.language.tokens": torch.randint(1, 256, (ROWS, 12)),
    }
    return backbone, observation


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    layout=st.tuples(st.integers(1, 4), st.integers(1, 5)).filter(
        lambda both: both[0] * both[1] > 2
    ),
    data=st.data(),
)
def test_no_score_reads_a_later_token(
    seed: int, layout: tuple[int, int], data: st.DataObject
) -> None:
    dim, steps = layout
    backbone, observation = model(seed, dim, steps)
    n = dim * steps
    first, tokens = data.draw(st.integers(1, n - 2)), torch.randint(BINS, (ROWS, n))
    other = tokens.clone()
    other[:, first:] = (tokens[:, first:] + torch.randint(1, BINS, (ROWS, n - first))) % BINS
    prefix, embeddings = backbone.prefill(observation), backbone.embed_prefix(observation)
    for depth in backbone.exits:
        seen = [backbone.shallow_logits(prefix, block[:, :-1], depth) for block in (tokens, other)]
        assert torch.equal(seen[0][:, :first], seen[1][:, :first])
        assert not torch.equal(seen[0][:, first], seen[1][:, first])
        packed = [
            backbone.packed_depth_logits(embeddings, [tokens, block], depth)
            for block in (tokens, other)
        ]
        assert torch.equal(packed[0][1][:, : first + 1], packed[1][1][:, : first + 1])
        assert torch.equal(packed[0][0], packed[1][0])  # blocks do not attend to each other
        few = backbone.shallow_logits(prefix, tokens[:, :first], depth)  # only the first tokens
        torch.testing.assert_close(few, seen[0][:, :first], rtol=1e-4, atol=1e-4)


def test_what_predicts_a_step_gets_the_steps_before_it() -> None:
    backbone, _ = model(0, 3, 4)
    branch, block = backbone.exits[1].branch, torch.randn(ROWS, 11, 32)
    added = branch(block)
    assert added.shape == block.shape
    steps = [added[:, :2], added[:, 2:5], added[:, 5:8], added[:, 8:]]  # token i predicts i + 1
    assert not steps[0].any()
    for found in steps[1:]:
        assert found.any()
        assert torch.equal(found, found[:, :1].expand_as(found))
    block[:, 4] += 1.0  # of step 1, which only steps 2 and 3 may read
    changed = (branch(block) - added).abs().amax((0, 2))
    assert not changed[:5].any()
    assert (changed[5:] > 0).all()


def test_untrained_they_are_the_linear_ones() -> None:
    (coarse, observation), (linear, _) = (
        model(1, 3, 4, kind, trained=False) for kind in ("coarse", "linear")
    )
    tokens, prefixes = (
        torch.randint(BINS, (ROWS, 12)),
        [m.prefill(observation) for m in (coarse, linear)],
    )
    for depth in coarse.exits:
        found = [
            m.shallow_logits(p, tokens[:, :-1], depth)
            for m, p in zip((coarse, linear), prefixes, strict=True)
        ]
        assert torch.equal(*found)
    linear.exits[2].linear.weight.normal_(std=0.1)
    coarse.exits[2].linear.weight.copy_(linear.exits[2].linear.weight)
    found = [
        m.shallow_logits(p, tokens[:, :-1], 2)
        for m, p in zip((coarse, linear), prefixes, strict=True)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("frozen", [0, 2])
def test_two_exits_decide_as_they_score(frozen: int) -> None:
    """DeeR-VLA: rows end with the upper exit's tokens, or continue as without exits."""
    backbone, observation = model(2, 3, 4)
    guess = torch.randint(BINS, (ROWS, 12))
    run = {"tokens_per_step": 3, "frozen_steps": frozen, "guess": guess}

    def decode(name: str, cut: int | None = None) -> Any:
        config = named_config(name)
        prefix = backbone.prefill_to(observation, cut) if cut else backbone.prefill(observation)
        return config.decoder.decode(backbone, prefix, BlockRequest(config, **run))

    loose = decode("deer3t1000", 3)
    assert loose.exit_reason == ["depths_agree"] * ROWS
    prefix, state = backbone.prefill_to(observation, 3), guess.clone()
    if not frozen:
        state[:, 0] = prefix.logits.argmax(-1)
    expected = backbone.shallow_logits(prefix, state[:, :-1], 3).argmax(-1)
    state[:, max(3 * frozen, 1) :] = expected[:, max(3 * frozen, 1) - 1 :]
    assert torch.equal(loose.tokens, state)
    greedy = decode("ar").tokens
    assert torch.equal(decode("depth2").tokens, greedy)
    strict = decode("deer3t0", 3)
    going = [row for row, reason in enumerate(strict.exit_reason) if reason != "depths_agree"]
    assert going
    assert torch.equal(strict.tokens[going], greedy[going])


def test_behind_committed_tokens_they_are_refused() -> None:
    backbone, observation = model(3, 3, 4)
    tokens, prefix = torch.randint(BINS, (ROWS, 12)), backbone.prefill(observation)
    backbone.block_logits(prefix, tokens[:, :4])
    prefix.cache.commit(4)
    for call in (
        lambda: backbone.shallow_logits(prefix, tokens[:, 4:8], 2),
        lambda: backbone.depth_logits(prefix, tokens[:, 4:8], [1, 2]),
    ):
        with pytest.raises(
            ConfigError,
            match="kind coarse has not seen the committed tokens; drafts need kind linear",
        ):
            call()
    refused = {"spec1x3": "drafts need kind linear", "del": "no linear exits"}
    for name, message in refused.items() if "drafts" in AXES else ():
        config = DecodingConfig(method=name)
        request = BlockRequest(config, guess=tokens, tokens_per_step=3)
        with pytest.raises(ConfigError, match=message):
            config.decoder.decode(backbone, prefix, request)


def test_tokens_of_no_step_have_none() -> None:
    backbone, _ = model(4, 3, 4)
    tokens = backbone.shape.action_tokens.build(4, 3)
    tokens.tokens_per_step = None

    class Free(UniformTokensConfig):
        def build(self, chunk_steps: int, action_dim: int) -> Any:
            return tokens

    shape = PolicyShape({"observation.images.front": (3, 32, 32)}, 5, 3, 4, Free(num_bins=BINS))
    config = CompactConfig(
        image_size=32, stem_channels=[8] * 4, width=32, layers=LAYERS, heads=2, mlp_width=48
    )
    with pytest.raises(ConfigError, match="do not belong to steps; train kind linear"):
        make_exits(CompactBackbone(shape, config), [1], "coarse")


@torch.no_grad()
def test_compiled_code_reads_them_the_same() -> None:
    backbone, observation = model(5, 3, 4)
    tokens, engine = torch.randint(BINS, (ROWS, 12)), compiled(backbone, "eager")
    for k in (5, 11):  # padded to 6 or 11 tokens
        eager = backbone.shallow_logits(backbone.prefill(observation), tokens[:, :k], 2)
        found = engine.shallow_logits(engine.prefill(observation), tokens[:, :k], 2)
        torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
