"""Frozen tokens do not change, and the rest is their greedy continuation, by independent routes."""

from __future__ import annotations

import pytest
import torch
from decoders import greedy, jacobi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ceed_vla.decoding import DecodingConfig, decode_block
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.tokens.uniform import ActionTokenizer

A = 7


def random_tokens(seed: int, batch: int, n: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (batch, n), generator=torch.Generator().manual_seed(seed))


def forced(backbone, observation, frozen: Tensor, n: int) -> Tensor:
    """`frozen` and its greedy continuation (B, n), with everything recomputed for every token,
    without a cache.
    """
    tokens = frozen
    while tokens.shape[1] < n:
        logits = backbone.full_logits(observation, tokens)[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


def forced_llama(backbone, observation, frozen: Tensor, n: int) -> Tensor:
    ids = torch.cat([observation["prefix_ids"], backbone.action_ids[frozen]], dim=1)
    for _ in range(n - frozen.shape[1]):
        scores = backbone.model(ids, use_cache=False).logits[:, -1, backbone.action_ids]
        ids = torch.cat([ids, backbone.action_ids[scores.argmax(-1, keepdim=True)]], dim=1)
    return ids[:, -n:] - backbone.action_ids[0]


def assert_continues(backbone, prefix, frozen: Tensor, answer: Tensor, dim: int, seed: int) -> None:
    """AR and strict Jacobi, from several guesses, return `answer` (B, n)."""
    batch, n = answer.shape
    length = frozen.shape[1]
    ar = greedy(backbone, prefix, tokens_per_step=dim, frozen=frozen)
    assert torch.equal(ar.tokens, answer)
    assert ar.forwards == (n - length if length else n - 1)
    assert ar.exact.all()
    for guess in (
        random_tokens(seed, batch, n, backbone.vocabulary_size),
        torch.zeros_like(answer),
        answer,
        answer.roll(1, dims=1),
    ):
        kept = guess.clone()
        result = jacobi(
            backbone, prefix, guess, tokens_per_step=dim, frozen=frozen, record_states=True
        )
        assert torch.equal(result.tokens, answer)
        assert torch.equal(guess, kept)
        assert result.exit_reason == ["converged"] * batch
        assert result.exact_tokens.tolist() == [n] * batch
        assert result.forwards == result.iterations.max() <= max(n - length, 1)
        assert result.states is not None
        assert all(torch.equal(state[:, :length], frozen) for state in result.states)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 4),
    dim=st.integers(1, 7),
    steps=st.integers(1, 8),
    frozen_steps=st.integers(0, 7),
    vocabulary=st.sampled_from([2, 17, 255]),
)
def test_toy_ar_and_jacobi_continue_the_frozen_steps(
    toy, seed, batch, dim, steps, frozen_steps, vocabulary
) -> None:
    n, given_tokens = dim * steps, dim * min(frozen_steps, steps - 1)
    backbone, observation = toy(seed, batch, n, vocabulary)
    frozen = random_tokens(seed + 1, batch, given_tokens, vocabulary)
    answer = forced(backbone, observation, frozen, n)
    assert_continues(backbone, backbone.prefill(observation), frozen, answer, dim, seed)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 3),
    layout=st.sampled_from([(7, 3, 1), (5, 5, 4)]),
)
def test_llama_ar_and_jacobi_continue_the_frozen_steps(llama, seed, batch, layout) -> None:
    dim, steps, frozen_steps = layout
    backbone, observation = llama(seed, batch, dim * steps, 255)
    frozen = random_tokens(seed, batch, dim * frozen_steps, 255)
    with torch.inference_mode():
        answer = forced_llama(backbone, observation, frozen, dim * steps)
        assert_continues(backbone, backbone.prefill(observation), frozen, answer, dim, seed)


