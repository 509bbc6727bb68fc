"""Scores that are no numbers end decoding: their argmax would be bin 0, a full action in every dimension.

The sum of the largest scores of a row tells it, and travels with the tokens in a transfer that is made anyway.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone
from ceed_vla.errors import NotFiniteError


def row_sums(best: Tensor, backbone: Backbone) -> Tensor:
    """Finite (B, 1) float64 if all the largest scores `best` (B, k) of a row are.

    Where a grammar forbids every token of a slot, -inf is legal; so it only looks for NaN and +inf.
    """
    if getattr(backbone, "grammar", None) is not None:
        best = best.clamp(min=0)  # keeps NaN
    return best.double().sum(1, keepdim=True)


def check_rows(sums: Iterable[float] | np.ndarray, running: np.ndarray | None = None) -> None:
    """Raise `NotFiniteError` if a sum of `row_sums` is not finite in a row that is still running."""
    wrong = ~np.isfinite(np.asarray(sums, dtype=np.float64))
    wrong = wrong if running is None else wrong & running
    if wrong.any():
        raise NotFiniteError(
            f"The scores are NaN or infinite in row {int(wrong.argmax())} ({int(wrong.sum())} of {len(wrong)}); "
            "its weights or activations are broken, or its type is too small. Hold the robot; load it in float32."
        )


def with_sums(tokens: Tensor, best: Tensor, backbone: Backbone, *more: Tensor) -> Tensor:
    """Tokens (B, k), then `row_sums`, then `more` (B, ...) as one float64 tensor: token ids are exact in it."""
    return torch.cat([tokens.double(), row_sums(best, backbone), *(part.double() for part in more)], dim=1)
