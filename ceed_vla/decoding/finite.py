"""Scores that are no numbers end decoding: their argmax would be bin 0, a full action in every
dimension.

The sum of the largest scores of a row tells it, and travels with the tokens in a transfer that is
made anyway.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone
from ceed_vla.errors import NotFiniteError


def row_sums(best: Tensor, backbone: Backbone) -> Tensor:
    """Finite (B, 1) float32 if all the largest scores `best` (B, k) of a row are.

    Where a grammar forbids every token of a slot, -inf is legal; so it only looks for NaN and +inf.
    """
    if getattr(backbone, "grammar", None) is not None:
        best = best.clamp(min=0)  # keeps NaN
    return best.float().sum(1, keepdim=True)


def check_rows(sums: np.ndarray, running: np.ndarray | None = None) -> None:
    """Raise `NotFiniteError` if one of the `row_sums` (B, 1) is not finite in a row that is still
    running.
    """
    finite = np.isfinite(sums)
    if finite.all():
        return
    wrong = ~finite[:, 0] if running is None else ~finite[:, 0] & running
    if wrong.any():
        raise NotFiniteError(
            f"The scores are NaN or infinite in row {int(wrong.argmax())} ({int(wrong.sum())} of "
            f"{len(wrong)}); its weights or activations are broken, or its type is too small. Hold "
            "the robot; load it in float32."
        )


def to_host(tokens: Tensor, *more: Tensor) -> list[np.ndarray]:
    """Tokens (B, k) int64 and `more` (B, ...) float32 as arrays, in one transfer; on the CPU they
    share memory.

    Token ids travel as float32, which holds those below 2^24.
    """
    parts = [part.float() for part in more]
    if tokens.device.type == "cpu":
        return [tokens.numpy(), *(part.numpy() for part in parts)]
    widths = np.cumsum([tokens.shape[1], *(part.shape[1] for part in parts)])
    first, *rest = np.split(
        torch.cat([tokens.float(), *parts], dim=1).cpu().numpy(), widths[:-1], axis=1
    )
    return [first.astype(np.int64), *rest]
