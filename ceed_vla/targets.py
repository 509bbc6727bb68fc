"""What a training batch has beside the observation: which keys, and what they must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lerobot.utils.constants import ACTION
from torch import Tensor

from ceed_vla.errors import ObservationError
from ceed_vla.tensors import is_plain

ENVIRONMENT_STATE_KEY = "observation.environment_state"
AUGMENTATION_NOISE = "augmentation_noise"
PADDED = "action_is_pad"
LARGEST = 1e6  # term of the environment state


def check_targets(batch: Mapping[str, Any], rows: int, steps: int, noise: int, terms: int) -> None:
    """Check what of a training batch is not the observation; all of it may be missing.

    Args:
        batch: ``action_is_pad`` (B, m) true or false, ``augmentation_noise`` (B, N) in [0, 1),
            ``observation.environment_state`` (B, at least E) and the rows of ``action``.
        rows: Rows ``B`` of the observation.
        steps: Steps ``m`` of a chunk.
        noise: Random numbers ``N`` of a row.
        terms: Terms ``E`` that are regressed.

    Raises:
        ObservationError: Another type or shape, or values outside.
    """
    shapes = {PADDED: (rows, steps), AUGMENTATION_NOISE: (rows, noise)}
    for key in (PADDED, AUGMENTATION_NOISE, ENVIRONMENT_STATE_KEY):
        value = batch.get(key)
        if value is None:
            continue
        found = tuple(value.shape) if is_plain(value) else type(value).__name__
        if len(found) != 2 or found[0] != rows or found != shapes.get(key, found):
            raise ObservationError(f"{key} is {found}; expected {shapes.get(key, (rows, 'terms'))}.")
        floats = value.is_floating_point()
        if key == ENVIRONMENT_STATE_KEY and not (
            floats and value.shape[1] >= terms and _within(value, -LARGEST, LARGEST)
        ):
            raise ObservationError(f"{key} is {found} {value.dtype}; expected {terms} finite terms a row.")
        if key == AUGMENTATION_NOISE and not (floats and _within(value, 0, 1)):
            raise ObservationError(f"{key} is {value.dtype}; expected numbers in [0, 1).")
        if key == PADDED and (floats or value.is_complex() or not _within(value, 0, 1)):
            raise ObservationError(f"{key} is {value.dtype}; expected true or false.")
    action = batch.get(ACTION)
    if isinstance(action, Tensor) and is_plain(action) and action.ndim == 3 and len(action) != rows:
        raise ObservationError(f"{ACTION} has {len(action)} rows, the observation {rows}.")


def _within(values: Tensor, low: float, high: float) -> bool:
    least, most = (
        (float(end) for end in values.to(torch.float32).aminmax()) if values.numel() else (low, high)
    )
    return low <= least and most <= high
