"""An exit rule that is trained on the outcomes of episodes (`ceed-vla reinforce`, after S-GRPO,
arXiv 2505.07686).

    head2.5x1x0x0.3x-1_cap3    the name contains the weights of its features, and the bias

So it needs no file of its own. In a checkpoint that has one, its name is ``learned``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ceed_vla.decoding.exits import Confidence, Seen
from ceed_vla.decoding.registry import register_exit
from ceed_vla.errors import ConfigError

FEATURES = ("least", "mean", "changed", "first")
_NUMBER = r"-?\d{1,3}(?:\.\d{1,3})?"


@dataclass
class Group:
    """The states of one decode path, and the outcome of the episode from each."""

    seed: int  # the episode's
    features: NDArray[np.float64]  # (K, F) features after each of K forwards
    # (K,) whether the episode was solved from that state; all None if all states execute the same
    # actions.
    solved: list[bool | None]


def features(seen: Seen, mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """The features (B, F) of every row.

    They are the log-odds of the `mass` (B, M) near the tokens, in the least certain watched slot
    and averaged over the slots; the share of watched tokens that the last iteration moved; and
    whether it was the first iteration.
    """
    odds = np.log(np.clip(mass, 1e-3, 1 - 1e-3)) - np.log1p(-np.clip(mass, 1e-3, 1 - 1e-3))
    moved = seen.moved[:, -mass.shape[1] :] > 0  # not the frozen slots
    first = np.full(len(mass), float(seen.iteration == 1))
    return np.stack([odds.min(1), odds.mean(1), moved.mean(1), first], axis=1)


@register_exit(rf"head(?P<weights>{_NUMBER}(?:x{_NUMBER})*)", "head<W>", "ends by a learned rule")
class Learned(Confidence):
    """The weighted sum of the `features`, plus the bias, is positive."""

    reason = "learned"
    field = ""
    ordered = True

    def __init__(self, weights: str) -> None:
        *self.weights, self.bias = (float(number) for number in weights.split("x"))
        if len(self.weights) != len(FEATURES):
            raise ConfigError(
                f"head{weights} has {len(self.weights)} weights and a bias; it must have one "
                f"weight for each of {FEATURES}, and a bias."
            )

    def ends(self, seen: Seen, measured: np.ndarray | None) -> NDArray[np.bool_]:
        assert measured is not None
        found: NDArray[np.bool_] = features(seen, measured) @ self.weights + self.bias > 0
        return found


def head_name(weights: NDArray[np.float64]) -> str:
    """The name of the rule with these weights, the bias last (F + 1,)."""
    return "head" + "x".join(f"{weight:.2f}".rstrip("0").rstrip(".") for weight in weights)
