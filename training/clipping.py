"""Report the share of actions that a vocabulary clips, and refuse data if it is too large."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.frames import FrameStore
from ceed_vla.errors import ConfigError

logger = logging.getLogger(__name__)

MOST_CLIPPED = 0.01
FAR = 0.5  # of a range's width
COARSE = 1000.0  # width of a range over the width of the middle 98 % of the values
FEW_BINS = 4  # with fewer bins for the middle 98 % of the values, a warning says so
_REMEDY = "Correct the data, set a range that fits them, or allow it with --max_clipped"


def check_clipping(tokens: Any, stores: Sequence[FrameStore], most: float) -> None:
    """Log the share of the datasets' actions that a vocabulary clips, and check it.

    Ranges of quantiles clip up to 2 % of every dimension by construction, by a small amount.
    Therefore `most` limits the share of values that lie *far* outside: beyond an end by more than
    half the range's width, separately in each dimension.

    Args:
        tokens: The vocabulary (`ActionTokens`).
        stores: The datasets; those without actions are skipped.
        most: Largest share of values far outside in any dimension; 1 allows all.

    Raises:
        ConfigError: It names the dimension, the range and the share.
    """
    actions = [store.action for store in stores if store.action is not None]
    if actions and not tokens.normalised:  # a normalised range is not in the units of the data
        check_actions(tokens, np.concatenate(actions), most)


def check_actions(tokens: Any, actions: NDArray[np.float32], most: float) -> None:
    """`check_clipping` for actions (N, A)."""
    low, high = (end.double().cpu().numpy() for end in (tokens.low, tokens.high))  # (A,)
    values = actions.astype(np.float64)
    width = np.maximum(high - low, 1e-3)
    beyond = np.maximum(low - values, values - high) / width  # (N, A)
    # (A,)
    outside = (beyond > 1e-6).mean(0)
    far = (beyond > FAR).mean(0)
    logger.info(
        "%.2f %% of the action values lie outside the vocabulary's range and are clipped, %.2f %% "
        "far outside.",
        100 * outside.mean(),
        100 * far.mean(),
    )
    least, one, other, largest = np.quantile(values, [0, 0.01, 0.99, 1], axis=0)  # (A,)
    d = int(far.argmax())
    if far[d] > most:
        raise ConfigError(
            f"{far[d]:.1%} of the actions of dimension {d} lie far outside the vocabulary's range "
            f"[{low[d]:.4g}, {high[d]:.4g}]; at most {most:.1%} may. The data reach from "
            f"{least[d]:.4g} to {largest[d]:.4g}. {_REMEDY}."
        )
    reach = np.minimum(largest, high) - np.maximum(least, low)
    spread = np.where(
        (other > one) & (reach > width / 2), width / np.maximum(other - one, 1e-12), 0
    )
    d = int(spread.argmax())
    what = (
        f"98 % of the actions of dimension {d} lie in [{one[d]:.4g}, {other[d]:.4g}], but the "
        f"vocabulary's range is [{low[d]:.4g}, {high[d]:.4g}], because of a few extreme values"
    )
    if spread[d] > COARSE and most < 1:
        raise ConfigError(f"{what}: its bins cannot resolve the others. {_REMEDY}=1.")
    if tokens.ordered and spread[d] > (tokens.vocabulary_size - 1) / FEW_BINS:
        logger.warning(
            "%s: fewer than %d bins are left for the others. Look for wrong values in the data "
            "(`ceed-vla inspect`), or set a range.",
            what,
            FEW_BINS,
        )
