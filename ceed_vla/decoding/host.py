"""Results of a forward on the host: tokens, measurements of exit rules, and a check for finite
logits, in one transfer.

The argmax of non-finite logits would be bin 0, a full action in every dimension. They make the sum
of a row's largest logits non-finite, and that sum goes to the host with the tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ceed_vla.errors import NotFiniteError


def row_sums(best: Tensor) -> Tensor:
    """Sums (B, 1) float32 of the largest logits `best` (B, k), finite if all of a row are."""
    return best.float().sum(1, keepdim=True)


def check_rows(sums: np.ndarray, running: np.ndarray | None = None) -> None:
    """Check the `row_sums` (B, 1) of the rows that are `running` (B,), or of all rows.

    Raises:
        NotFiniteError: The logits of a row are NaN or infinite.
    """
    finite = np.isfinite(sums)
    if finite.all():
        return
    wrong = ~finite[:, 0] if running is None else ~finite[:, 0] & running
    if wrong.any():
        raise NotFiniteError(
            f"The scores are NaN or infinite in row {int(wrong.argmax())} ({int(wrong.sum())} of "
            f"{len(wrong)}); the model's weights or activations are damaged, or its dtype is too "
            "small. Hold the robot; load the model in float32."
        )


def to_host(tokens: Tensor, *more: Tensor) -> list[np.ndarray]:
    """Tokens (B, k) int64 and `more` (B, ...) float32 as arrays, in one transfer.

    On the CPU the arrays share the tensors' memory. From other devices, token ids are transferred
    as float32, which represents ids below 2^24 exactly.
    """
    parts = [part.float() for part in more]
    if tokens.device.type == "cpu":
        return [tokens.numpy(), *(part.numpy() for part in parts)]
    widths = np.cumsum([tokens.shape[1], *(part.shape[1] for part in parts)])
    together = torch.cat([tokens.float(), *parts], dim=1).cpu().numpy()
    ids, *rest = np.split(together, widths[:-1], axis=1)
    return [ids.astype(np.int64), *rest]
