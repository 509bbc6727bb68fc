"""Rates of solved episodes, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a success rate; (0, 1) without trials.

    The default normal quantile `z` gives 95 %.
    """
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def success_entry(solved: Iterable[bool]) -> dict[str, Any]:
    """Report entry of episodes: their number, the number solved, and the rate with its interval."""
    outcomes = list(solved)
    success = sum(outcomes)
    count = len(outcomes)
    return {
        "success": success,
        "episodes": count,
        "success_rate": round(success / count, 4) if count else None,
        "success_ci95": [round(bound, 4) for bound in wilson_interval(success, count)],
    }
