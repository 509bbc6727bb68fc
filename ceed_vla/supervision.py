"""Learning from demonstrations: the teacher's loss, the grounding regression, augmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from ceed_vla.backbones.base import runs
from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.fields import short
from ceed_vla.tensors import is_plain

ENVIRONMENT_STATE_KEY = "observation.environment_state"
AUGMENTATION_NOISE = "augmentation_noise"
PADDED = "action_is_pad"
LARGEST = 1e6  # limit on terms of the environment state


def teacher_loss(
    policy: Any,
    batch: dict[str, Tensor],
    reduction: str = "mean",
    imitated: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The autoregressive loss of the teacher, with the auxiliary regression if the batch has its
    target.

    Args:
        policy: The policy; in training mode, the batch is augmented.
        batch: A preprocessed observation with ``action`` (B, m, A) and, optionally,
            ``action_is_pad`` (B, m) and ``observation.environment_state`` (B, E). Rows of NaN have
            no regression, so it weighs less in the mean.
        reduction: "mean", or "none" for one loss per row.
        imitated: Maps the tokens (B, n) of the actions to the logits (B, k, V) of another policy
            for the first k <= n, whose distributions are learnt, too.

    Returns:
        The loss, and its parts by name.

    Raises:
        ConfigError: `reduction` is unknown.
        ObservationError: The batch does not fit the policy, or has no action.
    """
    if not isinstance(reduction, str) or reduction not in ("mean", "none"):
        raise ConfigError(f"reduction is {short(reduction)}; choose mean or none.")
    batch = _prepared(policy, batch, ACTION)
    tokens = policy.tokenizer.encode(batch[ACTION])  # (B, n)
    with runs(policy.backbone):
        embeddings = policy.backbone.embed_prefix(batch)
        state, (logits,) = policy.backbone.packed_logits(embeddings, [tokens])  # (B, n, V)
    weight = policy.tokenizer.weight(tokens, batch.get(PADDED))  # (B, n)
    sigma = policy.config.label_sigma if policy.config.action_tokens.ordered else 0.0
    losses = soft_cross_entropy(logits, tokens, sigma)
    if imitated is not None:
        other = imitated(tokens)  # (B, k, V)
        apart = divergence(other, logits[:, : other.shape[1]])
        losses = losses + F.pad(apart, (0, tokens.shape[1] - other.shape[1]))
    rows = (losses * weight).sum(1) / weight.sum(1).clamp(min=1)  # (B,)
    with torch.no_grad():
        hits = ((logits.argmax(-1) == tokens) * weight).sum() / weight.sum().clamp(min=1)
    parts = {"ar_loss": rows.mean().item(), "token_accuracy": hits.item()}
    if policy.backbone.auxiliary is not None and batch.get(ENVIRONMENT_STATE_KEY) is not None:
        auxiliary = auxiliary_loss(policy, embeddings, state, batch[ENVIRONMENT_STATE_KEY])  # (B,)
        parts["auxiliary_loss"] = auxiliary.mean().item()
        rows = rows + policy.config.auxiliary_weight * auxiliary
    return (rows.mean() if reduction == "mean" else rows), parts


def finish_training(policy: Any) -> None:
    """Drop the head that only training uses, also from the configuration."""
    policy.backbone.early_auxiliary = None
    policy.config.backbone = policy.config.backbone.finished()


