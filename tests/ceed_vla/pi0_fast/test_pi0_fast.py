"""pi0-FAST: our greedy and Jacobi tokens against LeRobot's own decoder, on tiny models with
LeRobot's classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import assert_same_tokens
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ceed_vla.backbones.pi0_fast.model import Pi0FastBackbone
from ceed_vla.backbones.pi0_fast.tokens import text_ids
from ceed_vla.compiled.engine import compiled
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import (
    CheckpointError,
    ConfigError,
    MalformedChunkError,
    ObservationError,
    TokenError,
)
from ceed_vla.tokens.fast_codec import FastCodec

STRICT = [
    DecodingConfig(method="ar"),
    DecodingConfig(guess="mid"),
    DecodingConfig(guess="random", window=6),
    DecodingConfig(guess="random", window=1, seed=1),
]


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_of_random_models_are_lerobots(lab: Any, rows: int, seed: int) -> None:
    policy, batch = lab.build(seed), lab.observe(rows, seed)
    backbone, tokenizer = lab.wrap(policy)
    expected = lab.lerobot_tokens(policy, batch, lab.STOP)
    assert len(expected.unique()) >= 8  # the model does not repeat itself
    assert torch.equal(expected, lab.lerobot_tokens(policy, batch, lab.STOP, cached=False))
    for config in STRICT:
        result = lab.decode(backbone, tokenizer, batch, config)
        assert torch.equal(result.tokens, expected), config
        assert bool(result.exact.all())


@pytest.mark.parametrize("config", STRICT)
def test_rows_end_at_their_stop_token(lab: Any, config: DecodingConfig) -> None:
    batch = lab.observe(3)
    free = lab.lerobot_tokens(lab.build(), batch, lab.STOP)
    stop = int(free[0, 6])  # use an id that the model writes as the stop token
    policy = lab.build(stop_id=stop)
    backbone, tokenizer = lab.wrap(policy)
    result = lab.decode(backbone, tokenizer, batch, config)
    assert torch.equal(result.tokens, lab.lerobot_tokens(policy, batch, stop))
    ended = (result.tokens == stop).any(1)
    assert ended[0]
    for row in range(3):
        reason = "complete" if config.method == "ar" else "converged"
        assert result.exit_reason[row] == ("stop" if ended[row] else reason)
    assert result.iterations[0] <= 6


def test_decoding_ends_with_the_last_stop_token(lab: Any) -> None:
    batch = lab.observe(1)
    stop = int(lab.lerobot_tokens(lab.build(), batch, lab.STOP)[0, 4])
    backbone, tokenizer = lab.wrap(lab.build(stop_id=stop))
    ar = lab.decode(backbone, tokenizer, batch, DecodingConfig(method="ar"))
    slot = int((ar.tokens[0] != stop).sum())
    assert ar.forwards == slot <= 4
    jacobi = lab.decode(
        backbone, tokenizer, batch, DecodingConfig(guess="mid", window=8), record_states=True
    )
    assert jacobi.forwards <= slot
    assert jacobi.states is not None
    assert torch.equal(jacobi.states[-1], jacobi.tokens)
    first = lab.decode(
        *lab.wrap(lab.build(stop_id=int(ar.tokens[0, 0]))), batch, DecodingConfig(guess="mid")
    )
    assert (first.forwards, first.exit_reason, first.exact.tolist()) == (0, ["stop"], [True])


def test_states_hold_only_action_ids_where_greedy_has_not_confirmed_others(lab: Any) -> None:
    policy, batch = lab.build(3), lab.observe(2)
    backbone, tokenizer = lab.wrap(policy)
    result = lab.decode(
        backbone, tokenizer, batch, DecodingConfig(guess="random"), record_states=True
    )
    assert result.states is not None
    assert len(result.states) > 3
    for state in result.states:
        # the proven part may have any id, as LeRobot's
        greedy = (state == result.tokens).long().cumprod(1).bool()
        assert bool((greedy | torch.isin(state, tokenizer.action_ids)).all())


def test_restricted_vocabulary_is_exact_and_only_writes_actions(lab: Any) -> None:
    policy, batch = lab.build(4), lab.observe(2)
    backbone, tokenizer = lab.wrap(policy, "actions")
    full, _ = lab.wrap(policy)
    prefix, restricted = full.prefill(batch), backbone.prefill(batch)
    assert torch.allclose(prefix.logits[:, tokenizer.action_ids], restricted.logits, atol=1e-5)
    tokens = [lab.decode(backbone, tokenizer, batch, config).tokens for config in STRICT]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])
    assert int(tokens[0].max()) < tokenizer.vocabulary_size == len(tokenizer.action_ids)


@pytest.mark.parametrize("vocabulary", ["full", "actions"])
def test_training_and_depth(vocabulary: str, lab: Any, keeps_the_contract: Any) -> None:
    keeps_the_contract(lab.wrap(lab.build(6), vocabulary)[0], lab.observe(3))


def test_detokenising_agrees_with_lerobot(lab: Any) -> None:
    policy = lab.build()
    _, tokenizer = lab.wrap(policy)
    chunks = 0.3 * torch.randn(5, lab.STEPS, lab.DIM, generator=torch.Generator().manual_seed(2))
    tokens = tokenizer.encode(chunks)
    actions = tokenizer.decode(tokens)
    assert torch.equal(actions, policy.detokenize_actions(tokens, lab.STEPS, lab.DIM))
    assert (actions - chunks).abs().max() < 0.2  # FAST rounds
    twice = torch.cat([tokens[:, :2], tokens[:, :-2]], dim=1)  # a second marker, which both remove
    assert torch.equal(tokenizer.decode(twice), actions)


def test_malformed_chunks_are_counted_errors_not_zeros(lab: Any) -> None:
    policy = lab.build()
    _, tokenizer = lab.wrap(policy)
    good = tokenizer.encode(0.3 * torch.randn(3, lab.STEPS, lab.DIM))
    short = good.clone()
    short[1, 3:] = tokenizer.stop
    # LeRobot pads it
    assert policy.detokenize_actions(short, lab.STEPS, lab.DIM).shape == (
        3,
        lab.STEPS,
        lab.DIM,
    )
    with pytest.raises(
        MalformedChunkError,
        match=r"1 of 3 chunks are malformed, the first in row 1: .* coefficients",
    ):
        tokenizer.decode(short)
    unmarked = good.roll(-2, dims=1)
    with pytest.raises(MalformedChunkError, match="not with 'Action: '"):
        tokenizer.decode(unmarked)
    foreign = good.clone()
    foreign[0, 2] = lab.WORDS - 1
    with pytest.raises(MalformedChunkError, match="is not a FAST id"):
        tokenizer.decode(foreign)
    assert tokenizer.malformed == 1 + 3 + 1
    with pytest.raises(TokenError, match=r"expected \(B, 20\) integers"):
        tokenizer.decode(good[:, :-1])


def test_a_cap_or_deadline_ends_where_there_is_a_chunk(lab: Any) -> None:
    policy, batch = lab.build(), lab.observe(2)
    backbone, tokenizer = lab.wrap(policy)
    goes_on = lab.decode(
        backbone, tokenizer, batch, DecodingConfig(guess="random", max_iterations=2)
    )
    # two iterations did not give a chunk
    assert torch.equal(goes_on.tokens, lab.lerobot_tokens(policy, batch, lab.STOP))
    ticks = iter(float(t) for t in range(100))
    late = DecodingConfig(guess="random", deadline_s=1.5)
    cut = lab.decode(backbone, tokenizer, batch, late, clock=lambda: next(ticks))
    # a robot with half a chunk would have to hold
    assert torch.equal(cut.tokens, goes_on.tokens)


def test_the_previous_chunk_is_shifted_in_time(lab: Any) -> None:
    _, tokenizer = lab.wrap(lab.build())
    chunk = torch.linspace(-0.5, 0.5, lab.STEPS)[None, :, None].expand(2, -1, lab.DIM).contiguous()
    previous = tokenizer.encode(chunk)
    previous[1] = -1
    guess = tokenizer.guess("previous", 2, previous, 2, None)
    shifted = tokenizer.decode(guess)
    assert torch.allclose(shifted[0, :, 0], chunk[0, [2, 3, 3, 3], 0], atol=0.1)
    assert torch.equal(guess[1], tokenizer.zero)


def test_bad_input(lab: Any) -> None:
    policy = lab.build()
    backbone, tokenizer = lab.wrap(policy)
    batch = lab.observe(2)
    assert backbone.check_observation(batch) == 2
    del batch[lab.CAMERAS[1]]
    with pytest.raises(ObservationError, match=r"lacks 'observation\.images\.wrist'"):
        backbone.check_observation(batch)
    tokenizer.action_ids = tokenizer.action_ids + lab.WORDS
    with pytest.raises(ConfigError, match="Take tokenizer and weights from the same checkpoint"):
        Pi0FastBackbone(policy.model, tokenizer)
    with pytest.raises(ConfigError, match="only 600 ids have logits"):
        replace(tokenizer.settings, scored=600).build(lab.STEPS, lab.DIM)
    with pytest.raises(ConfigError, match=r"it must have \d+ for FAST"):
        replace(tokenizer.settings, words=200, stop=5, marker=[6, 7], scored=0).build(
            lab.STEPS, lab.DIM
        )
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )
    with pytest.raises(ConfigError, match="no BOS token"):
        text_ids(plain)
    with pytest.raises(ConfigError, match="do not stand for neighbouring actions"):
        lab.decode(backbone, tokenizer, lab.observe(1), DecodingConfig(confidence=0.5))
    with pytest.raises(CheckpointError, match=r"processor_config\.json cannot be read"):
        FastCodec.from_folder(lab.folder / "nowhere")
    (lab.folder / "fast" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks tokenizer.json"):
        FastCodec.from_folder(lab.folder / "fast")
    with pytest.raises(TokenError, match="only finite actions"):
        tokenizer.encode(torch.full((1, lab.STEPS, lab.DIM), float("nan")))


@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [
        ("full", 2),
        *(
            pytest.param(v, rows, marks=pytest.mark.slow)
            for v in ("full", "actions")
            for rows in (1, 4)
        ),
    ],
)
def test_compiled_tokens_are_the_eager_ones(lab: Any, vocabulary: str, rows: int) -> None:
    backbone, tokenizer = lab.wrap(lab.build(), vocabulary)
    assert_same_tokens(backbone, compiled(backbone, "eager"), lab.observe(rows), tokenizer)
