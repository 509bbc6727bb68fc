"""Decoding of the policy behind frozen steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ceed_vla import CeedVLAPolicy
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError, TokenError

A = 7


def test_frozen_steps_stay_and_every_decoder_continues_them(
    policy: CeedVLAPolicy, batch: Any
) -> None:
    free = policy.decode(batch, "ar").tokens
    before = (free + 9) % policy.tokenizer.vocabulary_size
    frozen = before[:, A : 2 * A]
    behind = {"previous": before, "shift_steps": 1, "frozen_steps": 1}
    ar = policy.decode(batch, "ar", **behind)
    jacobi = policy.decode(batch, "jacobi", **behind)
    assert torch.equal(ar.tokens[:, :A], frozen)
    assert torch.equal(ar.tokens, jacobi.tokens)
    assert not torch.equal(ar.tokens[:, A:], free[:, A:])
    assert ar.actions is not None
    assert torch.equal(ar.actions[:, :1], policy.tokenizer.decode(ar.tokens)[:, :1])
    ceed = policy.decode(batch, "ceed", **behind)
    assert torch.equal(ceed.tokens[:, :A], frozen)


def test_the_former_argument_names_its_successor(policy: CeedVLAPolicy, batch: Any) -> None:
    tokens = torch.zeros(2, A, dtype=torch.int64)
    with pytest.raises(ConfigError, match="number of frozen steps as frozen_steps"):
        policy.decode(batch, "ar", frozen=tokens)  # type: ignore[arg-type]


def test_shift_steps_replaces_the_checkpoints_own(policy: CeedVLAPolicy, batch: Any) -> None:
    previous = torch.arange(28).repeat(2, 1)

    def first_state(shift: int | None) -> torch.Tensor:
        result = policy.decode(
            batch, "jacobi", previous=previous, shift_steps=shift, record_states=True
        )
        assert result.states is not None
        return result.states[0][:, 1:]

    assert torch.equal(first_state(None), first_state(policy.config.n_action_steps))
    assert first_state(1)[0, :3].tolist() == [8, 9, 10]
    assert first_state(0)[0, :3].tolist() == [1, 2, 3]
    with pytest.raises(TokenError, match="shift_steps is"):
        first_state(5)


def test_a_deadline_keeps_the_frozen_steps(policy: CeedVLAPolicy, batch: Any) -> None:
    hurried = replace(DecodingConfig(), deadline_s=1e-9)
    before = torch.arange(4 * A).repeat(2, 1) % policy.tokenizer.vocabulary_size
    result = policy.decode(batch, hurried, previous=before, shift_steps=1, frozen_steps=2)
    assert result.exit_reason == ["deadline"] * 2
    assert result.forwards == 1
    assert torch.equal(result.tokens[:, : 2 * A], before[:, A : 3 * A])
