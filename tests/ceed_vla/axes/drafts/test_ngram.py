"""N-gram drafts: exact for any draft, and the drafted tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoders import greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from ceed_vla.axes.drafts.ngram import _Lookup, decode_ngram, draft
from ceed_vla.decoding import BlockRequest, DecodingConfig
from ceed_vla.decoding.rows import Rows
from ceed_vla.errors import ConfigError, TokenError


def request(guess: torch.Tensor | None, length: int = 4, **more: object) -> BlockRequest:
    more.setdefault("config", DecodingConfig(method=f"ngram{length}"))
    return BlockRequest(guess=guess, **more)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    steps=st.integers(1, 5),
    dim=st.integers(1, 4),
    length=st.integers(1, 12),
    frozen=st.integers(0, 2),
    vocabulary=st.sampled_from([3, 31]),
)
def test_every_token_is_the_greedy_one(
    toy, seed, batch, steps, dim, length, frozen, vocabulary
) -> None:
    backbone, observation = toy(seed, batch, steps * dim, vocabulary)
    guess = torch.randint(
        vocabulary, (batch, steps * dim), generator=torch.Generator().manual_seed(seed)
    )
    prefix = backbone.prefill(observation)
    behind = {"tokens_per_step": dim, "frozen_steps": min(frozen, steps - 1)}
    expected = greedy(backbone, prefix, guess=guess, **behind)
    result = decode_ngram(backbone, prefix, request(guess, length, **behind))
    assert torch.equal(result.tokens, expected.tokens)
    assert result.exact.all()
    assert result.forwards <= steps * dim


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_a_row_may_be_far_ahead_of_another(toy, length: int) -> None:
    """As the rows of a batch are whose environments were reset at different times."""
    backbone, observation = toy(3, 2, 40, 31)
    prefix = backbone.prefill(observation)
    guess = torch.zeros(2, 40, dtype=torch.int64)
    expected = greedy(backbone, prefix, guess=guess)
    guess[0] = expected.tokens[0]
    guess[0, -1] = (guess[0, -1] + 1) % 31
    result = decode_ngram(backbone, prefix, request(guess, length))
    assert torch.equal(result.tokens, expected.tokens)


def test_only_the_executed_steps_are_decoded(toy) -> None:
    backbone, observation = toy(3, 2, 12, 31)
    prefix, guess = backbone.prefill(observation), torch.zeros(2, 12, dtype=torch.int64)
    config = DecodingConfig(method="ngram4", watch="executed")
    result = decode_ngram(
        backbone, prefix, request(guess, config=config, tokens_per_step=3, executed_steps=2)
    )
    assert torch.equal(result.tokens[:, :6], greedy(backbone, prefix).tokens[:, :6])
    assert result.exit_reason == ["stable"] * 2
    assert (result.exact_tokens >= 6).all()


def test_a_right_guess_takes_one_forward(toy) -> None:
    backbone, observation = toy(1, 1, 21, 5)
    prefix = backbone.prefill(observation)
    result = decode_ngram(
        backbone, prefix, request(greedy(backbone, prefix).tokens, 5, tokens_per_step=3)
    )
    # the first forward computes the whole block
    assert (result.forwards, result.exit_reason) == (
        1,
        ["converged"],
    )


def test_the_tail_is_a_warm_start(toy) -> None:
    backbone, observation = toy(2, 1, 12, 31)
    guess, config = (
        torch.zeros(1, 12, dtype=torch.int64),
        DecodingConfig(method="ngram4", watch="executed"),
    )
    asked = request(guess, config=config, tokens_per_step=3, executed_steps=2)
    assert (decode_ngram(backbone, backbone.prefill(observation), asked).tokens[:, 6:] != 0).any()


def test_drafts_follow_the_last_two_tokens_at_the_same_dimension() -> None:
    guess, empty = np.arange(100, 112), 0
    proven = np.array([1, 2, 3, 4, 9, 9, 9, 9, 1, 2])  # 1, 2 stood at slot 0: 3, 4 followed
    assert draft(guess, proven, 2, 4).tolist() == [3, 4]
    # another dimension: the guess at this slot
    assert draft(guess, proven, 2, 3).tolist() == [
        110,
        111,
    ]
    guess[4:8] = (1, 2, 7, 8)
    assert draft(guess, np.array([5, 5, 5, 5, 5, 5, 5, 5, 1, 2]), 2, 4).tolist() == [7, 8]
    guess[8:] = (1, 2, 6, 6)  # the guess agrees at this slot
    assert draft(guess, proven, 2, 4).tolist() == [6, 6]
    assert draft(guess, np.array([5]), 3, 4).tolist() == guess[1:4].tolist()
    assert len(draft(guess, proven, empty, 4)) == 0


def test_a_guess_that_the_proven_tokens_contradict_is_not_the_draft() -> None:
    lookup, rows = _Lookup(2, 4), Rows(1, 16, 6)
    block = torch.arange(100, 116).unsqueeze(0)
    block[0, :4] = torch.tensor([1, 2, 3, 4])
    rows.exact[:] = 4
    lookup.draft(None, None, block, rows, 4, 6)  # type: ignore[arg-type]
    block[0, 4:6] = torch.tensor([1, 2])  # the forward disagrees with its input
    rows.exact[:] = 6
    lookup.draft(None, None, block, rows, 6, 8)  # type: ignore[arg-type]
    assert block[0, 6:8].tolist() == [3, 4]  # the tokens that followed 1, 2 earlier
    rows.exact[:] = 8
    lookup.draft(None, None, block, rows, 8, 10)  # type: ignore[arg-type]
    assert block[0, 8:10].tolist() == [108, 109]  # both drafts were right: the newest state follows


def test_what_it_cannot_decode(toy) -> None:
    backbone, observation = toy(0, 1, 6, 31)
    prefix, guess = backbone.prefill(observation), torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(TokenError, match="guess"):
        decode_ngram(backbone, prefix, request(None))
    capped = DecodingConfig(method="ngram4", max_iterations=1)
    for wrong in (
        request(guess, config=capped),
        request(guess, 0),
        request(guess, stop=3),
        request(guess, tokens_per_step=None),
    ):
        with pytest.raises(ConfigError, match=r"ngram|Drafts"):
            decode_ngram(backbone, prefix, wrong)
