"""Early exits against a slow reference that commits nothing, and what each rule promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ceed_vla.decoding import DecodingConfig, decode_autoregressive, decode_jacobi
from ceed_vla.decoding.exits import ExitRules, Rows, window_mass
from ceed_vla.errors import ConfigError

A = 7


def reference(backbone, observation, guess: Tensor, config: DecodingConfig, gripper: int | None = None):
    """Row by row from method.md's loop: full recomputation, nothing committed, rules written out again."""
    n = guess.shape[1]
    must = n if config.executed_steps is None else config.executed_steps * A
    out = []
    for row in range(guess.shape[0]):
        one = {"prefix": observation["prefix"][row : row + 1]}
        first = backbone.full_logits(one, guess[:1, :0])[:, -1]
        state = torch.cat([first.argmax(-1, keepdim=True), guess[row : row + 1, 1:]], dim=1)
        answer = uncached(backbone, one, n)
        calm_run, iterations = 0, 0
        while True:
            logits = backbone.full_logits(one, state[:, : n - 1])
            new = logits.argmax(-1)
            if iterations:
                new[:, must:] = state[:, must:]
            iterations += 1
            calm = True
            for slot in range(must):
                allowed = config.tolerance_bins if slot % A != gripper else 0
                calm &= abs(int(new[0, slot]) - int(state[0, slot])) <= allowed
            calm_run = calm_run + 1 if calm else 0
            probabilities = logits[0, :must].softmax(-1)
            mass = min(
                float(probabilities[s, max(0, int(new[0, s]) - 2) : int(new[0, s]) + 3].sum())
                for s in range(must)
            )
            moved = (new != state)[0].nonzero().flatten().tolist()
            # A change of the last slot is the last there can be: what it depends on did not change.
            done_watched = all(s >= must - 1 for s in moved)
            done_all = all(s >= n - 1 for s in moved) and (iterations == 1 or must == n)
            state = new
            if done_all:
                reason = "converged"
            elif done_watched:
                reason = "stable"
            elif calm_run >= (config.stable_iterations or 1):
                reason = "tolerance"
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
        tokens = torch.cat([tokens, backbone.full_logits(observation, tokens)[:, -1:].argmax(-1)], dim=1)
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
    tolerance=st.sampled_from([0, 1, 3, 8]),
    stable=st.sampled_from([None, 2]),
    confidence=st.sampled_from([None, 0.2, 0.5, 0.9]),
    gripper=st.sampled_from([None, 6]),
)
def test_equals_the_slow_reference(
    toy, seed, batch, steps, vocabulary, executed, cap, tolerance, stable, confidence, gripper
) -> None:
    config = DecodingConfig(
        max_iterations=cap,
        tolerance_bins=tolerance,
        stable_iterations=stable,
        confidence=confidence,
        executed_steps=None if executed is None else min(executed, steps),
    )
    backbone, observation = toy(seed, batch, steps * A, vocabulary)
    guess = random_guess(seed, batch, steps * A, vocabulary)
    grippers = () if gripper is None else (gripper,)
    result = decode_jacobi(
        backbone, backbone.prefill(observation), guess, config, action_dim=A, gripper_dims=grippers
    )
    got = list(zip(result.tokens.tolist(), result.iterations.tolist(), result.exit_reason, strict=True))
    assert got == reference(backbone, observation, guess, config, gripper)


LADDERS = {
    "max_iterations": [1, 2, 3, 5, 8, 60, None],
    "tolerance_bins": [30, 8, 4, 2, 1, 0],
    "stable_iterations": [None, 2, 3, 5],
    "confidence": [0.01, 0.2, 0.5, 0.8, 0.99, 1.0, None],
    "executed_steps": [1, 2, 3, 4],
}


