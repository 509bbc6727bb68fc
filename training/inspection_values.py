"""Statistics of the dimensions of state and actions, and which of them hardly change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.training.defaults import NEAR_ZERO, SPARSE

# A dimension is near-constant if any of these limits is passed.
MOSTLY = 0.99  # share of the values within NEARBY of the median
NEARBY = 0.01  # distance from the median over the range
LEAST_SPREAD = 0.01  # standard deviation over range
LEAST_RANGE = 1e-3  # range over the largest magnitude


@dataclass(frozen=True)
class Row:
    """One dimension: quantiles, shares of frames, number of distinct values."""

    name: str
    min: float
    q01: float
    median: float
    q99: float
    max: float
    std: float
    at_ends: float  # share of frames at the smallest or the largest value
    near_zero: float  # share of frames within NEAR_ZERO of the largest magnitude from zero
    nearby: float  # share of frames within NEARBY of the range from the median
    distinct: int

    @property
    def range(self) -> float:
        return self.max - self.min

    @property
    def unchanging(self) -> str:
        """Why the dimension is constant or near-constant; empty if it is neither."""
        if self.distinct == 1:
            return f"is constant ({self.min:.4g})"
        size = max(abs(self.min), abs(self.max))
        if self.range < LEAST_RANGE * size:
            return (
                f"is near-constant: its range of {self.range:.2g} is {self.range / size:.2g} of "
                "its largest value"
            )
        if self.nearby >= MOSTLY:
            return (
                f"is near-constant: {100 * self.nearby:.4g} % of its values lie within "
                f"{NEARBY:.0%} "
                f"of its range from the median {self.median:.4g}"
            )
        if self.std < LEAST_SPREAD * self.range:
            return (
                f"is near-constant: its standard deviation is {self.std / self.range:.2g} of its "
                "range"
            )
        return ""


def rows_of(values: NDArray[np.float32], names: list[Any] | None) -> list[Row]:
    """Statistics of each dimension of `values` (N, D)."""
    if not values.size:
        return []
    # (D,) each
    low, first, median, last, high = np.quantile(values, [0, 0.01, 0.5, 0.99, 1], axis=0)
    ends = (values == values.min(0)) | (values == values.max(0))
    zero = np.abs(values) <= NEAR_ZERO * np.abs(values).max(0)
    nearby = np.abs(values - median) <= NEARBY * np.ptp(values, axis=0)
    return [
        Row(
            name=str(names[d]) if names and len(names) == values.shape[1] else str(d),
            min=float(low[d]),
            q01=float(first[d]),
            median=float(median[d]),
            q99=float(last[d]),
            max=float(high[d]),
            std=float(values[:, d].std(dtype=np.float64)),
            at_ends=float(ends[:, d].mean()),
            near_zero=float(zero[:, d].mean()),
            nearby=float(nearby[:, d].mean()),
            distinct=len(np.unique(values[:, d])),
        )
        for d in range(values.shape[1])
    ]


def unchanging_dimensions(feature: str, rows: Sequence[Row], is_action: bool) -> list[str]:
    """Sentences about each constant or near-constant dimension: the reason, and its treatment."""
    return [
        f"{feature}, dimension {row.name!r}, {row.unchanging}. {_treatment(row, is_action)}"
        for row in rows
        if row.unchanging
    ]


def _treatment(row: Row, is_action: bool) -> str:
    if row.distinct == 1 and is_action:
        return "Its token is always the same, which is correct if this joint never moves."
    if row.distinct == 1:
        return "It has no information, and the policy is not trained on any other value."
    if not is_action:
        far = max(row.max - row.median, row.median - row.min) / row.std if row.std else 0.0
        return (
            f"The state is standardised: its rarest value is {far:.0f} standard deviations from "
            "the median. Check its unit."
        )
    if row.distinct == 2:
        return "Its two values are written as two tokens."
    if row.near_zero >= SPARSE:
        return (
            f"It is sparse (near zero in {row.near_zero:.1%} of the frames; the limit is "
            f"{SPARSE:.0%}), so its tokens span its extremes [{row.min:.4g}, {row.max:.4g}], not "
            "its quantiles."
        )
    return (
        f"Its tokens span its quantiles [{row.q01:.4g}, {row.q99:.4g}], which clips its rare "
        "values, unless --policy.action_tokens.action_low and .action_high are set."
    )


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for a report."""
    return [asdict(row) for row in rows]