def auxiliary_loss(
    policy: Any, embeddings: Any, state: Tensor, environment_state: Tensor
) -> Tensor:
    """Smooth-L1 loss of the grounding regressions.

    Args:
        policy: The policy.
        embeddings: The result of `embed_prefix`, the input of the early head.
        state: (B, d) final hidden vector of the state token, the input of the head behind the
            trunk.
        environment_state: (B, E) [m, rad]; its scaled leading terms are the target.

    Returns:
        (B,), summed over the heads; 0 for rows of NaN.
    """
    backbone = policy.backbone
    assert backbone.auxiliary is not None
    if type(policy.auxiliary_terms) not in (int, type(None)) or (policy.auxiliary_terms or 1) < 1:
        raise ConfigError(
            f"auxiliary_terms is {short(policy.auxiliary_terms)}; it must be a positive whole "
            "number, or None."
        )
    scale = torch.tensor(
        policy.config.auxiliary_scale[: policy.auxiliary_terms], device=state.device
    )
    known = has_target(environment_state)
    target = environment_state.where(known[:, None], 0)[:, : len(scale)] * scale
    regressed = [backbone.auxiliary(state.float())]
    if backbone.early_auxiliary is not None:
        regressed.append(backbone.early_auxiliary(embeddings))
    losses = [
        F.smooth_l1_loss(found[:, : len(scale)].float(), target, beta=0.1, reduction="none").mean(1)
        for found in regressed
    ]
    return torch.stack(losses).sum(0) * known


def has_target(environment_state: Tensor) -> Tensor:
    """Which rows of (B, E) have a target (B,): not those of NaN alone."""
    return ~environment_state.isnan().all(1)


def grounding_loss(policy: Any, batch: dict[str, Tensor]) -> Tensor:
    """The auxiliary loss alone (scalar), for frames without an action."""
    if policy.backbone.auxiliary is None:
        raise ConfigError(
            "auxiliary_scale is empty, so the policy has no grounding target; set auxiliary_scale."
        )
    batch = _prepared(policy, batch, ENVIRONMENT_STATE_KEY)
    with runs(policy.backbone):
        embeddings = policy.backbone.embed_prefix(batch)
        state = policy.backbone.prefix_state(embeddings)
    return auxiliary_loss(policy, embeddings, state, batch[ENVIRONMENT_STATE_KEY]).mean()


def _prepared(policy: Any, batch: dict[str, Tensor], target: str) -> dict[str, Tensor]:
    """Validate a `batch` with a `target`; augment it in training mode."""
    if policy.training:
        batch = augment(policy, batch)
    else:
        _check_batch(policy, batch)
    if batch.get(target) is None:
        raise ObservationError(
            f"The batch has no {target!r}; it has {', '.join(sorted(map(str, batch)))}. Add it."
        )
    return batch


