"""Checks requests against the policy's inputs, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import InstructionError, ObservationError
from ceed_vla.serving.predictor_types import PolicySpec, Request
from ceed_vla.texts import shown
from ceed_vla.word_ids import split_words

LARGEST_SIDE = 4096  # of an image [px]


def check_observation(spec: PolicySpec, request: Request) -> dict[str, NDArray[Any]]:
    """Return the policy's features of a request: images (H, W, 3) uint8, vectors (D,) finite.

    Raises:
        ObservationError: Features are missing or of a wrong shape or type.
    """
    features: dict[str, NDArray[Any]] = {}
    for key in (*spec.cameras, *spec.states):
        if key not in request.observation:
            have = ", ".join(sorted(request.observation)) or "nothing"
            raise ObservationError(f"The observation lacks {key!r}; it has {have}.")
        value = np.asarray(request.observation[key])
        if key in spec.cameras:
            if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
                raise ObservationError(
                    f"{key} is {value.dtype} {value.shape}, expected uint8 (H, W, 3)."
                )
            if not 1 <= min(value.shape[:2]) <= max(value.shape[:2]) <= LARGEST_SIDE:
                raise ObservationError(
                    f"{key} is {value.shape}; both sides must have 1 to {LARGEST_SIDE} px."
                )
        else:
            value = _numbers(value, key, spec.states[key])
        features[key] = value
    return features


def _numbers(value: NDArray[Any], key: str, length: int) -> NDArray[np.float32]:
    """`value` as `length` finite float32 numbers, or `ObservationError`."""
    if value.shape == (length,) and value.dtype.kind in "fiu":
        with np.errstate(over="ignore"):
            found = value.astype(np.float32)
        if np.isfinite(found).all():
            return found
    what = value.tolist() if value.ndim == 1 and value.size < 100 else value
    raise ObservationError(f"{key} is {shown(what)}, expected {length} finite numbers.")


def check_instruction(instruction: str, vocabulary: set[str]) -> None:
    """Raise `InstructionError` unless half of the words are in the vocabulary.

    With a few known words among unknown ones, the policy would still move the arm. An empty
    vocabulary accepts any word.
    """
    words = split_words(instruction)
    unknown = [word for word in words if word not in vocabulary]
    if vocabulary and (not words or 2 * len(unknown) > len(words)):
        raise InstructionError(
            f"{len(words) - len(unknown)} of the {len(words)} words of the instruction "
            f"{shown(instruction)} are in the policy's vocabulary; at least half must be, for "
            f"example {', '.join(sorted(vocabulary)[:8])}."
        )
