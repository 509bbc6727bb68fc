"""Stop tokens and windows: blocks of variable length end where the stop token is proven, and stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ceed_vla.decoding import DecodingConfig, decode_autoregressive, decode_jacobi
from ceed_vla.errors import ConfigError

AR = DecodingConfig(method="ar")


def cut(tokens: Tensor, stop: int) -> Tensor:
    """`tokens` with every slot behind a row's first stop token filled with it, by plain loops."""
    rows = []
    for row in tokens.tolist():
        end = row.index(stop) if stop in row else len(row)
        rows.append(row[:end] + [stop] * (len(row) - end))
    return torch.tensor(rows)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 4),
    n=st.integers(1, 24),
    vocabulary=st.sampled_from([2, 3, 17]),
    window=st.one_of(st.none(), st.integers(1, 30)),
)
def test_jacobi_with_stop_and_window_is_greedy_cut_at_the_stop(
    toy: Any, seed: int, batch: int, n: int, vocabulary: int, window: int | None
) -> None:
    backbone, observation = toy(seed, batch, n, vocabulary)
    prefix = backbone.prefill(observation)
    whole = decode_autoregressive(backbone, prefix, AR)
    stop = seed % vocabulary
    answer = cut(whole.tokens, stop)
    ends = [row.index(stop) if stop in row else n - 1 for row in answer.tolist()]
    ar = decode_autoregressive(backbone, prefix, AR, stop=stop)
    assert torch.equal(ar.tokens, answer)
    assert (ar.forwards, ar.iterations.tolist()) == (max(ends), ends)
    assert ar.exit_reason == ["stop" if stop in row else "complete" for row in answer.tolist()]

    guess = torch.randint(vocabulary, (batch, n), generator=torch.Generator().manual_seed(seed))
    config = DecodingConfig(window=window)
    result = decode_jacobi(backbone, prefix, guess, config, action_dim=1, stop=stop, record_states=True)
    assert torch.equal(result.tokens, answer)
    assert result.exact.all()
    assert result.exit_reason == ["stop" if stop in row else "converged" for row in answer.tolist()]
    assert result.forwards == result.iterations.max()
    assert result.states is not None
    assert torch.equal(result.states[-1], answer)
    assert max(backbone.calls[-result.forwards :], default=0) <= (window or n) or not result.forwards


@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_a_window_computes_less_and_changes_nothing(toy: Any, window: int) -> None:
    backbone, observation = toy(5, 3, 20, 17)
    prefix = backbone.prefill(observation)
    answer = decode_autoregressive(backbone, prefix, AR).tokens
    backbone.calls.clear()
    guess = torch.zeros(3, 20, dtype=torch.int64)
    result = decode_jacobi(backbone, prefix, guess, DecodingConfig(window=window), action_dim=1)
    assert torch.equal(result.tokens, answer)
    assert result.exit_reason == ["converged"] * 3
    assert max(backbone.calls) == min(window, 19)
    known = decode_jacobi(backbone, prefix, answer, DecodingConfig(window=window), action_dim=1)
    assert known.forwards == -(-19 // window)  # a window of right tokens is proven in one forward
    some = DecodingConfig(window=window, executed_steps=6, tolerance_bins=16)
    early = decode_jacobi(backbone, prefix, guess, some, action_dim=1)
    assert set(early.exit_reason) <= {"stable", "tolerance"}
    proven = max(
        6 - window, 1
    )  # a tolerance relaxes only what one forward has seen up to the last watched slot
    assert torch.equal(early.tokens[:, :proven], answer[:, :proven])


def test_rules_that_need_bins_or_steps_are_refused(toy: Any) -> None:
    backbone, observation = toy(1, 2, 6, 5)
    prefix = backbone.prefill(observation)
    guess = torch.zeros(2, 6, dtype=torch.int64)
    for config in (DecodingConfig(tolerance_bins=(1,)), DecodingConfig(confidence=0.9)):
        with pytest.raises(ConfigError, match="neither bins nor steps"):
            decode_jacobi(backbone, prefix, guess, config, action_dim=1, stop=0)
    with pytest.raises(ConfigError, match="neither bins nor steps"):
        decode_autoregressive(backbone, prefix, AR, frozen=guess[:, :2], stop=0)
    with pytest.raises(ConfigError, match="window is 0"):
        DecodingConfig(window=0)
    with pytest.raises(ConfigError, match="set only one"):
        DecodingConfig(window=4, confidence=0.9)