def test_freezing_the_own_answer_changes_nothing_and_a_new_decode_forgets_it(toy) -> None:
    backbone, observation = toy(3, 2, 28, 255)
    prefix = backbone.prefill(observation)
    answer = greedy(backbone, prefix).tokens
    other = random_tokens(0, 2, 28, 255)
    for steps in range(1, 4):
        frozen = answer[:, : steps * A]
        same = jacobi(backbone, prefix, other, tokens_per_step=A, frozen=frozen)
        changed = jacobi(backbone, prefix, other, tokens_per_step=A, frozen=(frozen + 1) % 255)
        assert torch.equal(same.tokens, answer)
        assert not torch.equal(changed.tokens[:, steps * A :], answer[:, steps * A :])
    for frozen in (None, answer[:, :0]):
        again = jacobi(backbone, prefix, other, tokens_per_step=A, frozen=frozen)
        assert torch.equal(again.tokens, answer)


def test_frozen_steps_cost_no_forward_and_are_not_recomputed(toy) -> None:
    backbone, observation = toy(4, 1, 28, 255)
    prefix = backbone.prefill(observation)
    frozen = random_tokens(0, 1, 14, 255)
    answer = greedy(backbone, prefix, tokens_per_step=A, frozen=frozen).tokens
    backbone.calls.clear()
    right = jacobi(backbone, prefix, answer, tokens_per_step=A, frozen=frozen)
    assert (right.forwards, backbone.calls) == (1, [27])
    backbone.calls.clear()
    jacobi(backbone, prefix, (answer + 1) % 255, tokens_per_step=A, frozen=frozen)
    assert backbone.calls[0] == 27
    assert all(length <= 13 for length in backbone.calls[1:])  # reads at most slots 14 .. 26
    assert prefix.cache.committed >= 14


@pytest.mark.parametrize("executed", [1, 2, 4])
def test_only_the_steps_behind_the_frozen_ones_must_converge(toy, executed: int) -> None:
    backbone, observation = toy(5, 1, 28, 255)
    prefix = backbone.prefill(observation)
    frozen, guess = random_tokens(0, 1, 14, 255), random_tokens(1, 1, 28, 255)
    answer = greedy(backbone, prefix, tokens_per_step=A, frozen=frozen).tokens
    backbone.calls.clear()
    result = jacobi(
        backbone, prefix, guess, tokens_per_step=A, executed_steps=executed, frozen=frozen
    )
    end = min(14 + executed * A, 28)
    assert torch.equal(result.tokens[:, :end], answer[:, :end])
    assert result.exit_reason == ["stable" if end < 28 else "converged"]
    assert end <= int(result.exact_tokens[0]) <= 28
    start = 14  # the first iteration commits at least the frozen tokens
    assert max(backbone.calls[1:]) <= end - 1 - start
    ar = greedy(
        backbone,
        prefix,
        DecodingConfig(method="ar", watch="executed"),
        guess=guess,
        tokens_per_step=A,
        executed_steps=executed,
        frozen=frozen,
    )
    assert torch.equal(ar.tokens, torch.cat([answer[:, :end], guess[:, end:]], dim=1))
    assert ar.forwards == end - 14
    assert ar.exact_tokens.tolist() == [end]


def test_confidence_watches_only_the_free_steps(toy) -> None:
    backbone, observation = toy(6, 3, 28, 255)
    prefix = backbone.prefill(observation)
    frozen, guess = random_tokens(0, 3, 7, 255), random_tokens(1, 3, 28, 255)
    sure = DecodingConfig(confidence=1e-6)
    result = jacobi(backbone, prefix, guess, sure, tokens_per_step=A, frozen=frozen)
    assert result.exit_reason == ["confidence"] * 3
    assert torch.equal(result.tokens[:, :7], frozen)
    unsure = DecodingConfig(confidence=1.0)
    result = jacobi(backbone, prefix, guess, unsure, tokens_per_step=A, frozen=frozen)
    assert result.exit_reason == ["converged"] * 3


