"""Strict Jacobi decoding is greedy autoregressive decoding, by four independent routes, in
float32.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from decoders import STRICT, greedy, jacobi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ceed_vla.axes import AXES
from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.config import PolicyShape
from ceed_vla.decoding import DecodingConfig
from ceed_vla.tokens.uniform import ActionTokenizer, UniformTokensConfig


def uncached_toy(backbone, observation, n: int) -> Tensor:
    """Greedy tokens (B, n) with everything recomputed for every token."""
    tokens = torch.empty(observation["prefix"].shape[0], 0, dtype=torch.int64)
    for _ in range(n):
        logits = backbone.full_logits(observation, tokens)[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


def uncached_llama(backbone, observation, n: int) -> Tensor:
    ids = observation["prefix_ids"]
    for _ in range(n):
        scores = backbone.model(ids, use_cache=False).logits[:, -1, backbone.action_ids]
        ids = torch.cat([ids, backbone.action_ids[scores.argmax(-1, keepdim=True)]], dim=1)
    return ids[:, -n:] - backbone.action_ids[0]


def every_guess(
    batch: int, n: int, dim: int, vocabulary: int, seed: int, answer: Tensor
) -> dict[str, Tensor]:
    """All kinds of initial guesses, from unrelated tokens to the answer itself."""
    generator = torch.Generator().manual_seed(seed)
    tokens = ActionTokenizer([-1.0] * dim, [2.0] * dim, n // dim, num_bins=vocabulary)
    previous = torch.randint(vocabulary, (batch, n), generator=generator)
    fresh_row = previous.clone()
    fresh_row[0] = -1
    almost = answer.clone()
    almost[:, n // 2] = (almost[:, n // 2] + 1) % vocabulary
    shift = n // dim // 2
    return {
        "random": tokens.guess("random", batch, generator=generator),
        "mid": tokens.guess("mid", batch),
        "previous": tokens.guess("previous", batch, previous, shift),
        "previous, new episode in row 0": tokens.guess("previous", batch, fresh_row, shift),
        "nothing before": tokens.guess("previous", batch, None, shift),
        "answer": answer,
        "one wrong": almost,
    }


def assert_strict(backbone, prefix, answer: Tensor, dim: int, seed: int, vocabulary: int) -> None:
    batch, n = answer.shape
    for name, guess in every_guess(batch, n, dim, vocabulary, seed, answer).items():
        result = jacobi(backbone, prefix, guess, tokens_per_step=dim)
        assert torch.equal(result.tokens, answer), name
        assert result.exact.all()
        assert result.exact_tokens.tolist() == [n] * batch
        assert result.exit_reason == ["converged"] * batch
        assert result.forwards == result.iterations.max() <= n
    if n > 1:
        verified = jacobi(backbone, prefix, answer, tokens_per_step=dim)
        assert verified.iterations.tolist() == [1] * batch


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 4),
    dim=st.integers(1, 8),
    steps=st.integers(1, 8),
    vocabulary=st.sampled_from([2, 3, 17, 255]),
)
def test_toy_jacobi_is_cached_and_uncached_ar(toy, seed, batch, dim, steps, vocabulary) -> None:
    n = dim * steps
    backbone, observation = toy(seed, batch, n, vocabulary)
    prefix = backbone.prefill(observation)
    ar = greedy(backbone, prefix)
    assert torch.equal(ar.tokens, uncached_toy(backbone, observation, n))
    assert ar.forwards == n - 1
    assert ar.exact.all()
    assert ar.exit_reason == ["complete"] * batch
    assert_strict(backbone, prefix, ar.tokens, dim, seed, vocabulary)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 4),
    layout=st.sampled_from([(1, 1), (7, 1), (7, 3), (5, 5), (7, 8), (8, 8)]),
    vocabulary=st.sampled_from([2, 31, 255, 256]),
)
def test_llama_jacobi_is_cached_ar_uncached_ar_and_generate(
    llama, generate, seed, batch, layout, vocabulary
) -> None:
    dim, steps = layout
    n = dim * steps
    backbone, observation = llama(seed, batch, n, vocabulary)
    with torch.inference_mode():
        prefix = backbone.prefill(observation)
        ar = greedy(backbone, prefix)
        assert torch.equal(ar.tokens, generate(backbone, observation))
        assert torch.equal(ar.tokens, uncached_llama(backbone, observation, n))
        assert_strict(backbone, prefix, ar.tokens, dim, seed, vocabulary)


@pytest.mark.parametrize("batch", [1, 3])
def test_compact_backbone_jacobi_is_ar_and_teacher_forcing(
    batch: int, depth_is_a_shorter_model
) -> None:
    torch.manual_seed(batch)
    sizes = CompactConfig(
        image_size=32, stem_channels=[8] * 4, width=32, layers=3, heads=2, mlp_width=48
    )
    tokens = UniformTokensConfig(action_low=[-1.0] * 7, action_high=[1.0] * 7)
    shape = PolicyShape({"observation.images.front": (3, 32, 32)}, 5, 7, 3, tokens)
    backbone = sizes.build(shape).eval()
    # wide enough for every token to depend on those before it
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    observation = {
        "observation.images.front": torch.rand(batch, 3, 32, 32),
        "observation.state": torch.randn(batch, 5),
        "observation.language.tokens": torch.randint(1, 256, (batch, 12)),
    }
    with torch.no_grad():
        prefix = backbone.prefill(observation)
        ar = greedy(backbone, prefix).tokens
        _, (forced,) = backbone.packed_logits(backbone.embed_prefix(observation), [ar])
        assert torch.equal(forced.argmax(-1), ar)
        assert_strict(backbone, prefix, ar, 7, 0, 255)
    depth_is_a_shorter_model(backbone, observation)
    if "depth" in AXES:
        from exits_contract import exits_leave_the_base_alone

        exits_leave_the_base_alone(backbone, observation)


def test_a_llama_trains_and_is_cut_short(llama, keeps_the_contract) -> None:
    keeps_the_contract(*llama(7, 3, 14, 31))


def test_models_are_not_trivial(toy, llama) -> None:
    """Exactness would also hold for a constant answer; the tokens of these models depend on their
    inputs.
    """
    for make in (toy, llama):
        backbone, observation = make(3, 4, 56, 255)
        with torch.inference_mode():
            prefix = backbone.prefill(observation)
            answer = greedy(backbone, prefix).tokens
            other = jacobi(
                backbone,
                prefix,
                (answer + 1) % 255,
                DecodingConfig(max_iterations=1),
                tokens_per_step=7,
            )
            strict = jacobi(backbone, prefix, (answer + 1) % 255, tokens_per_step=7)
        assert len(answer.unique()) > 20
        assert (other.tokens != answer).float().mean() > 0.5
        assert strict.forwards > 10


@pytest.mark.parametrize("kind", ["toy", "llama"])
def test_roll_back_equals_a_fresh_prefill(kind: str, request: pytest.FixtureRequest) -> None:
    backbone, observation = request.getfixturevalue(kind)(11, 2, 14, 31)
    tokens = torch.randint(31, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        used = backbone.prefill(observation)
        jacobi(backbone, used, tokens, DecodingConfig(max_iterations=3), tokens_per_step=7)
        greedy(backbone, used)
        used.cache.roll_back()
        fresh = backbone.prefill(observation)
        assert used.cache.length == fresh.cache.length == fresh.cache.prefix_length
        assert torch.equal(
            backbone.block_logits(used, tokens), backbone.block_logits(fresh, tokens)
        )


@pytest.mark.parametrize("kind", ["toy", "llama"])
def test_committed_tokens_need_no_recomputation(kind: str, request: pytest.FixtureRequest) -> None:
    backbone, observation = request.getfixturevalue(kind)(12, 3, 14, 31)
    tokens = torch.randint(31, (3, 14), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        prefix = backbone.prefill(observation)
        whole = backbone.block_logits(prefix, tokens)
        for cut in (1, 7, 13):
            prefix.cache.roll_back()
            backbone.block_logits(prefix, tokens)
            prefix.cache.commit(cut)
            torch.testing.assert_close(
                backbone.block_logits(prefix, tokens[:, cut:]), whole[:, cut:]
            )


def test_batch_rows_do_not_influence_each_other(toy) -> None:
    backbone, observation = toy(5, 4, 28, 17)
    guess = torch.randint(17, (4, 28), generator=torch.Generator().manual_seed(1))
    for config in (
        STRICT,
        DecodingConfig(confidence=0.5),
        DecodingConfig(watch="executed", max_iterations=6),
    ):
        request = {
            "tokens_per_step": 7,
            "executed_steps": 2 if config.watch == "executed" else None,
        }
        together = jacobi(backbone, backbone.prefill(observation), guess, config, **request)
        for row in range(4):
            prefix = backbone.prefill({"prefix": observation["prefix"][row : row + 1]})
            alone = jacobi(backbone, prefix, guess[row : row + 1], config, **request)
            assert torch.equal(alone.tokens[0], together.tokens[row])
            assert alone.iterations[0] == together.iterations[row]
            assert alone.exit_reason[0] == together.exit_reason[row]
            assert alone.exact_tokens[0] == together.exact_tokens[row]


def test_exact_tokens_are_exact_under_every_early_exit(toy) -> None:
    caps, confidences, steps = (1, 2, 5, None), (None, 0.5), (None, 1, 3)
    for seed, (cap, confidence, executed) in enumerate(itertools.product(caps, confidences, steps)):
        backbone, observation = toy(seed, 3, 35, 17)
        prefix = backbone.prefill(observation)
        answer = greedy(backbone, prefix).tokens
        guess = torch.randint(17, (3, 35), generator=torch.Generator().manual_seed(seed))
        config = DecodingConfig(max_iterations=cap, confidence=confidence)
        result = jacobi(backbone, prefix, guess, config, tokens_per_step=7, executed_steps=executed)
        for row in range(3):
            proven = int(result.exact_tokens[row])
            assert proven >= 1 + int(result.iterations[row])
            assert torch.equal(result.tokens[row, :proven], answer[row, :proven])
            assert bool(result.exact[row]) == (proven == 35)
