"""The risk of a decoder: what was measured, and tests of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.sim.progress import Progress
from ceed_vla.sim.success import success_entry


@dataclass
class Measured:
    """Measurements of a decoder."""

    name: str
    risks: NDArray[np.float64]  # (E,) share of off chunks of every episode
    forwards: NDArray[np.float64]  # forwards of every chunk
    layers: NDArray[np.float64]  # layers of every chunk, block and prefix
    solved: list[bool]  # whether every episode was solved
    # shortest deadline that allows this number of forwards; None if it is not bounded
    deadline_ms: float | None = None

    def entry(self, epsilons: Sequence[float]) -> dict[str, Any]:
        """Return the entry of the report."""
        return {
            "risk": round(float(self.risks.mean()), 5),
            "risk_ci95": [round(v, 5) for v in bootstrap(self.risks)],
            "risk_upper95": round(upper_bound(self.risks), 5),
            "p_values": {str(e): round(p_value(self.risks, e), 6) for e in epsilons},
            "forwards_mean": round(float(self.forwards.mean()), 4),
            "forwards_p95": float(np.percentile(self.forwards, 95)),
            "layers_mean": round(float(self.layers.mean()), 4),
            **({} if self.deadline_ms is None else {"deadline_ms": self.deadline_ms}),
            **success_entry(self.solved),
        }


def p_value(risks: NDArray[np.float64], epsilon: float) -> float:
    """P-value of the hypothesis that the expected risk exceeds `epsilon` (Hoeffding-Bentkus).

    Args:
        risks: Risk of every episode (E,), in [0, 1].
        epsilon: Bound of the risk.
    """
    n = len(risks)
    mean = float(risks.mean())
    if mean >= epsilon:
        return 1.0
    left = mean * np.log(mean / epsilon) if mean else 0.0
    relative = left + (1 - mean) * np.log((1 - mean) / (1 - epsilon))
    k = np.arange(math.ceil(n * mean - 1e-9) + 1)
    ways = math.lgamma(n + 1) - np.array(
        [math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in k.tolist()]
    )
    at_most = np.exp(ways + k * np.log(epsilon) + (n - k) * np.log1p(-epsilon)).sum()
    return float(min(np.exp(-n * relative), np.e * at_most, 1.0))


def upper_bound(risks: NDArray[np.float64], alpha: float = 0.05) -> float:
    """Upper bound of the expected risk at confidence 1 - `alpha`: the inverse of `p_value`."""
    low = float(risks.mean())
    high = 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if middle < 1 and p_value(risks, middle) <= alpha else (middle, high)
        )
    return high


def bootstrap(risks: NDArray[np.float64], draws: int = 10_000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean over episodes.

    It is [0, 0] if no chunk was off; use `upper_bound` then.
    """
    picks = np.random.default_rng(0).integers(len(risks), size=(draws, len(risks)))
    low, high = np.percentile(risks[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def measured_row(progress: Progress, name: str, measure: Callable[[str], Measured]) -> Measured:
    """Return the measurements of the decoder `name`, which are made if there are none.

    `ConfigError` if what an interrupted run has left cannot be measurements.
    """
    return progress.measured(name, lambda: _as_json(measure(name)), partial(_measured, name))


def _as_json(row: Measured) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in asdict(row).items()
        if name not in ("name", "deadline_ms")
    }


def _measured(name: str, row: Any) -> Measured:
    """Read the measurements in a file; `ValueError` and others for values that cannot be some."""
    risks, forwards, layers = (
        np.array(row[key], dtype=np.float64) for key in ("risks", "forwards", "layers")
    )
    solved = [bool(one) for one in row["solved"]]
    shapes = (risks.shape, forwards.shape) == ((len(solved),), layers.shape)
    values = np.concatenate([risks.ravel(), forwards.ravel(), layers.ravel()])
    if not (shapes and solved and len(forwards) and np.isfinite(values).all()):
        raise ValueError(name)
    return Measured(name, risks, forwards, layers, solved)