def test_cap_and_deadline_keep_the_frozen_steps_and_the_first_free_token(toy) -> None:
    backbone, observation = toy(7, 2, 28, 255)
    prefix = backbone.prefill(observation)
    frozen, guess = random_tokens(0, 2, 14, 255), random_tokens(1, 2, 28, 255)
    answer = greedy(backbone, prefix, tokens_per_step=A, frozen=frozen).tokens
    times = iter(range(100))
    for config in (DecodingConfig(max_iterations=1), DecodingConfig(deadline_s=1.5)):
        result = jacobi(
            backbone,
            prefix,
            guess,
            config,
            tokens_per_step=A,
            frozen=frozen,
            clock=lambda: float(next(times)),
        )
        assert result.forwards == 1
        assert torch.equal(result.tokens[:, :15], answer[:, :15])
        assert (result.exact_tokens >= 15).all()
        assert not torch.equal(result.tokens, answer)


def test_decode_block_freezes_for_both_methods(toy) -> None:
    backbone, observation = toy(8, 2, 28, 255)
    prefix = backbone.prefill(observation)
    tokenizer = ActionTokenizer([-1.0] * A, [1.0] * A, 4, gripper_dims=(6,))
    previous = random_tokens(5, 2, 28, 255)
    frozen = previous[:, 14:21]
    results = [
        decode_block(
            backbone,
            prefix,
            tokenizer,
            name,
            previous=previous,
            shift_steps=2,
            executed_steps=3,
            frozen_steps=1,
        )
        for name in ("ar", "jacobi", "jacobi_random", "jacobi_h")
    ]
    for result in results:
        assert torch.equal(result.tokens, results[0].tokens)
        assert torch.equal(result.tokens[:, :7], frozen)


@pytest.mark.parametrize("method", ["ar", "jacobi", "jacobi_random"])
@pytest.mark.parametrize(
    ("message", "settings"),
    [
        (r"frozen_steps is 2; it must be in \[0, 1\]", {"frozen_steps": 2, "shift_steps": 0}),
        (r"frozen_steps is 1; it must be in \[0, 0\]", {"shift_steps": 2}),
        ("frozen_steps is -1", {"frozen_steps": -1}),
        ("frozen_steps is 1.0", {"frozen_steps": 1.0}),
        ("frozen_steps is 'one'", {"frozen_steps": "one"}),
        ("has no previous chunk", {"previous": None}),
        ("has no previous chunk", {"previous": torch.tensor([[0] * 14, [-1] * 14])}),
        (r"\(2, 7\) torch.int64, expected \(2, 14\)", {"previous": torch.zeros(2, 7).long()}),
        ("torch.float32", {"previous": torch.zeros(2, 14)}),
        (r"chunk\[0, 3\] is 31; .* \[0, 30\]", {"previous": torch.arange(28, 42).repeat(2, 1)}),
    ],
)
def test_frozen_steps_that_the_previous_chunk_lacks_are_named(
    toy, method: str, message: str, settings: dict[str, object]
) -> None:
    backbone, observation = toy(9, 2, 14, 31)
    prefix = backbone.prefill(observation)
    tokenizer = ActionTokenizer([-1.0] * A, [1.0] * A, 2, num_bins=31)
    request = {
        "previous": torch.zeros(2, 14, dtype=torch.int64),
        "shift_steps": 1,
        "frozen_steps": 1,
        **settings,
    }
    with pytest.raises(TokenError, match=message):
        decode_block(backbone, prefix, tokenizer, method, **request)


def test_what_a_decoder_freezes_is_checked(toy) -> None:
    backbone, observation = toy(9, 2, 14, 31)
    prefix = backbone.prefill(observation)
    guess = torch.zeros(2, 14, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"frozen_steps is 2; it must be in \[0, 1\]"):
        jacobi(backbone, prefix, guess, tokens_per_step=A, frozen_steps=2)
    with pytest.raises(ConfigError, match="variable length do not belong to steps"):
        jacobi(backbone, prefix, guess, tokens_per_step=None, frozen_steps=1)
    with pytest.raises(TokenError, match="pass a guess"):
        greedy(backbone, prefix, tokens_per_step=A, frozen_steps=1)
    with pytest.raises(ConfigError, match="executed_steps is 3"):
        jacobi(backbone, prefix, guess, tokens_per_step=A, frozen_steps=1, executed_steps=3)
