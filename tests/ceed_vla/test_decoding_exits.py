"""Exit rules against a slow reference without a cache, and the promise of each rule."""

from __future__ import annotations

import pytest
import torch
from decoders import greedy, jacobi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ceed_vla.decoding import DecodingConfig, named_config
from ceed_vla.decoding.exits import Gap
from ceed_vla.decoding.measures import mass_near

A = 7


def reference(backbone, observation, guess: Tensor, config: DecodingConfig, executed: int | None):
    """The loop of the method row by row: full recomputation, no commits, exit rules implemented
    again.
    """
    n = guess.shape[1]
    must = n if executed is None else executed * A
    out = []
    for row in range(guess.shape[0]):
        one = {"prefix": observation["prefix"][row : row + 1]}
        first = backbone.full_logits(one, guess[:1, :0])[:, -1]
        state = torch.cat([first.argmax(-1, keepdim=True), guess[row : row + 1, 1:]], dim=1)
        answer = uncached(backbone, one, n)
        iterations = 0
        while True:
            logits = backbone.full_logits(one, state[:, : n - 1])
            new = logits.argmax(-1)
            fresh = iterations == 0 or config.tail == "fresh"
            if not fresh:
                new[:, must:] = state[:, must:]
            iterations += 1
            probabilities = logits[0, :must].softmax(-1)
            mass = min(
                float(probabilities[s, max(0, int(new[0, s]) - 2) : int(new[0, s]) + 3].sum())
                for s in range(must)
            )
            moved = (new != state)[0].nonzero().flatten().tolist()
            # A change of the last slot only leaves a fixed point, as no input changed.
            done_watched = all(s >= must - 1 for s in moved)
            done_all = all(s >= n - 1 for s in moved) and (fresh or must == n)
            state = new
            if done_all:
                reason = "converged"
            elif done_watched:
                reason = "stable"
            elif config.confidence is not None and mass > config.confidence:
                reason = "confidence"
            elif config.max_iterations == iterations:
                reason = "max_iterations"
            else:
                continue
            if reason in ("converged", "stable"):
                length = n if reason == "converged" else must
                assert torch.equal(state[:, :length], answer[:, :length])
            out.append((state[0].tolist(), iterations, reason))
            break
    return out


def uncached(backbone, observation, n: int) -> Tensor:
    tokens = torch.empty(1, 0, dtype=torch.int64)
    for _ in range(n):
        tokens = torch.cat(
            [tokens, backbone.full_logits(observation, tokens)[:, -1:].argmax(-1)], dim=1
        )
    return tokens


def random_guess(seed: int, batch: int, n: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (batch, n), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    steps=st.integers(1, 4),
    vocabulary=st.sampled_from([5, 31]),
    executed=st.sampled_from([None, 1, 2]),
    cap=st.sampled_from([None, 1, 2, 7]),
    confidence=st.sampled_from([None, 0.2, 0.5, 0.9]),
    tail=st.sampled_from(["kept", "fresh"]),
)
def test_equals_the_slow_reference(
    toy, seed, batch, steps, vocabulary, executed, cap, confidence, tail
) -> None:
    config = DecodingConfig(max_iterations=cap, confidence=confidence, tail=tail)
    executed = None if executed is None else min(executed, steps)
    backbone, observation = toy(seed, batch, steps * A, vocabulary)
    guess = random_guess(seed, batch, steps * A, vocabulary)
    prefix = backbone.prefill(observation)
    result = jacobi(backbone, prefix, guess, config, tokens_per_step=A, executed_steps=executed)
    got = list(
        zip(result.tokens.tolist(), result.iterations.tolist(), result.exit_reason, strict=True)
    )
    assert got == reference(backbone, observation, guess, config, executed)


LADDERS = {
    "max_iterations": [1, 2, 3, 5, 8, 60, None],
    "confidence": [0.01, 0.2, 0.5, 0.8, 0.99, 1.0, None],
    "executed_steps": [1, 2, 3, 4],
}


@pytest.mark.parametrize("field", LADDERS)
@pytest.mark.parametrize("base", [{}, {"confidence": 0.5}, {"max_iterations": 6}])
def test_stricter_thresholds_never_end_a_row_earlier(toy, field: str, base: dict) -> None:
    if field in base:
        base = {}
    for seed in range(6):
        backbone, observation = toy(seed, 4, 28, 31)
        guess = random_guess(seed, 4, 28, 31)
        prefix = backbone.prefill(observation)
        before = torch.zeros(4, dtype=torch.int64)
        for value in LADDERS[field]:
            rules = {
                name: v for name, v in {**base, field: value}.items() if name != "executed_steps"
            }
            steps = value if field == "executed_steps" else None
            result = jacobi(
                backbone,
                prefix,
                guess,
                DecodingConfig(**rules),
                tokens_per_step=A,
                executed_steps=steps,
            )
            assert (result.iterations >= before).all(), (field, value)
            before = result.iterations


def test_cap_of_one_is_one_forward_of_the_whole_block(toy) -> None:
    backbone, observation = toy(1, 2, 56, 255)
    backbone.calls.clear()
    guess = random_guess(0, 2, 56, 255)
    result = jacobi(
        backbone,
        backbone.prefill(observation),
        guess,
        DecodingConfig(max_iterations=1),
        tokens_per_step=A,
    )
    assert backbone.calls == [55]
    assert (result.forwards, result.iterations.tolist()) == (1, [1, 1])
    assert result.exit_reason == ["max_iterations"] * 2
    assert not result.exact.any()
    assert (result.exact_tokens >= 2).all()


