"""Decoding, chunks and single actions; unsupported observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ceed_vla import CeedVLAPolicy, DecodingConfig
from ceed_vla.errors import ConfigError, ObservationError, TokenError

FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"
TOKENS = "observation.language.tokens"


def test_decoders_agree(policy: CeedVLAPolicy, batch: dict[str, Any]) -> None:
    autoregressive = policy.decode(batch, "ar")
    strict = policy.decode(batch, "jacobi")
    assert torch.equal(autoregressive.tokens, strict.tokens)
    assert autoregressive.actions is not None
    assert strict.actions is not None
    assert torch.equal(autoregressive.actions, strict.actions)
    assert strict.exact.all()
    assert autoregressive.forwards == 27
    assert strict.forwards <= 28
    assert set(strict.seconds) == {"prefill", "decode"}
    low, high = policy.tokenizer.low, policy.tokenizer.high
    assert ((autoregressive.actions >= low - 1e-6) & (autoregressive.actions <= high + 1e-6)).all()


def test_ceed_is_the_early_exit_of_the_checkpoint(batch: dict[str, Any], make_policy: Any) -> None:
    policy = make_policy(decoding=DecodingConfig(max_iterations=1))
    result = policy.decode(batch, "ceed")
    assert result.forwards == 1
    assert torch.equal(result.tokens, policy.decode(batch, DecodingConfig(max_iterations=1)).tokens)
    with pytest.raises(ConfigError, match="Unknown decoder 'beam'"):
        policy.decode(batch, "beam")


def test_a_warm_start_needs_fewer_forwards(policy: CeedVLAPolicy, batch: dict[str, Any]) -> None:
    tokens = policy.decode(batch, "jacobi").tokens
    # A previous chunk that, shifted by the two executed steps, is the answer.
    previous = torch.cat([tokens[:, :14], tokens[:, :14]], dim=1)
    warm = policy.decode(batch, "jacobi", previous=previous, record_states=True)
    assert warm.states is not None
    assert torch.equal(warm.states[0][:, 1:14], tokens[:, 1:14])
    assert warm.forwards < policy.decode(batch, "jacobi").forwards
    none = policy.decode(batch, "jacobi", previous=torch.full_like(tokens, -1))
    assert none.forwards == policy.decode(batch, "jacobi").forwards


def test_predicting_chunks_keeps_the_warm_start(
    policy: CeedVLAPolicy, batch: dict[str, Any]
) -> None:
    policy.reset()
    first = policy.predict_action_chunk(batch)
    assert first.shape == (2, 4, 7)
    cold = policy.decode(batch, "ceed")
    assert torch.equal(first, cold.actions)
    assert torch.equal(
        policy.predict_action_chunk(batch),
        policy.decode(batch, "ceed", previous=cold.tokens).actions,
    )
    one = {key: value[:1] for key, value in batch.items() if isinstance(value, Tensor)}
    # another number of rows discards the previous chunk
    assert policy.predict_action_chunk(one).shape == (
        1,
        4,
        7,
    )
    policy.reset()
    assert torch.equal(policy.predict_action_chunk(batch), first)


def test_select_action_replans_after_the_executed_steps(
    policy: CeedVLAPolicy, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    original = CeedVLAPolicy.predict_action_chunk

    def counted(self: CeedVLAPolicy, batch: dict[str, Tensor], **_: Any) -> Tensor:
        calls.append(original(self, batch))
        return calls[-1]

    monkeypatch.setattr(CeedVLAPolicy, "predict_action_chunk", counted)
    policy.reset()
    actions = [policy.select_action(batch) for _ in range(3)]
    assert len(calls) == 2
    assert torch.equal(torch.stack(actions[:2], dim=1), calls[0][:, :2])
    assert torch.equal(actions[2], calls[1][:, 0])
    one = {key: value[:1] for key, value in batch.items() if isinstance(value, Tensor)}
    assert policy.select_action(one).shape == (1, 7)  # not the queued action of two rows
    policy.reset()
    policy.select_action(batch)
    assert len(calls) == 4


def test_images_of_another_size_are_resized(
    policy: CeedVLAPolicy, processors: tuple[Any, Any], raw_observation: Any
) -> None:
    small, large = raw_observation(size=96), {}
    for key in (FRONT, WRIST):  # smooth, because resizing would remove noise of single pixels
        coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(len(key)))
        for size, images in ((96, small), (192, large)):
            images[key] = F.interpolate(coarse, size=(size, size), mode="bilinear")
    pre = processors[0]
    expected = policy.backbone.prefill(pre(small)).logits
    found = policy.backbone.prefill(pre({**small, **large})).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert policy.decode(pre({**small, **large}), "ceed").tokens.shape == (2, 28)


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing camera": (lambda b: b.pop(WRIST), "lacks 'observation.images.wrist'"),
    "missing state": (lambda b: b.pop(STATE), "lacks 'observation.state'"),
    "not pre-processed": (lambda b: b.pop(TOKENS), "preprocessor"),
    "state size": (lambda b: b.update({STATE: b[STATE][:, :6]}), r"\(2, 6\), expected \(B, 14\)"),
    "channels last": (
        lambda b: b.update({FRONT: b[FRONT].permute(0, 2, 3, 1)}),
        r"expected \(B, 3, any, any\)",
    ),
    "unbatched image": (lambda b: b.update({FRONT: b[FRONT][0]}), r"\(3, 96, 96\)"),
    "byte image": (
        lambda b: b.update({FRONT: (b[FRONT] * 255).byte()}),
        r"uint8; images must be floats in \[0, 1\]",
    ),
    "fewer rows": (lambda b: b.update({STATE: b[STATE][:1]}), "rows B"),
    "NaN state": (lambda b: b[STATE].fill_(float("nan")), "not finite"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_observation_is_one_clear_error(
    policy: CeedVLAPolicy, batch: dict[str, Any], kind: str
) -> None:
    change, message = BAD[kind]
    change(batch)
    with pytest.raises(ObservationError, match=message):
        policy.decode(batch, "ceed")
    with pytest.raises(ObservationError, match=message):
        policy({**batch, "action": torch.zeros(2, 4, 7)})


def test_bad_actions_are_refused(policy: CeedVLAPolicy, batch: dict[str, Any]) -> None:
    with pytest.raises(ObservationError, match="no 'action'"):
        policy(batch)
    with pytest.raises(TokenError):
        policy({**batch, "action": torch.full((2, 4, 7), float("nan"))})
    with pytest.raises(TokenError):
        policy({**batch, "action": torch.zeros(2, 4, 6)})
