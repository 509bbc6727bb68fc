"""LeRobot's real-time chunking: the remainder of the running chunk becomes the start of the next
one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lerobot.rollout.inference.rtc import supports_rtc_inference

from ceed_vla import CeedVLAPolicy
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.real_time import continuation, decode_behind, made_up
from ceed_vla.tokens.uniform import ActionTokenizer

A, M = 7, 4  # of the tiny policy


@pytest.fixture
def chunk(policy: CeedVLAPolicy, batch: Any) -> torch.Tensor:
    """Actions (2, 4, 7) that the policy does not choose itself."""
    tokens = policy.decode(batch, "ar").tokens
    return policy.tokenizer.decode((tokens + 5) % policy.tokenizer.vocabulary_size)


def test_lerobots_engine_takes_the_policy(policy: CeedVLAPolicy) -> None:
    assert supports_rtc_inference(policy)


@pytest.mark.parametrize("delay", range(4))
def test_the_left_over_is_continued(
    policy: CeedVLAPolicy, batch: Any, chunk: torch.Tensor, delay: int
) -> None:
    left = chunk[:, 1:]  # one step was executed
    actions = policy.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=left)
    assert torch.equal(actions[:, :delay], left[:, :delay])
    tokens = policy.tokenizer.encode(chunk)
    expected = policy.decode(
        batch, "ar", previous=tokens, shift_steps=1, frozen_steps=delay
    ).actions
    policy.config.decode_with = "jacobi"
    exact = policy.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=left)
    assert expected is not None
    assert torch.equal(exact, expected)


def test_the_left_over_is_the_warm_start(policy: CeedVLAPolicy, chunk: torch.Tensor) -> None:
    tokens = policy.tokenizer.encode(chunk)
    previous, frozen_steps = continuation(policy.tokenizer, chunk[:, 1:], 2, 2)
    assert previous is not None
    assert frozen_steps == 2
    assert torch.equal(previous, torch.cat([tokens[:, A:], tokens[:, -A:]], dim=1))
    one_row, _ = continuation(policy.tokenizer, chunk[0, 1:], 0, 2)
    assert one_row is not None
    assert torch.equal(one_row, previous[:1].expand(2, -1))


def test_lerobots_filling_is_no_action(policy: CeedVLAPolicy, chunk: torch.Tensor) -> None:
    filled = torch.cat([chunk[:, 2:], torch.zeros(2, 8, A)], dim=1)  # up to its execution horizon
    previous, frozen = continuation(policy.tokenizer, filled, 3, 2)
    again, same = continuation(policy.tokenizer, chunk[:, 2:], 3, 2)
    assert previous is not None
    assert again is not None
    assert torch.equal(previous, again)
    assert frozen == same == 2  # two steps are left for any delay
    assert continuation(policy.tokenizer, torch.zeros(10, A), 3, 2) == (None, 0)
    assert continuation(policy.tokenizer, torch.zeros(0, A), 3, 2) == (None, 0)


def test_increments_are_made_up_behind_frozen_steps(
    policy: CeedVLAPolicy, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy.config, "delta_dims", [0, 2])
    monkeypatch.setattr(policy.config, "decode_with", "ar")
    free, tokens = policy.decode(batch, "ar").actions, policy.tokenizer
    assert free is not None
    left = free[:, :2].clone()
    left[:, :, 0] -= 0.1  # moved 0.2 too little
    actions = policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=left)
    assert torch.equal(
        actions[:, :2], tokens.decode(tokens.encode(torch.cat([left, left], dim=1)))[:, :2]
    )
    assert torch.equal(actions[:, 2:, 1], free[:, 2:, 1])  # not an increment
    high = policy.config.action_tokens.action_high[0]
    reach = (free[:, :, 0].sum(1)).minimum(left[:, :, 0].sum(1) + 2 * high)
    assert torch.allclose(actions[:, :, 0].sum(1), reach, atol=0.02)
    undelayed = policy.predict_action_chunk(batch, inference_delay=0, prev_chunk_left_over=left)
    assert torch.equal(undelayed, free)


def test_what_is_made_up_is_not_called_exact_and_what_is_frozen_is_checked(
    policy: CeedVLAPolicy, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy.config, "delta_dims", [0])
    previous = torch.arange(A * M).repeat(2, 1) % policy.tokenizer.vocabulary_size
    warm = {"previous": previous, "shift_steps": 1}
    result = decode_behind(policy, batch, 1, decoding="jacobi", record_states=True, **warm)
    assert torch.equal(result.tokens[:, :A], previous[:, A : 2 * A])
    assert result.exact_tokens.tolist() == [A, A]
    assert not result.exact.any()
    assert result.states is None
    for wrong in ({}, {"previous": previous, "shift_steps": M}, {"previous": previous + 999}):
        with pytest.raises(TokenError):
            decode_behind(policy, batch, 1, decoding="ar", **wrong)
    for dims in ([A], ["0"], (0,), [True]):
        monkeypatch.setattr(policy.config, "delta_dims", dims)
        with pytest.raises(ConfigError, match="delta_dims"):
            decode_behind(policy, batch, 1, decoding="ar", **warm)


def test_what_is_made_up_stays_within_the_ranges() -> None:
    tokens = ActionTokenizer([-1.0, -1.0], [1.0, 1.0], chunk_steps=4, num_bins=201)
    plan = torch.tensor([[[0.8, 0.5], [0.6, 0.5], [0.2, 0.5], [0.0, -0.5]]])
    frozen = tokens.encode(torch.tensor([[[-0.2, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]))[:, :2]
    joined = tokens.decode(made_up(tokens, tokens.encode(plan), frozen, [0]))
    # 1.0 too little: 0.4, then 0.6
    expected = torch.tensor([[[-0.2, 0.0], [1.0, 0.5], [0.8, 0.5], [0.0, -0.5]]])
    assert torch.allclose(joined, expected, atol=1e-6)


def test_a_whole_chunk_cannot_be_frozen(
    policy: CeedVLAPolicy, batch: Any, chunk: torch.Tensor
) -> None:
    actions = policy.predict_action_chunk(batch, inference_delay=50, prev_chunk_left_over=chunk)
    assert torch.equal(actions[:, : M - 1], chunk[:, : M - 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inference_delay": -1}, "inference_delay"),
        ({"inference_delay": 1.5}, "inference_delay"),
        ({"prev_chunk_left_over": torch.zeros(3, 6)}, "prev_chunk_left_over"),
        ({"prev_chunk_left_over": torch.ones(3, 2, A)}, "prev_chunk_left_over"),
        ({"prev_chunk_left_over": [[0.0] * A]}, "prev_chunk_left_over"),
        ({"prev_chunk_left_over": torch.full((3, A), torch.nan)}, "NaN|finite"),
    ],
)
def test_a_wrong_left_over_is_named(
    policy: CeedVLAPolicy, batch: Any, change: Any, message: str
) -> None:
    given = {"inference_delay": 1, "prev_chunk_left_over": torch.ones(3, A), **change}
    with pytest.raises((ConfigError, TokenError), match=message):
        policy.predict_action_chunk(batch, **given)


def test_unknown_arguments_are_refused(policy: CeedVLAPolicy, batch: Any) -> None:
    with pytest.raises(TypeError, match="noise"):
        policy.predict_action_chunk(batch, noise=None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="noise"):
        policy.select_action(batch, noise=None)  # type: ignore[call-arg]


def test_tokens_of_variable_length_continue_nothing(
    policy: CeedVLAPolicy, batch: Any, chunk: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy.tokenizer, "tokens_per_step", None)
    assert not supports_rtc_inference(policy)
    with pytest.raises(ConfigError, match="variable length"):
        policy.predict_action_chunk(batch, inference_delay=1, prev_chunk_left_over=chunk)


def test_lerobots_adapters_go_where_distillation_learns(policy: CeedVLAPolicy) -> None:
    targets = policy._get_default_peft_targets()["target_modules"]
    assert targets
    learning = {f"backbone.{name}" for name in policy.backbone.distillation_parameters()}
    assert {f"{name}.weight" for name in targets} <= learning
