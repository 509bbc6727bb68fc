"""Intervals and tests for the paired difference of two decoders on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ceed_vla.sim.success import wilson_interval


def paired_interval(
    both: int, only_first: int, only_second: int, neither: int
) -> tuple[float, float, float]:
    """Difference of two proportions measured on the same episodes, with its 95 % interval.

    Newcombe's method 10 (Statistics in Medicine 17, 1998): Wilson's intervals of both proportions,
    combined by the square-and-add rule with their correlation. Its coverage also holds with few or
    no discordant pairs.

    Args:
        both: Episodes that both decoders solved.
        only_first: Episodes that only the first decoder solved.
        only_second: Episodes that only the second decoder solved.
        neither: Episodes that neither decoder solved.

    Returns:
        First proportion minus the second one, lower bound, upper bound.
    """
    a = both
    b = only_first
    c = only_second
    d = neither
    n = a + b + c + d
    first = (a + b) / n
    second = (a + c) / n
    low_1, high_1 = wilson_interval(a + b, n)
    low_2, high_2 = wilson_interval(a + c, n)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    determinant = float(a * d - b * c)
    if determinant > 0:  # continuity correction
        determinant = max(determinant - n / 2, 0.0)
    phi = determinant / math.sqrt(product) if product else 0.0

    def half(own: float, other: float) -> float:
        return math.sqrt(max(own**2 - 2 * phi * own * other + other**2, 0.0))

    difference = first - second
    return (
        difference,
        max(difference - half(first - low_1, high_2 - second), -1.0),
        min(difference + half(high_1 - first, second - low_2), 1.0),
    )


def sign_test(only_first: int, only_second: int) -> float:
    """Two-sided exact sign test on the discordant pairs (exact McNemar); 1 without any."""
    n = only_first + only_second
    one_sided = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * one_sided)


def compare_paired(first: Mapping[int, bool], second: Mapping[int, bool]) -> dict[str, Any]:
    """Compare the success of two decoders on their common seeds, in percentage points.

    Args:
        first: Success by seed.
        second: Success by seed; at least one seed is common.
    """
    seeds = first.keys() & second.keys()
    counts = [[0, 0], [0, 0]]
    for seed in seeds:
        counts[bool(first[seed])][bool(second[seed])] += 1
    both = counts[1][1]
    only_first = counts[1][0]
    only_second = counts[0][1]
    neither = counts[0][0]
    difference, low, high = paired_interval(both, only_first, only_second, neither)
    return {
        "episodes": len(seeds),
        "only_this": only_first,
        "only_reference": only_second,
        "difference_points": round(100 * difference, 2),
        "ci95_points": [round(100 * low, 2), round(100 * high, 2)],
        "sign_test_p": sign_test(only_first, only_second),
    }
