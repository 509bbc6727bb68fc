"""Programs: the layers that run, no proofs and no commits, and wrong programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.models.trunk import CompactTrunk
from ceed_vla.axes.programs.decoder import check_program
from ceed_vla.backbones.base import Prefix
from ceed_vla.compiled.engine import compiled
from ceed_vla.decoding import decode_block, decoder_ladders, named_config, prefill
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.tokens.uniform import ActionTokenizer

LAYERS, DIM, N, P = 3, 2, 12, 5
TOKENS = ActionTokenizer([-1.0] * DIM, [1.0] * DIM, N // DIM, num_bins=255)
WIDTH = 24
programs = st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=2 * LAYERS)


def made(seed: int, rows: int = 2) -> tuple[CompactTrunk, Prefix, Tensor]:
    """A random model whose tokens depend strongly on one another, a prefix (B, P), and a block (B,
    n - 1).
    """
    torch.manual_seed(seed)
    backbone = CompactTrunk(N, LAYERS, WIDTH).requires_grad_(False)
    for weight in (backbone.action_tokens.weight, backbone.slots, backbone.head.weight):
        weight.normal_()
    return (
        backbone,
        backbone.prefill({"embeds": torch.randn(rows, P, WIDTH)}),
        torch.randint(255, (rows, N - 1)),
    )


def by_hand(backbone: CompactTrunk, embeds: Tensor, tokens: Tensor, program: list[int]) -> Tensor:
    """The program without a cache; every layer reads the ordinary model's prefix at its depth."""
    x, mine, seen = embeds, backbone.action_tokens(tokens) + backbone.slots[: tokens.shape[1]], []
    for layer in backbone.trunk:
        seen.append(layer.project(x)[1:])
        x = layer(x, None)
    k = tokens.shape[1]
    mask = torch.cat(
        [
            torch.ones(k, embeds.shape[1], dtype=torch.bool),
            torch.ones(k, k, dtype=torch.bool).tril(),
        ],
        1,
    )
    for index in program:
        layer = backbone.trunk[index]
        q, keys, values = layer.project(mine)
        mine = layer.finish(
            mine,
            q,
            torch.cat([seen[index][0], keys], 2),
            torch.cat([seen[index][1], values], 2),
            mask,
        )
    return backbone.head(backbone.final_norm(mine))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), program=programs)
def test_its_layers_run_in_its_order(seed: int, program: list[int]) -> None:
    backbone, _, tokens = made(seed)
    torch.manual_seed(seed + 1)
    embeds = torch.randn(2, P, WIDTH)
    found = backbone.program_logits(backbone.prefill({"embeds": embeds}), tokens, program)
    torch.testing.assert_close(
        found, by_hand(backbone, embeds, tokens, program), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), committed=st.integers(0, N - 2))
def test_the_full_program_is_a_forward_bit_for_bit(seed: int, committed: int) -> None:
    backbone, prefix, tokens = made(seed)
    backbone.block_logits(prefix, tokens)
    prefix.cache.commit(committed)
    expected = backbone.block_logits(prefix, tokens[:, committed:])
    assert torch.equal(
        backbone.program_logits(prefix, tokens[:, committed:], range(LAYERS)), expected
    )


