"""Decoding of one block: states, layouts, committed tokens, the autoregressive reference, wrong
input.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from decoders import STRICT, greedy, jacobi
from torch import Tensor

from ceed_vla.decoding import DecodingConfig, decode_block
from ceed_vla.decoding.loop import JacobiBlock
from ceed_vla.errors import ConfigError, NotFiniteError, TokenError
from ceed_vla.tokens.uniform import ActionTokenizer

A = 7


def random_guess(seed: int, batch: int, n: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (batch, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 3])
def test_proven_tokens_leave_the_block(toy, batch: int) -> None:
    """Every forward starts at the last token that is proven in all running rows; the states give
    that token independently.
    """
    backbone, observation = toy(9, batch, 28, 5)
    prefix, guess = backbone.prefill(observation), random_guess(0, batch, 28, 5)
    backbone.calls.clear()
    result = jacobi(backbone, prefix, guess, tokens_per_step=A, record_states=True)
    assert result.states is not None
    expected = [27]
    for old, new in itertools.pairwise(result.states):
        starts = [
            int((o != w).nonzero()[0]) for o, w in zip(old, new, strict=True) if (o != w)[:-1].any()
        ]
        expected += [27 - min(starts)] if starts else []
    assert backbone.calls == expected
    assert all(later < earlier for earlier, later in itertools.pairwise(backbone.calls))


def test_recorded_states_are_the_trajectory(toy) -> None:
    backbone, observation = toy(6, 3, 28, 31)
    prefix, guess = backbone.prefill(observation), random_guess(0, 3, 28, 31)
    result = jacobi(backbone, prefix, guess, tokens_per_step=A, record_states=True)
    assert result.states is not None
    assert len(result.states) == result.forwards + 1
    assert torch.equal(result.states[0][:, 1:], guess[:, 1:])
    assert torch.equal(result.states[0][:, 0], prefix.logits.argmax(-1))
    assert torch.equal(result.states[-1], result.tokens)
    for old, new in itertools.pairwise(result.states):
        expected = backbone.full_logits(observation, old[:, :-1]).argmax(-1)
        assert torch.equal(new, expected)
    for row, last in enumerate(result.iterations.tolist()):  # unchanged after the row ended
        assert all(torch.equal(state[row], result.tokens[row]) for state in result.states[last:])
    assert jacobi(backbone, prefix, guess, tokens_per_step=A).states is None


def test_results_can_train_a_model(toy) -> None:
    """Tokens are ordinary tensors, so an embedding can save them for its backward pass."""
    backbone, observation = toy(6, 2, 14, 31)
    result = jacobi(
        backbone, backbone.prefill(observation), random_guess(0, 2, 14, 31), tokens_per_step=A
    )
    torch.nn.Embedding(31, 4)(result.tokens).sum().backward()


def test_autoregressive_stops_after_the_executed_steps(toy) -> None:
    backbone, observation = toy(7, 2, 28, 31)
    prefix = backbone.prefill(observation)
    whole = greedy(backbone, prefix)
    guess, half = random_guess(0, 2, 28, 31), DecodingConfig(method="ar", watch="executed")
    steps = {"tokens_per_step": A, "executed_steps": 2}
    result = greedy(backbone, prefix, half, guess=guess, record_states=True, **steps)
    assert torch.equal(result.tokens[:, :14], whole.tokens[:, :14])
    assert torch.equal(result.tokens[:, 14:], guess[:, 14:])
    assert result.forwards == 13
    assert result.exact_tokens.tolist() == [14, 14]
    assert not result.exact.any()
    assert result.states is not None
    assert len(result.states) == 14
    assert torch.equal(result.states[0][:, 1:], guess[:, 1:])
    with pytest.raises(TokenError, match="pass a guess"):
        greedy(backbone, prefix, half, **steps)


@pytest.mark.parametrize("method", ["ar", "jacobi"])
def test_a_block_of_one_token_needs_no_forward(toy, method: str) -> None:
    backbone, observation = toy(7, 2, 1, 31)
    prefix, guess = backbone.prefill(observation), torch.zeros(2, 1, dtype=torch.int64)
    if method == "ar":
        result = greedy(backbone, prefix)
    else:
        result = jacobi(backbone, prefix, guess, tokens_per_step=1)
        assert result.exit_reason == ["converged"] * 2
    assert torch.equal(result.tokens[:, 0], prefix.logits.argmax(-1))
    assert (result.forwards, result.iterations.tolist(), result.exact.tolist()) == (
        0,
        [0, 0],
        [True, True],
    )


def test_bad_guesses_and_layouts_are_named(toy) -> None:
    backbone, observation = toy(7, 2, 14, 31)
    prefix, good = backbone.prefill(observation), torch.zeros(2, 14, dtype=torch.int64)
    bad = {
        "expected .2, 14. integers": good[:, :7],
        "torch.float32": good.float(),
        r"guess\[0, 3\] is 31; .* \[0, 30\]": good.index_fill(1, torch.tensor([3]), 31),
        r"guess\[0, 3\] is -1": good.index_fill(1, torch.tensor([3]), -1),
    }
    for message, guess in bad.items():
        with pytest.raises(TokenError, match=message):
            jacobi(backbone, prefix, guess, tokens_per_step=A)
    with pytest.raises(ConfigError, match="executed_steps is 3; a block has 2 steps"):
        jacobi(backbone, prefix, good, tokens_per_step=A, executed_steps=3)
    with pytest.raises(ConfigError, match="not a whole number of steps"):
        jacobi(backbone, prefix, good, tokens_per_step=4, executed_steps=1)


def test_the_guess_is_left_alone(toy) -> None:
    backbone, observation = toy(7, 2, 14, 31)
    guess = random_guess(0, 2, 14, 31)
    kept = guess.clone()
    jacobi(backbone, backbone.prefill(observation), guess, tokens_per_step=A)
    assert torch.equal(guess, kept)


def test_decode_block_makes_the_guess_of_the_configuration(toy) -> None:
    backbone, observation = toy(8, 2, 28, 255)
    prefix = backbone.prefill(observation)
    tokenizer = ActionTokenizer([-1.0] * A, [1.0] * A, 4, gripper_dims=(6,))
    previous = random_guess(5, 2, 28, 255)
    previous[1] = -1

    def first_state(config: DecodingConfig, **more) -> Tensor:
        states = decode_block(
            backbone, prefix, tokenizer, config, record_states=True, shift_steps=2, **more
        ).states
        assert states is not None
        return states[0][:, 1:]

    warm = first_state(DecodingConfig(), previous=previous)
    expected = torch.cat([previous[0, 14:], previous[0, 21:], previous[0, 21:]])
    assert torch.equal(warm[0], expected[1:])
    assert (warm[1] == 127).all()
    assert (first_state(DecodingConfig()) == 127).all()
    random = DecodingConfig(guess="random", seed=3)
    assert torch.equal(first_state(random), first_state(random))
    assert not torch.equal(first_state(random), first_state(replace(random, seed=4)))
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(
        first_state(random, generator=generator), first_state(random, generator=generator)
    )
    half = decode_block(
        backbone, prefix, tokenizer, "ar_h", previous=previous, shift_steps=2, executed_steps=2
    )
    assert torch.equal(half.tokens[0, 14:], expected[14:])
    assert half.exit_reason == ["complete"] * 2


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("decode", [greedy, jacobi])
def test_tokens_that_are_proven_on_the_way_are_those_of_the_end(
    toy, decode: Any, frozen: int
) -> None:
    backbone, observation = toy(6, 3, 28, 31)
    prefix, guess = backbone.prefill(observation), random_guess(0, 3, 28, 31)
    frozen_tokens = guess[:, : frozen * A] if frozen else None
    told: list[tuple[Tensor, int, int]] = []
    options = {"tokens_per_step": A, "frozen": frozen_tokens}
    if decode is jacobi:
        options["guess"] = guess
    result = decode(
        backbone,
        prefix,
        on_proven=lambda tokens, *counts: told.append((tokens.clone(), *counts)),
        **options,
    )
    assert told[-1][1:] == (28, result.forwards)
    assert [exact for _, exact, _ in told] == sorted(exact for _, exact, _ in told)
    assert all(
        torch.equal(tokens[:, :exact], result.tokens[:, :exact]) for tokens, exact, _ in told
    )
    if decode is greedy:
        assert [exact // A for _, exact, _ in told] == list(range(frozen + 1, 5))


@pytest.mark.parametrize("decode", [jacobi, greedy])
def test_an_error_of_a_callback_reaches_the_caller(decode, toy) -> None:
    backbone, observation = toy(6, 1, 28, 31)

    def told(*_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        decode(
            backbone,
            backbone.prefill(observation),
            on_proven=told,
            tokens_per_step=A,
            guess=random_guess(0, 1, 28, 31),
        )


def test_only_rows_that_still_run_need_finite_scores() -> None:
    for settled, scores in (([True, False], [[np.nan], [0.0]]), ([False, True], [[0.0], [np.inf]])):
        block = JacobiBlock(np.zeros((2, 28), int), STRICT, frozen=0, watched=28, stop=None)
        block.settle(np.array(settled))
        block.check(np.array(scores))
        with pytest.raises(NotFiniteError, match=f"row {settled.index(False)}"):
            block.check(np.array(scores[::-1]))


def test_token_by_token_has_no_deadline(toy) -> None:
    backbone, observation = toy(9, 1, 28, 5)
    prefix = backbone.prefill(observation)
    tokens = ActionTokenizer([-1.0] * A, [1.0] * A, 4, 5)
    with pytest.raises(ConfigError, match=r"deadline_s is 0\.1, but token-by-token"):
        decode_block(backbone, prefix, tokens, "ar", deadline_s=0.1)
