"""Forwards without host synchronization in between: the tokens of the cap, proven tokens, one
synchronization.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import greedy, jacobi
from hypothesis import given, settings
from hypothesis import strategies as st

from ceed_vla import load
from ceed_vla.axes.launch_ahead import decoder as loop
from ceed_vla.axes.launch_ahead.decoder import decode_loop
from ceed_vla.compiled.engine import compiled
from ceed_vla.decoding import BlockRequest, DecodingConfig
from ceed_vla.errors import ConfigError, NotFiniteError, TokenError


def request(guess: torch.Tensor | None, count: int, **more: Any) -> BlockRequest:
    more.setdefault("config", DecodingConfig(method=f"loop{count}"))
    return BlockRequest(guess=guess, **more)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    steps=st.integers(1, 4),
    dim=st.integers(1, 4),
    count=st.integers(1, 20),
    frozen=st.integers(0, 2),
    executed=st.integers(1, 4),
)
def test_it_is_the_cap_and_proves_as_much(
    toy: Any, seed, batch, steps, dim, count, frozen, executed
) -> None:
    n, vocabulary = steps * dim, 31
    backbone, observation = toy(seed, batch, n, vocabulary)
    guess = torch.randint(vocabulary, (batch, n), generator=torch.Generator().manual_seed(seed))
    prefix = backbone.prefill(observation)
    frozen = min(frozen, steps - 1)
    k = frozen * dim
    more = {
        "tokens_per_step": dim,
        "executed_steps": min(executed, steps),
        "frozen_steps": frozen,
    }
    config = DecodingConfig(watch="executed", max_iterations=count)
    expected = jacobi(backbone, prefix, guess, config, **more)
    asked = request(
        guess, count, config=DecodingConfig(method=f"loop{count}", watch="executed"), **more
    )
    found = decode_loop(backbone, prefix, asked)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.exact_tokens, expected.exact_tokens)
    assert torch.equal(found.exact, expected.exact)
    watched = asked.watched_tokens(n, k)
    assert found.forwards == (0 if n <= max(k, 1) else 1 if watched <= max(k, 1) else count)
    for row, reason in enumerate(found.exit_reason):
        proven = int(found.exact_tokens[row])
        assert reason == (
            "converged" if proven == n else "stable" if proven >= watched else "max_iterations"
        )
    right = greedy(backbone, prefix, guess=guess, tokens_per_step=dim, frozen_steps=frozen).tokens
    for row in range(batch):
        proven = int(found.exact_tokens[row])
        assert torch.equal(found.tokens[row, :proven], right[row, :proven])
    if count >= n:
        assert (found.exact_tokens >= watched).all()


@pytest.fixture
def student() -> tuple[Any, Any, Any]:
    return load("student")


def test_the_host_waits_once(
    monkeypatch: pytest.MonkeyPatch, student: Any, batch: dict[str, Any]
) -> None:
    policy, waits = student[0], []
    monkeypatch.setattr(
        loop, "to_host", lambda *parts: waits.append(parts) or [part.numpy() for part in parts]
    )
    for compile_it in (False, True):
        if compile_it:
            policy.backbone = compiled(policy.backbone, backend="eager")
        usual = policy.decode(batch, "cap3")
        assert torch.equal(policy.decode(batch, "loop3_h").tokens[:, :28], usual.tokens[:, :28])
    assert len(waits) == 2
    assert not policy.decoding_config("loop3_h").strict


def test_what_it_cannot_decode(toy: Any) -> None:
    backbone, observation = toy(0, 2, 6, 31)
    prefix, guess = backbone.prefill(observation), torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(TokenError, match="guess"):
        decode_loop(backbone, prefix, request(None, 2))
    for more in (
        {"config": DecodingConfig(method="loop2", max_iterations=1)},
        {"stop": 3},
        {"record_states": True},
    ):
        with pytest.raises(ConfigError, match="loop"):
            decode_loop(backbone, prefix, request(guess, 2, **more))
    prefix.logits[1] = torch.nan
    with pytest.raises(NotFiniteError, match="row 1"):
        decode_loop(backbone, prefix, request(guess, 2))
