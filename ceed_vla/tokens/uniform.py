"""Uniform action tokens: one uniform grid of bin centres per action dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ceed_vla.errors import ConfigError
from ceed_vla.fields import chosen, ranged, short
from ceed_vla.tensors import check_actions, check_tokens, numbers, whole
from ceed_vla.tokens.base import ACTIONS, ActionTokens, ActionTokensConfig, check_ends, from_front

# Mode -> statistics of the data that are the lower and the upper end.
RANGE_MODES = {
    "quantile": ("q01", "q99"),
    "min_max": ("min", "max"),
}
ACTION_RANGES = (*RANGE_MODES, "fixed")
MOST_BINS, MOST_STEPS = 65_536, 4096
LARGEST = 1e30  # end of a range [action units]
_LEAST_WIDTH = 1e-3  # of a range, so that a dimension that never moves has distinct bins too


@ActionTokensConfig.register_subclass("uniform")
@dataclass
class UniformTokensConfig(ActionTokensConfig):
    """One uniform grid of bin centres for every action dimension (`ActionTokenizer`).

    Attributes:
        num_bins: Number of values of an action token. With an odd number, zero is a bin centre.
        action_range: Ends of the bins: "quantile" (1 % and 99 % of the data), "min_max" (of the
            data), or "fixed" (`action_low`, `action_high`). Quantiles are wrong for dimensions that
            are nearly always zero.
        action_low: Lower end of every action dimension [the dataset's units]; set from the data
            unless fixed.
        action_high: Upper end of every action dimension [the dataset's units].
        gripper_dims: Two-valued action dimensions, with the range min/max, which decodes exactly.
            Training from data replaces [-1] by the dimensions with two values; count from the
            front to force one.
    """

    listed = ("action_low", "action_high")

    num_bins: int = ranged(255, "[2, 65536]")
    action_range: str = chosen("quantile", ACTION_RANGES)
    action_low: list[float] = ranged([], ACTIONS)
    action_high: list[float] = ranged([], ACTIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ends(self.action_low, self.action_high)
        if self.action_range == "fixed" and not self.action_low:
            raise ConfigError(
                'action_range "fixed" needs action_low and action_high, one value per dimension.'
            )

    @property
    def vocabulary_size(self) -> int:
        return self.num_bins

    def fit(self, action_dim: int, action_stats: Mapping[str, Any] | None) -> None:
        if self.action_low:
            return
        if action_stats is None:
            raise ConfigError(
                f'action_range is "{self.action_range}", but there are no action statistics of a '
                'dataset; pass them, or set action_range="fixed" with action_low and action_high.'
            )
        grippers = self.gripper_indices(action_dim)
        ranges = ranges_from_stats(action_stats, self.action_range, grippers, self.num_bins)
        self.action_low, self.action_high = ranges

    def build(self, chunk_steps: int, action_dim: int) -> ActionTokens:
        return ActionTokenizer(
            self.action_low, self.action_high, chunk_steps, self.num_bins, self.gripper_dims
        )


class ActionTokenizer(ActionTokens):
    """Converts a chunk of ``m`` actions with ``A`` dimensions to ``n = m * A`` tokens, step-major.

    Token ``v`` of dimension ``d`` stands for ``low[d] + v * (high[d] - low[d]) / (num_bins - 1)``
    [action units]: tokens are bin centres, and both ends are exact. With an odd `num_bins` and a
    range symmetric about zero, zero is exactly the middle bin, so "do not move" has no error.
    Values outside a range are clipped and counted.

    Args:
        low: (A,) smallest actions [action units].
        high: (A,) largest actions [action units].
        chunk_steps: Steps ``m`` of a chunk.
        num_bins: Values ``V`` of a token.
        gripper_dims: Two-valued dimensions, whose values should be the ends of their ranges.

    Raises:
        ConfigError: The ranges do not define a grid.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        chunk_steps: int,
        num_bins: int = 255,
        gripper_dims: Sequence[int] = (),
    ) -> None:
        low = numbers(low, "low")
        high = numbers(high, "high")
        gripper_dims = whole(gripper_dims, "gripper_dims")
        if len(low) != len(high) or len(low) == 0:
            raise ConfigError(
                f"low has {len(low)} values and high {len(high)}; pass one of each per dimension."
            )
        chunk_steps, num_bins = whole((chunk_steps, num_bins), "chunk_steps and num_bins")
        if (
            not 1 <= chunk_steps <= MOST_STEPS
            or not 2 <= num_bins <= MOST_BINS
            or len(low) > MOST_STEPS
        ):
            raise ConfigError(
                f"chunk_steps is {chunk_steps} (1 to {MOST_STEPS}), num_bins {num_bins} (2 to "
                f"{MOST_BINS}), and there are {len(low)} dimensions (1 to {MOST_STEPS})."
            )
        self.action_dim = self.tokens_per_step = len(low)
        self.chunk_steps = chunk_steps
        self.block_length = chunk_steps * len(low)
        self.vocabulary_size = num_bins
        self.gripper_dims = from_front(gripper_dims, self.action_dim)
        # float64, so that the nearest bin does not depend on the rounding of a float32 grid.
        self.low = torch.tensor(low, dtype=torch.float64)  # (A,)
        self.high = torch.tensor(high, dtype=torch.float64)  # (A,)
        width = (self.high - self.low) / (self.vocabulary_size - 1)
        ordered = (self.low.abs() < LARGEST) & (self.high.abs() < LARGEST) & (width > 1 / LARGEST)
        if not bool(ordered.all()):
            d = int((~ordered).nonzero()[0])
            raise ConfigError(
                f"Dimension {d} has the range [{low[d]}, {high[d]}]; low must be below high, both "
                f"within {LARGEST:g}. Set a wider range if the dimension never moves."
            )
        self.step = width  # (A,) distance of two bin centres
        # (V, 1)
        v = torch.arange(num_bins, dtype=torch.float64).unsqueeze(1)
        top = num_bins - 1
        # As weighted means of the ends, v and top - v of a symmetric range are exactly opposite.
        self._centres = (((top - v) * self.low + v * self.high) / top).float()  # (V, A)
        if not bool((self._centres[1:] > self._centres[:-1]).all()):
            raise ConfigError(
                f"{num_bins} bins in the ranges {short(list(zip(low, high, strict=True)))} are not "
                "distinct in float32; widen the ranges or lower num_bins."
            )
        nearest = (-self.low / self.step).round().clamp(0, self.vocabulary_size - 1).long()  # (A,)
        self.zero = nearest.repeat(self.chunk_steps)

    def encode(self, actions: Tensor) -> Tensor:
        check_actions(actions, self.chunk_steps, self.action_dim)
        actions = actions.double()
        # (B, m, A), in bins
        bins = (actions - self.low.to(actions.device)) / self.step.to(actions.device)
        slack = 1e-3  # a float32 value at a range end must not count as out of range
        self.clipped += int(((bins < -slack) | (bins > self.vocabulary_size - 1 + slack)).sum())
        return bins.round().clamp(0, self.vocabulary_size - 1).long().flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, "tokens", (None, self.block_length), self.vocabulary_size)
        steps = tokens.long().view(-1, self.chunk_steps, self.action_dim)  # (B, m, A)
        return (
            self._centres.to(tokens.device)
            .gather(0, steps.reshape(-1, self.action_dim))
            .view(steps.shape)
        )


