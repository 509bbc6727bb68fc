"""What the graphs of an export return for slots of a block, and the cache in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ceed_vla.decoding.exits import Confidence, ExitRule, Gap

# What a graph measures of its slots, by the method of the rules that need it.
MEASURES: dict[Any, str | None] = {
    ExitRule.measure: None,
    Confidence.measure: "mass",
    Gap.measure: "lead",
}


class Slots:
    """What a graph returned for k slots.

    Attributes:
        tokens: (1, k) int64.
        total: (1, k) log-sum of the logits, not finite if one of them is NaN or +inf.
        mass: (1, k) see `ceed_vla.decoding.measures.mass_near`.
        lead: (1, k) see `ceed_vla.decoding.measures.lead`.
        keys: (layers, heads, positions, width) of the tokens that were read.
        values: As `keys`.
    """

    def __init__(self, outputs: Sequence[np.ndarray]) -> None:
        self.tokens, self.total, self.mass, self.lead, self.keys, self.values = outputs

    def last(self) -> Slots:
        """The last slot alone, with the keys and values of all tokens."""
        slots = (self.tokens, self.total, self.mass, self.lead)
        return Slots([*(values[:, -1:] for values in slots), self.keys, self.values])

    def measured(self, rules: Sequence[ExitRule]) -> list[np.ndarray | None]:
        """Per rule its measurement (1, k), None of a rule that measures nothing."""
        names = [MEASURES[type(rule).measure] for rule in rules]
        return [None if name is None else getattr(self, name) for name in names]


class Cache:
    """Keys and values of a prefix and of the committed tokens behind it.

    Attributes:
        keys: (layers, heads, positions, width) float32.
        values: As `keys`.
        committed: Block tokens among the positions.
    """

    def __init__(self, prefix: Slots) -> None:
        self.keys, self.values = prefix.keys, prefix.values
        self.committed = 0

    def append(self, slots: Slots, count: int) -> None:
        """Commit the first `count` tokens that a graph read."""
        self.keys = np.concatenate([self.keys, slots.keys[:, :, :count]], axis=2)
        self.values = np.concatenate([self.values, slots.values[:, :, :count]], axis=2)
        self.committed += count
