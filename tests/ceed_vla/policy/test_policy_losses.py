"""The policy's training losses against loops and numpy, and its packed forward against the cached
one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ceed_vla import CeedVLAPolicy
from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.supervision import (
    augment,
    auxiliary_loss,
    grounding_loss,
    label_table,
    random_shift,
    soft_cross_entropy,
)

FRONT, STATE = "observation.images.front", "observation.state"
ENVIRONMENT = "observation.environment_state"


def test_packed_blocks_do_not_see_each_other(policy: CeedVLAPolicy, batch: dict[str, Any]) -> None:
    backbone = policy.backbone
    blocks = [torch.randint(31, (2, 28)) for _ in range(2)]
    with torch.no_grad():
        embeddings = backbone.embed_prefix(batch)
        state, both = backbone.packed_logits(embeddings, blocks)
        for block, logits in zip(blocks, both, strict=True):
            _, (alone,) = backbone.packed_logits(embeddings, [block])
            torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
            prefix = backbone.prefill(batch)
            torch.testing.assert_close(logits[:, 0], prefix.logits, atol=1e-4, rtol=1e-4)
            cached = backbone.block_logits(prefix, block[:, :-1])  # output i predicts slot i + 1
            torch.testing.assert_close(logits[:, 1:], cached, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(state, backbone.prefix_state(embeddings), atol=1e-5, rtol=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows(
    policy: CeedVLAPolicy, training_batch: dict[str, Any]
) -> None:
    rows, _ = policy(training_batch, reduction="none")
    mean, parts = policy(training_batch)
    assert rows.shape == (2,)
    assert mean.item() == pytest.approx(rows.mean().item())
    weight = policy.config.auxiliary_weight
    assert mean.item() == pytest.approx(
        parts["ar_loss"] + weight * parts["auxiliary_loss"], rel=1e-5
    )
    assert all(isinstance(value, float) for value in parts.values())


def test_steps_past_the_end_do_not_count(
    policy: CeedVLAPolicy, training_batch: dict[str, Any]
) -> None:
    before, _ = policy(training_batch, reduction="none")
    other = training_batch["action"].clone()
    other[1, 2:] = -other[1, 2:]
    changed, _ = policy({**training_batch, "action": other}, reduction="none")
    assert torch.equal(before, changed)
    free = {k: v for k, v in training_batch.items() if k != "action_is_pad"}
    assert policy(free, reduction="none")[0][1] != before[1]


def test_without_the_target_there_is_no_auxiliary_loss(
    policy: CeedVLAPolicy, training_batch: dict[str, Any]
) -> None:
    del training_batch[ENVIRONMENT]
    loss, parts = policy(training_batch)
    assert "auxiliary_loss" not in parts
    assert loss.item() == pytest.approx(parts["ar_loss"])


def test_rows_of_nan_have_no_auxiliary_loss(
    training_batch: dict[str, Any], policy: CeedVLAPolicy
) -> None:
    policy.eval()
    whole, _ = policy(training_batch, reduction="none")
    target = training_batch[ENVIRONMENT].clone()
    target[0] = torch.nan
    masked, parts = policy({**training_batch, ENVIRONMENT: target}, reduction="none")
    without, _ = policy({**training_batch, ENVIRONMENT: None}, reduction="none")
    assert masked[0] == without[0] < whole[0]
    torch.testing.assert_close(masked[1:], whole[1:])
    mean = ((masked - without) / policy.config.auxiliary_weight).mean().item()
    assert parts["auxiliary_loss"] == pytest.approx(mean, rel=1e-4)
    target[0, 0] = 0.0
    with pytest.raises(ObservationError, match="or a row of NaN"):
        policy({**training_batch, ENVIRONMENT: target})


def test_grounding_trains_the_prefix_only(training_batch: dict[str, Any], make_policy: Any) -> None:
    policy = make_policy()
    loss = grounding_loss(policy, training_batch)
    assert loss.item() == pytest.approx(policy(training_batch)[1]["auxiliary_loss"], rel=1e-5)
    loss.backward()
    assert policy.backbone.stems[0].convolutions[0].weight.grad is not None
    assert policy.backbone.action_tokens.weight.grad is None
    with pytest.raises(ConfigError, match="auxiliary_scale is empty"):
        grounding_loss(make_policy(auxiliary_scale=[]), training_batch)


@pytest.mark.parametrize("terms", [None, 3, 99])
def test_the_auxiliary_loss_equals_numpy(
    policy: CeedVLAPolicy, training_batch: dict[str, Any], terms: int | None
) -> None:
    policy.auxiliary_terms = terms
    with torch.no_grad():
        embeddings = policy.backbone.embed_prefix(training_batch)
        state = policy.backbone.prefix_state(embeddings)
        found = auxiliary_loss(policy, embeddings, state, training_batch[ENVIRONMENT])
        assert policy.backbone.auxiliary is not None
        assert policy.backbone.early_auxiliary is not None
        regressed = policy.backbone.auxiliary(state), policy.backbone.early_auxiliary(embeddings)
    scale = policy.config.auxiliary_scale[:terms]
    target = training_batch[ENVIRONMENT][:, : len(scale)].numpy() * scale
    errors = [np.abs(values[:, : len(scale)].numpy() - target) for values in regressed]
    expected = sum(np.where(e < 0.1, 0.5 * e**2 / 0.1, e - 0.05).mean(1) for e in errors)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.0, 1.3])
def test_soft_cross_entropy_equals_loops(sigma: float) -> None:
    logits, tokens = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    found = soft_cross_entropy(logits, tokens, sigma)
    for b in range(2):
        for i in range(3):
            log_q = logits[b, i].double().numpy() - np.log(
                np.exp(logits[b, i].double().numpy()).sum()
            )
            bins = np.arange(7) - int(tokens[b, i])
            label = np.exp(-0.5 * (bins / sigma) ** 2) if sigma else (bins == 0).astype(float)
            assert found[b, i].item() == pytest.approx(
                -(label / label.sum() * log_q).sum(), rel=1e-5
            )
    if sigma:
        torch.testing.assert_close(label_table(7, sigma, torch.device("cpu")).sum(1), torch.ones(7))


def test_augmentation_only_while_training(training_batch: dict[str, Any], make_policy: Any) -> None:
    policy = make_policy()
    assert policy(training_batch)[0] == policy(training_batch)[0]
    policy.train()
    assert policy(training_batch)[0] != policy(training_batch)[0]
    augmented = augment(policy, training_batch)
    assert (augmented[FRONT] != training_batch[FRONT]).any()
    assert augmented[FRONT].amin() >= 0
    assert augmented[FRONT].amax() <= 1
    assert (augmented[STATE] - training_batch[STATE]).abs().max() < 0.2
    assert torch.equal(augmented["action"], training_batch["action"])


def test_random_shift_moves_whole_images() -> None:
    image = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    shifted = random_shift(image, 2, torch.rand(2, 2))
    assert shifted.shape == image.shape
    for before, after in zip(image, shifted, strict=True):
        matches = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(after[:, 2:6, 2:6], before[:, 2 + dy : 6 + dy, 2 + dx : 6 + dx])
        ]
        assert len(matches) == 1


def test_gradients_reach_every_parameter(training_batch: dict[str, Any], make_policy: Any) -> None:
    policy = make_policy().train()
    policy(training_batch)[0].backward()
    # Some gradients may be small, such as those of GroupNorm shifts before FiLM, but none may be 0.
    missing = [name for name, p in policy.named_parameters() if p.grad is None]
    assert missing == []
    assert len(policy.get_optim_params()) == len(list(policy.parameters()))
