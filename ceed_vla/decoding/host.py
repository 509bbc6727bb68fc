"""What the host learns of a forward: new tokens, what exit rules measure, and whether scores are
finite, in one transfer.

The argmax of non-finite scores would be bin 0, a full action in every dimension. The sum of a row's
largest scores shows them, and travels with the tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ceed_vla.errors import NotFiniteError


def row_sums(best: Tensor) -> Tensor:
    """Sums (B, 1) float32 of the largest scores `best` (B, k), finite if all of a row are."""
    return best.float().sum(1, keepdim=True)


def check_rows(sums: np.ndarray, running: np.ndarray | None = None) -> None:
    """Check the `row_sums` (B, 1) of the rows that are `running` (B,), or of all.

    Raises:
        NotFiniteError: The scores of a row are NaN or infinite.
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

    Token ids travel as float32, which represents those below 2^24 exactly.
    """
    parts = [part.float() for part in more]
    if tokens.device.type == "cpu":
        return [tokens.numpy(), *(part.numpy() for part in parts)]
    widths = np.cumsum([tokens.shape[1], *(part.shape[1] for part in parts)])
    together = torch.cat([tokens.float(), *parts], dim=1).cpu().numpy()
    first, *rest = np.split(together, widths[:-1], axis=1)
    return [first.astype(np.int64), *rest]