@pytest.mark.parametrize("field", LADDERS)
@pytest.mark.parametrize("base", [{}, {"tolerance_bins": 4}, {"confidence": 0.5}, {"max_iterations": 6}])
def test_stricter_thresholds_never_end_a_row_earlier(toy, field: str, base: dict) -> None:
    if field in base:
        base = {}
    if field == "stable_iterations":
        base = {**base, "tolerance_bins": 4}
    for seed in range(6):
        backbone, observation = toy(seed, 4, 28, 31)
        guess = random_guess(seed, 4, 28, 31)
        prefix = backbone.prefill(observation)
        before = torch.zeros(4, dtype=torch.int64)
        for value in LADDERS[field]:
            config = DecodingConfig(**{**base, field: value})
            result = decode_jacobi(backbone, prefix, guess, config, action_dim=A)
            assert (result.iterations >= before).all(), (field, value)
            before = result.iterations


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    events=st.lists(
        st.tuples(st.integers(1, 28), st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=20
    ),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
    caps=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    quiet=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_rules_are_monotone_for_any_history(events, low, high, caps, quiet) -> None:
    def first_exit(confidence: float, cap: int, needed: int) -> int:
        rules = ExitRules(28, 14, np.zeros(14), needed, confidence, cap)
        for i, event in enumerate(events, start=1):
            if rules.reason(i, *event):
                return i
        return len(events) + 1

    assert first_exit(max(low, high), max(caps), max(quiet)) >= first_exit(
        min(low, high), min(caps), min(quiet)
    )


def test_cap_of_one_is_one_forward_of_the_whole_block(toy) -> None:
    backbone, observation = toy(1, 2, 56, 255)
    backbone.calls.clear()
    guess = random_guess(0, 2, 56, 255)
    result = decode_jacobi(
        backbone, backbone.prefill(observation), guess, DecodingConfig(max_iterations=1), action_dim=A
    )
    assert backbone.calls == [55]
    assert (result.forwards, result.iterations.tolist()) == (1, [1, 1])
    assert result.exit_reason == ["max_iterations"] * 2
    assert not result.exact.any()
    assert (result.exact_tokens >= 2).all()


def test_only_executed_steps_are_recomputed_and_the_tail_is_from_the_first_iteration(toy) -> None:
    backbone, observation = toy(2, 2, 56, 31)
    prefix = backbone.prefill(observation)
    answer = decode_autoregressive(backbone, prefix, DecodingConfig(method="ar")).tokens
    guess = random_guess(3, 2, 56, 31)
    one = decode_jacobi(backbone, prefix, guess, DecodingConfig(max_iterations=1), action_dim=A)
    backbone.calls.clear()
    result = decode_jacobi(backbone, prefix, guess, DecodingConfig(executed_steps=4), action_dim=A)
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
    answer = decode_autoregressive(backbone, prefix, DecodingConfig(method="ar")).tokens
    half = answer.clone()
    half[1, 20] = (half[1, 20] + 1) % 31
    result = decode_jacobi(backbone, prefix, half, DecodingConfig(executed_steps=2), action_dim=A)
    assert result.exit_reason == ["converged", "stable"]
    assert result.exact_tokens.tolist() == [28, 21]
    assert result.exact.tolist() == [True, False]
    assert result.forwards == 1


def test_gripper_is_never_relaxed_and_tolerances_are_per_dimension(toy) -> None:
    rules = ExitRules.of(DecodingConfig(tolerance_bins=3, executed_steps=2), 28, A, gripper_dims=(6,))
    assert rules.tolerance.tolist() == [3, 3, 3, 3, 3, 3, 0] * 2
    rules = ExitRules.of(DecodingConfig(tolerance_bins=(1, 2, 3, 4, 5, 6, 0)), 14, A, gripper_dims=(6,))
    assert rules.tolerance.tolist() == [1, 2, 3, 4, 5, 6, 0] * 2
    with pytest.raises(ConfigError, match=r"gripper dimensions \[6\]"):
        ExitRules.of(DecodingConfig(tolerance_bins=(1,) * A), 14, A, gripper_dims=(6,))
    with pytest.raises(ConfigError, match="3 entries; an action has 7"):
        ExitRules.of(DecodingConfig(tolerance_bins=(1, 2, 3)), 14, A)


def test_quiet_iterations_must_be_in_a_row() -> None:
    config = DecodingConfig(tolerance_bins=2, stable_iterations=2)
    rows = Rows(ExitRules.of(config, 6, 3, gripper_dims=(2,)), batch=1)
    state = np.full((1, 6), 9)
    moves = [
        (1, 2),
        (1, 3),
        (3, -2),
        (1, 9),
        (1, 1),
        (1, -2),
    ]  # (slot, bins): quiet, loud, quiet, loud, quiet, quiet
    for iteration, (slot, bins) in enumerate(moves, start=1):
        assert rows.any_running, iteration
        new = state.copy()
        new[0, slot] += bins
        rows.update(iteration, state[:, 1:], new[:, 1:], 1, None)
        state = new
    assert (rows.reasons, rows.iterations.tolist(), rows.exact.tolist()) == (["tolerance"], [6], [2])
    gripper = Rows(ExitRules.of(config, 6, 3, gripper_dims=(2,)), batch=1)
    for iteration in range(1, 5):
        gripper.update(iteration, np.zeros((1, 5), int), np.array([[0, 1, 0, 0, 0]]), 1, None)  # slot 2: loud
    assert gripper.any_running


def test_window_mass_at_the_ends_of_the_vocabulary() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)) * 2
    tokens = torch.tensor([[0, 4, 8], [1, 7, 2]])
    p = logits.softmax(-1)
    expected = [
        [p[b, s, max(0, t - 2) : t + 3].sum() for s, t in enumerate(r)] for b, r in enumerate(tokens.tolist())
    ]
    torch.testing.assert_close(window_mass(logits, tokens), torch.tensor(expected))
    certain = torch.full((1, 1, 9), -1e4)
    certain[..., 3] = 1e4
    assert window_mass(certain, torch.tensor([[3]])).item() == 1.0


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
        (3.0, [1.0] * 40, 3),  # exactly on time is on time
        (2.9, [1.0] * 40, 2),
        (9.0, [1.0, 1.0, 4.0, 1.0], 3),  # the last duration predicts the next
    ],
)
def test_deadline_is_anytime(toy, deadline: float, durations: list[float], forwards: int) -> None:
    backbone, observation = toy(4, 2, 28, 255)
    prefix = backbone.prefill(observation)
    clock = FakeClock(backbone, durations)
    result = decode_jacobi(
        backbone,
        prefix,
        random_guess(0, 2, 28, 255),
        DecodingConfig(deadline_s=deadline),
        action_dim=A,
        clock=clock,
    )
    assert result.forwards == forwards
    assert result.exit_reason == ["deadline"] * 2
    assert result.iterations.tolist() == [forwards] * 2
    assert result.seconds["decode"] == pytest.approx(sum(durations[:forwards]))


def test_a_distant_deadline_changes_nothing(toy) -> None:
    backbone, observation = toy(4, 2, 28, 255)
    prefix, guess = backbone.prefill(observation), random_guess(0, 2, 28, 255)
    strict = decode_jacobi(backbone, prefix, guess, DecodingConfig(), action_dim=A)
    late = decode_jacobi(backbone, prefix, guess, DecodingConfig(deadline_s=1e6), action_dim=A)
    assert torch.equal(strict.tokens, late.tokens)
    assert late.exit_reason == ["converged"] * 2