def augment(policy: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply random shift and brightness to every image in `augmented_images` of the backbone, and
    noise to the state.

    ``batch["augmentation_noise"]`` (B, `augmentation_size`), uniform in [0, 1), is the source of
    randomness if the batch has it: then the augmentation of a frame does not depend on how a batch
    is split over processes.
    """
    _check_batch(policy, batch)
    config = policy.config
    batch = dict(batch)
    images = {camera: batch[camera] for camera in policy.backbone.augmented_images}
    noise = batch.pop(AUGMENTATION_NOISE, None)
    if not augmentation_size(policy):
        return batch
    if noise is None:
        rows = len(next(iter(images.values()))) if images else len(batch[OBS_STATE])
        noise = torch.rand(rows, augmentation_size(policy))
    for i, (camera, image) in enumerate(images.items()):
        own = noise[:, 3 * i : 3 * i + 3].to(image.device)  # (B, 3)
        if config.augment_shift:
            image = random_shift(image, config.augment_shift, own[:, :2])
        if config.augment_brightness:
            gain = 1 + config.augment_brightness * (2 * own[:, 2, None, None, None] - 1)
            image = (image * gain).clamp(0, 1)
        batch[camera] = image
    if config.augment_state and config.robot_state_feature is not None:
        state = batch[OBS_STATE]  # (B, D)
        uniform = noise[:, 3 * len(images) :].to(state.device, state.dtype).clamp(1e-6, 1 - 1e-6)
        batch[OBS_STATE] = state + config.augment_state * torch.special.ndtri(uniform)
    return batch


def augmentation_size(policy: Any) -> int:
    """Random numbers per row that `augment` needs: shift (2) and brightness of every image, noise
    of the state.
    """
    state = policy.config.robot_state_feature
    return 3 * len(policy.backbone.augmented_images) + (int(state.shape[0]) if state else 0)


def _check_batch(policy: Any, batch: dict[str, Any]) -> None:
    """Validate the observation in a batch, and the optional entries that it has."""
    rows = policy.check_observation(batch)
    terms = len(policy.config.auxiliary_scale)
    shapes = {
        PADDED: (rows, policy.config.chunk_size),
        AUGMENTATION_NOISE: (rows, augmentation_size(policy)),
    }
    for key in (PADDED, AUGMENTATION_NOISE, ENVIRONMENT_STATE_KEY):
        value = batch.get(key)
        if value is None:
            continue
        found = tuple(value.shape) if is_plain(value) else type(value).__name__
        if len(found) != 2 or found[0] != rows or found != shapes.get(key, found):
            raise ObservationError(
                f"{key} is {found}; expected {shapes.get(key, (rows, 'terms'))}."
            )
        floats = value.is_floating_point()
        if key == ENVIRONMENT_STATE_KEY and not (
            floats
            and value.shape[1] >= terms
            and _within(value[has_target(value)], -LARGEST, LARGEST)
        ):
            raise ObservationError(
                f"{key} is {found} {value.dtype}; expected {terms} finite terms per row, or a row "
                "of NaN."
            )
        if key == AUGMENTATION_NOISE and not (floats and _within(value, 0, 1)):
            raise ObservationError(f"{key} is {value.dtype}; expected numbers in [0, 1).")
        if key == PADDED and (floats or value.is_complex() or not _within(value, 0, 1)):
            raise ObservationError(f"{key} is {value.dtype}; expected booleans.")
    action = batch.get(ACTION)
    if is_plain(action) and action.ndim == 3 and len(action) != rows:
        raise ObservationError(
            f"{ACTION} has {len(action)} rows, the observation {rows}; both must be equal."
        )


def _within(values: Tensor, low: float, high: float) -> bool:
    least, most = (
        (float(end) for end in values.to(torch.float32).aminmax())
        if values.numel()
        else (low, high)
    )
    return low <= least and most <= high


def soft_cross_entropy(logits: Tensor, tokens: Tensor, sigma: float) -> Tensor:
    """Cross-entropy (B, n) with soft labels: a Gaussian of `sigma` bins around every token.

    Args:
        logits: (B, n, V).
        tokens: (B, n) the labels.
        sigma: Standard deviation [bins]; 0 for hard labels.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=-1)  # (B, n, V)
    if sigma <= 0:
        return -log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return -(label_table(logits.shape[-1], sigma, logits.device)[tokens] * log_probabilities).sum(
        -1
    )


def divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(target || model) (B, n) of logits (B, n, V); the target gets no gradient."""
    target = F.log_softmax(target_logits.detach().float(), dim=-1)
    return (target.exp() * (target - F.log_softmax(logits.float(), dim=-1))).sum(-1)


def label_table(num_bins: int, sigma: float, device: torch.device) -> Tensor:
    """(V, V): row v is the soft label of bin v."""
    bins = torch.arange(num_bins, device=device, dtype=torch.float32)
    return torch.softmax(-0.5 * ((bins[:, None] - bins[None, :]) / sigma) ** 2, dim=-1)


def random_shift(image: Tensor, pixels: int, noise: Tensor) -> Tensor:
    """Shift images (B, 3, H, W) by up to `pixels` [px] and repeat their edges.

    `noise` (B, 2) in [0, 1) determines the shifts.
    """
    batch, _, height, width = image.shape
    padded = F.pad(image, (pixels,) * 4, mode="replicate")
    offsets = (noise * (2 * pixels + 1)).long().clamp(max=2 * pixels)  # (B, 2)
    rows = offsets[:, :1] + torch.arange(height, device=image.device)  # (B, H)
    columns = offsets[:, 1:] + torch.arange(width, device=image.device)  # (B, W)
    index = torch.arange(batch, device=image.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