def ranges_from_stats(
    stats: Mapping[str, Any], mode: str, gripper_dims: Sequence[int] = (), num_bins: int = 255
) -> tuple[list[float], list[float]]:
    """Compute the ranges of an `ActionTokenizer` from the action statistics of a dataset.

    With an odd `num_bins`, ranges on both sides of zero become symmetric about zero, so that zero
    is a bin centre. If zero lies among the values, but outside the range and near it, it becomes an
    end; a range far from zero does not grow because of one stray value. Gripper dimensions have the
    range min/max, which decodes exactly. Dimensions that never move have a small range around their
    value.

    Args:
        stats: ``dataset.meta.stats["action"]``: "min" and "max", and for quantiles "q01" and "q99",
            each (A,).
        mode: "quantile" (1 % to 99 %; robust, but wrong for dimensions that are nearly always zero)
            or "min_max".
        gripper_dims: Two-valued dimensions.
        num_bins: Values ``V`` of a token.

    Returns:
        Lower and upper ends (A,) [action units].

    Raises:
        ConfigError: Statistics are missing or wrong, or `mode` is unknown.
    """
    if not isinstance(stats, Mapping):
        raise ConfigError(
            f"The action statistics are {short(stats)}; pass those of a LeRobot dataset."
        )
    if mode not in RANGE_MODES:
        raise ConfigError(f"The range mode is {mode!r}; choose one of {', '.join(RANGE_MODES)}.")
    low, high = (_statistic(stats, key) for key in RANGE_MODES[mode])
    least = _statistic(stats, "min")
    most = _statistic(stats, "max")
    if not len(low) == len(high) == len(least) == len(most):
        raise ConfigError("The action statistics differ in length; recompute those of the dataset.")
    grippers = from_front(gripper_dims, len(low))
    for d in range(len(low)):
        if d in grippers:
            low[d], high[d] = least[d], most[d]
        elif num_bins % 2 and low[d] < 0.0 < high[d]:
            reach = max(abs(low[d]), abs(high[d]))
            low[d], high[d] = -reach, reach
        elif num_bins % 2 and least[d] <= 0.0 <= most[d]:
            width = high[d] - low[d]
            if width == 0.0 or min(abs(low[d]), abs(high[d])) <= width:
                low[d], high[d] = min(low[d], 0.0), max(high[d], 0.0)
        # float32 resolves large values less finely.
        width = max(_LEAST_WIDTH, 2**-21 * num_bins * max(abs(low[d]), abs(high[d])))
        if high[d] - low[d] < width:
            middle = (low[d] + high[d]) / 2
            low[d], high[d] = middle - width / 2, middle + width / 2
    return low, high


def _statistic(stats: Mapping[str, Any], key: str) -> list[float]:
    if key not in stats:
        raise ConfigError(
            f"The action statistics lack {key!r} (they have "
            f"{', '.join(sorted(stats)) or 'nothing'}); recompute the statistics of the dataset, "
            'or use action_range "fixed".'
        )
    values = numbers(stats[key], f"The action statistic {key!r}")
    if not all(map(math.isfinite, values)):
        raise ConfigError(f"The action statistic {key!r} is {values}; all values must be finite.")
    return values