def test_only_executed_steps_are_recomputed_and_the_tail_is_from_the_first_iteration(toy) -> None:
    backbone, observation = toy(2, 2, 56, 31)
    prefix = backbone.prefill(observation)
    answer = greedy(backbone, prefix).tokens
    guess = random_guess(3, 2, 56, 31)
    one = jacobi(backbone, prefix, guess, DecodingConfig(max_iterations=1), tokens_per_step=A)
    backbone.calls.clear()
    result = jacobi(backbone, prefix, guess, tokens_per_step=A, executed_steps=4)
    assert backbone.calls[0] == 55
    assert all(k <= 27 for k in backbone.calls[1:])
    assert torch.equal(result.tokens[:, :28], answer[:, :28])
    assert torch.equal(result.tokens[:, 28:], one.tokens[:, 28:])
    assert result.exit_reason == ["stable", "stable"]
    assert result.exact_tokens.tolist() == [28, 28]
    assert not result.exact.any()
    assert result.forwards <= 27


def test_executed_steps_still_report_a_block_that_is_proven_whole(toy) -> None:
    backbone, observation = toy(2, 2, 28, 31)
    prefix = backbone.prefill(observation)
    answer = greedy(backbone, prefix).tokens
    half = answer.clone()
    half[1, 20] = (half[1, 20] + 1) % 31
    result = jacobi(backbone, prefix, half, tokens_per_step=A, executed_steps=2)
    assert result.exit_reason == ["converged", "stable"]
    assert result.exact_tokens.tolist() == [28, 21]
    assert result.exact.tolist() == [True, False]
    assert result.forwards == 1


def test_mass_near_at_the_ends_of_the_vocabulary() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)) * 2
    tokens = torch.tensor([[0, 4, 8], [1, 7, 2]])
    p = logits.softmax(-1)
    expected = [
        [p[b, s, max(0, t - 2) : t + 3].sum() for s, t in enumerate(r)]
        for b, r in enumerate(tokens.tolist())
    ]
    torch.testing.assert_close(mass_near(logits, tokens), torch.tensor(expected))
    certain = torch.full((1, 1, 9), -1e4)
    certain[..., 3] = 1e4
    assert mass_near(certain, torch.tensor([[3]])).item() == 1.0


class FakeClock:
    """A clock that only moves when a forward takes time."""

    def __init__(self, backbone, seconds: list[float]) -> None:
        self.now, self.seconds, self.inner = 100.0, list(seconds), backbone.block_logits
        backbone.block_logits = self.run

    def run(self, prefix, tokens):
        self.now += self.seconds.pop(0)
        return self.inner(prefix, tokens)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("deadline", "durations", "forwards"),
    [
        (0.001, [1.0] * 40, 1),  # the first iteration always runs
        (3.5, [1.0] * 40, 3),
        (3.0, [1.0] * 40, 3),  # ending exactly at the deadline is in time
        (2.9, [1.0] * 40, 2),
        (9.0, [1.0, 1.0, 4.0, 1.0], 3),  # the last duration predicts the next
    ],
)
def test_deadline_is_anytime(toy, deadline: float, durations: list[float], forwards: int) -> None:
    backbone, observation = toy(4, 2, 28, 255)
    prefix = backbone.prefill(observation)
    clock = FakeClock(backbone, durations)
    result = jacobi(
        backbone,
        prefix,
        random_guess(0, 2, 28, 255),
        DecodingConfig(deadline_s=deadline),
        tokens_per_step=A,
        clock=clock,
    )
    assert result.forwards == forwards
    assert result.exit_reason == ["deadline"] * 2
    assert result.iterations.tolist() == [forwards] * 2
    assert clock() - 100.0 == pytest.approx(sum(durations[:forwards]))


def test_a_distant_deadline_changes_nothing(toy) -> None:
    backbone, observation = toy(4, 2, 28, 255)
    prefix, guess = backbone.prefill(observation), random_guess(0, 2, 28, 255)
    strict = jacobi(backbone, prefix, guess, tokens_per_step=A)
    late = jacobi(backbone, prefix, guess, DecodingConfig(deadline_s=1e6), tokens_per_step=A)
    assert torch.equal(strict.tokens, late.tokens)
    assert late.exit_reason == ["converged"] * 2


@pytest.mark.parametrize(
    ("name", "ends"),
    [("agree3", lambda d: d.max() <= 3), ("changed5", lambda d: (d > 0).sum() <= 5)],
)
def test_rules_that_compare_states_end_where_the_trajectory_says(toy, name: str, ends) -> None:
    early = 0
    for seed in range(12):
        backbone, observation = toy(seed, 1, 28, 9)
        guess, prefix = random_guess(seed, 1, 28, 9), backbone.prefill(observation)
        strict = jacobi(backbone, prefix, guess, DecodingConfig(), record_states=True)
        states = torch.cat(strict.states)  # (k + 1, n)
        moved = (states[1:] - states[:-1]).abs()
        expected = next((j for j, d in enumerate(moved, 1) if ends(d)), strict.forwards)
        result = jacobi(backbone, prefix, guess, DecodingConfig(exits=(name,)))
        assert result.forwards == min(expected, strict.forwards)
        early += result.exit_reason[0] in ("agreement", "few_changes")
    assert early > 3


def test_gap_is_what_the_best_token_leads_by() -> None:
    logits = torch.randn(2, 5, 31, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1).sort(descending=True).values
    gap = Gap("0.1")
    measured = gap.measure(logits, logits.argmax(-1))
    assert torch.allclose(measured, probabilities[..., 0] - probabilities[..., 1], atol=1e-6)
    lead = measured.min(1).values
    assert gap.ends(None, measured.numpy()).tolist() == (lead > 0.1).tolist()  # type: ignore[arg-type]


def test_a_deadline_has_a_name() -> None:
    config = named_config("conf0.2_deadline12.5")
    assert (config.deadline_s, config.confidence) == (0.0125, 0.2)
