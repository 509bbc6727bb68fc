"""A check for finite logits that needs no transfer of its own.

The argmax of non-finite logits would be bin 0, a full action in every dimension. They make the sum
of a row's largest logits non-finite, and that sum goes to the host with the tokens.
"""

from __future__ import annotations

import numpy as np

from ceed_vla.errors import NotFiniteError


def check_rows(sums: np.ndarray, running: np.ndarray | None = None) -> None:
    """Check the sums (B, 1) of the largest logits of the rows that are `running` (B,), or of all.

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
