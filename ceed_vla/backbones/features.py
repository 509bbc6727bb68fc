"""Validation of a preprocessed batch: the features that a backbone reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ceed_vla.errors import ObservationError
from ceed_vla.tensors import is_plain


def check_features(
    batch: Mapping[str, Any],
    wanted: Mapping[str, tuple[int | None, ...]],
    finite: Sequence[str] = (),
    ids: Mapping[str, int] | None = None,
) -> int:
    """Validate the tensors of a preprocessed batch.

    Args:
        batch: A batch from the preprocessor.
        wanted: Feature -> its shape without the rows; None for any size.
        finite: Features that must be float32 without NaN and infinity.
        ids: Feature of whole numbers -> the number that they must be below.

    Returns:
        The number of rows ``B`` of the batch, which all features share.

    Raises:
        ObservationError: A feature is missing or violates these rules.
    """
    if not isinstance(batch, Mapping):
        raise ObservationError(
            f"The observation is {type(batch).__name__}; pass a batch from the preprocessor."
        )
    first = next(iter(wanted))
    rows = 0
    for key, shape in wanted.items():
        found = tuple(_dense(batch, key).shape)
        if key == first:
            rows = found[0] if found else 0
        if not rows or not _fits(found, (rows, *shape)):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ObservationError(
                f"{key} has shape {found}, expected (B, {expected}) with the rows B of {first}."
            )
    for key in finite:
        _check_finite(batch, key)
    for key, end in (ids or {}).items():
        _check_ids(batch, key, end)
    return rows


def _dense(batch: Mapping[str, Any], key: str) -> Tensor:
    """The feature `key` of a batch, which must be a dense tensor."""
    value = batch.get(key)
    if is_plain(value):
        return value
    features = sorted(str(name) for name in batch if str(name).startswith("observation."))
    problem = f"has {key!r} as {type(value).__name__}, not as a dense tensor"
    if value is None:
        problem = f"lacks {key!r}"
    raise ObservationError(
        f"The observation {problem}; it has {', '.join(features) or 'none'}. Use the checkpoint's "
        "preprocessor."
    )


def _fits(found: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Whether a shape matches the expected one; None is any size."""
    return len(found) == len(expected) and all(
        side in (None, size) for size, side in zip(found, expected, strict=True)
    )


def _check_finite(batch: Mapping[str, Any], key: str) -> None:
    if batch[key].dtype != torch.float32:
        raise ObservationError(f"{key} is {batch[key].dtype}; expected torch.float32.")
    if not torch.isfinite(batch[key]).all():
        raise ObservationError(f"{key} is not finite: {str(batch[key].tolist())[:200]}.")


def _check_ids(batch: Mapping[str, Any], key: str, end: int) -> None:
    if batch[key].dtype not in (torch.int64, torch.int32):
        raise ObservationError(
            f"{key} is {batch[key].dtype}; expected whole numbers (torch.int64)."
        )
    least, most = torch.stack(batch[key].aminmax()).tolist()
    if not 0 <= least <= most < end:
        raise ObservationError(
            f"{key} has ids from {least} to {most}; they must be in [0, {end - 1}]."
        )
