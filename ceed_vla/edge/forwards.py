"""The forwards of a block on exported graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ceed_vla.decoding.exits import Confidence, ExitRule, Gap
from ceed_vla.decoding.loop import Computed, Span
from ceed_vla.edge.sessions import run
from ceed_vla.errors import ConfigError

# What a graph measures of its slots, by the method of the rules that need it.
_MEASURES: dict[Any, str | None] = {
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

    def measured(self, rules: Sequence[ExitRule]) -> list[np.ndarray | None]:
        """Per rule its measurement (1, k), None of a rule that measures nothing."""
        names = [_MEASURES[type(rule).measure] for rule in rules]
        return [None if name is None else getattr(self, name) for name in names]


def runs_anywhere(rule: type[ExitRule]) -> bool:
    """Whether an exit rule is one of `ceed_vla.decoding`, which every process knows."""
    return rule.__module__.startswith("ceed_vla.decoding.")


def check_rules(rules: Sequence[ExitRule]) -> None:
    """Raise `ConfigError` for an exit rule whose measurement the graphs do not have."""
    for rule in rules:
        if type(rule).measure not in _MEASURES or not runs_anywhere(type(rule)):
            raise ConfigError(
                f"The exit rule {type(rule).__name__} does not run on an export; "
                "use conf<P>, gap<P>, agree<D>, changed<K>, cap<K> or deadline<MS>."
            )


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


def read_tokens(session: Any, cache: Cache, tokens: np.ndarray) -> Slots:
    """Run the block's `session` on `tokens` (1, k) behind the positions of `cache`."""
    inputs = {
        "keys": cache.keys,
        "values": cache.values,
        "committed": np.array([cache.committed]),
        "read": np.ascontiguousarray(tokens),
    }
    return Slots(run(session, inputs))


class GraphForwards:
    """The `ceed_vla.decoding.loop.Forwards` of a block on exported graphs.

    Args:
        session: The block's session.
        prefix: What the trunk returned.
        tokens: (1, n) int64 the state, changed in place.
        rules: Exit rules.
        watched: End ``M`` of the watched slots.
    """

    def __init__(
        self,
        session: Any,
        prefix: Slots,
        tokens: np.ndarray,
        rules: Sequence[ExitRule],
        watched: int,
    ) -> None:
        self.tokens = tokens
        self._session = session
        self._cache = Cache(prefix)
        self._rules = rules
        self._watched = watched
        self._unchecked = prefix.total  # (1, k) of logits that are not checked yet
        self._slots: Slots | None = None

    @property
    def committed(self) -> int:
        return self._cache.committed

    def commit(self, count: int) -> None:
        assert self._slots is not None
        self._cache.append(self._slots, count)

    def iterate(self, span: Span, running: np.ndarray) -> Computed:
        slots = self.read(self.tokens[:, self.committed : span.end - 1])
        skipped = span.start - self.committed - 1
        new = slots.tokens[:, skipped:]  # (1, k)
        self.tokens[:, span.start : span.end] = new
        width = max(self._watched - span.start, 0)
        values = (m for m in slots.measured(self._rules) if m is not None)
        sums = slots.total[:, skipped:].sum(1, keepdims=True) + self._unchecked.sum()
        self._unchecked = np.zeros(0, np.float32)
        return Computed(new, sums, [m[:, skipped : skipped + width] for m in values])

    def read(self, tokens: np.ndarray) -> Slots:
        """Run the block's graph on `tokens` (1, k) behind the committed ones."""
        self._slots = read_tokens(self._session, self._cache, tokens)
        return self._slots
