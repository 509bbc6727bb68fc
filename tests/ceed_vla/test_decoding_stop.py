"""Stop tokens and windows: blocks of variable length end when the stop token is proven, and are
exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import greedy, jacobi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError


def cut(tokens: Tensor, stop: int) -> Tensor:
    """`tokens`, filled with the stop token behind a row's first stop token, by plain loops."""
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
    whole = greedy(backbone, prefix)
    stop = seed % vocabulary
    answer = cut(whole.tokens, stop)
    ends = [row.index(stop) if stop in row else n - 1 for row in answer.tolist()]
    ar = greedy(backbone, prefix, stop=stop)
    assert torch.equal(ar.tokens, answer)
    assert (ar.forwards, ar.iterations.tolist()) == (max(ends), ends)
    assert ar.exit_reason == ["stop" if stop in row else "complete" for row in answer.tolist()]

    guess = torch.randint(vocabulary, (batch, n), generator=torch.Generator().manual_seed(seed))
    config = DecodingConfig(window=window)
    result = jacobi(
        backbone, prefix, guess, config, tokens_per_step=1, stop=stop, record_states=True
    )
    assert torch.equal(result.tokens, answer)
    assert result.exact.all()
    assert result.exit_reason == ["stop" if stop in row else "converged" for row in answer.tolist()]
    assert result.forwards == result.iterations.max()
    assert result.states is not None
    assert torch.equal(result.states[-1], answer)
    assert (
        max(backbone.calls[-result.forwards :], default=0) <= (window or n) or not result.forwards
    )


@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_a_window_computes_less_and_changes_nothing(toy: Any, window: int) -> None:
    backbone, observation = toy(5, 3, 20, 17)
    prefix = backbone.prefill(observation)
    answer = greedy(backbone, prefix).tokens
    backbone.calls.clear()
    guess = torch.zeros(3, 20, dtype=torch.int64)
    result = jacobi(backbone, prefix, guess, DecodingConfig(window=window), tokens_per_step=1)
    assert torch.equal(result.tokens, answer)
    assert result.exit_reason == ["converged"] * 3
    assert max(backbone.calls) == min(window, 19)
    known = jacobi(backbone, prefix, answer, DecodingConfig(window=window), tokens_per_step=1)
    assert known.forwards == -(-19 // window)  # one forward proves a window of right tokens
    early = jacobi(
        backbone, prefix, guess, DecodingConfig(window=window), tokens_per_step=1, executed_steps=6
    )
    assert set(early.exit_reason) == {"stable"}
    assert torch.equal(early.tokens[:, :6], answer[:, :6])


def test_rules_that_need_bins_or_steps_are_refused(toy: Any) -> None:
    backbone, observation = toy(1, 2, 6, 5)
    prefix = backbone.prefill(observation)
    guess = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ConfigError, match="do not stand for neighbouring actions"):
        jacobi(backbone, prefix, guess, DecodingConfig(confidence=0.9), stop=0)
    with pytest.raises(ConfigError, match="do not belong to steps"):
        greedy(backbone, prefix, guess=guess, frozen_steps=1, stop=0, tokens_per_step=None)
    with pytest.raises(ConfigError, match="window is 0"):
        DecodingConfig(window=0)
    with pytest.raises(ConfigError, match="set either the window"):
        DecodingConfig(window=4, confidence=0.9)