@pytest.mark.parametrize(
    "program", [[LAYERS - 1], [0, LAYERS - 1], list(range(LAYERS)), [0], [1, 2, 2, 0]]
)
@pytest.mark.usefixtures("poisoned")
def test_nothing_that_it_writes_is_committed(program: list[int]) -> None:
    backbone, prefix, tokens = made(0)
    expected = backbone.block_logits(prefix, tokens)
    prefix.cache.commit(4)  # from all layers
    behind = backbone.block_logits(prefix, tokens[:, 4:])
    assert backbone.program_logits(prefix, tokens[:, 4:], program).isfinite().all()
    with pytest.raises(TokenError, match="Cannot commit 1"):
        prefix.cache.commit(1)
    torch.testing.assert_close(backbone.block_logits(prefix, tokens[:, 4:]), behind, rtol=0, atol=0)
    torch.testing.assert_close(behind, expected[:, 4:], rtol=1e-4, atol=1e-4)
    prefix.cache.commit(1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20), program=programs, frozen=st.integers(0, 2), executed=st.booleans()
)
def test_without_an_exit_rule_tokens_are_greedy(
    seed: int, program: list[int], frozen: int, executed: bool
) -> None:
    backbone, prefix, _ = made(seed)
    generator = torch.Generator().manual_seed(seed)
    previous = torch.randint(255, (2, N), generator=generator)
    behind: dict[str, Any] = {"previous": previous, "frozen_steps": frozen}
    expected = decode_block(backbone, prefix, TOKENS, "ar", **behind).tokens
    name = f"program{'-'.join(map(str, program))}{'_h' * executed}"
    result = decode_block(backbone, prefix, TOKENS, name, executed_steps=3, **behind)
    right = (frozen + 3) * DIM if executed else N
    assert torch.equal(result.tokens[:, :right], expected[:, :right])
    assert (result.exact_tokens >= right).all()
    assert result.layer_forwards is not None
    assert torch.equal(result.layer_forwards, len(program) + (result.iterations - 1) * LAYERS)


@pytest.mark.slow
def test_compiled_code_decodes_the_same() -> None:
    plain, _, _ = made(5)
    embeds = torch.randn(2, P, WIDTH)
    expected = decode_block(plain, plain.prefill({"embeds": embeds}), TOKENS, "ar").tokens
    backbone = compiled(plain, "eager")
    result = decode_block(backbone, backbone.prefill({"embeds": embeds}), TOKENS, "program0-1-1")
    assert torch.equal(result.tokens, expected)
    assert result.exact.all()


def test_a_full_forward_follows_from_its_tokens() -> None:
    backbone, prefix, tokens = made(3)
    guess = torch.cat([prefix.logits.argmax(-1, keepdim=True), tokens[:, 1:], tokens[:, :1]], 1)
    for program in ([0, 2], [0, 1, 1, 2]):
        name = f"program{'-'.join(map(str, program))}_cap2"
        result = decode_block(backbone, prefix, TOKENS, name, previous=guess, record_states=True)
        first = backbone.program_logits(prefix, guess[:, :-1], program).argmax(-1)
        then = backbone.block_logits(prefix, torch.cat([guess[:, :1], first[:, :-1]], 1)).argmax(-1)
        assert torch.equal(result.tokens[:, 1:], then)
        assert (result.forwards, result.iterations.tolist()) == (2, [2, 2])
        assert result.layer_forwards is not None
        assert result.layer_forwards.tolist() == [len(program) + LAYERS] * 2


def test_what_cannot_run_is_refused() -> None:
    backbone, prefix, _ = made(4)
    for wrong in ([], [LAYERS], [-1], [0] * (2 * LAYERS + 1)):
        with pytest.raises(ConfigError, match="must list 1 to 6 layers, of 0 to 2"):
            check_program(wrong, LAYERS)
    for name, message in {
        "program0-3": "of 0 to 2",
        "program0-0-0-0-0-0-0": "must list 1 to 6 layers",
        "program0-2_cap1": "Use cap2",
    }.items():
        with pytest.raises(ConfigError, match=message):
            decode_block(backbone, prefix, TOKENS, name)
    for name in ("program", "program0-", "program-1", "program0--1", "program0,1"):
        with pytest.raises(ConfigError, match="Unknown decoder"):
            named_config(name)


def test_a_backbone_that_runs_none_is_refused_by_the_name_of_the_capability(toy: Any) -> None:
    backbone, observation = toy(0, 1, N, 255)
    with pytest.raises(ConfigError, match="RunsPrograms; a ToyBackbone lacks program_logits"):
        prefill(backbone, observation, named_config("program0-1"))


def test_every_command_knows_the_name() -> None:
    assert named_config("program0-1-3_conf0.2_cap2").method == "program0-1-3"
    assert "program" not in decoder_ladders()
    assert not named_config("program0-1-3_cap2").strict
    assert named_config("program0-1-3").strict
