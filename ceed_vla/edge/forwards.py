"""The forwards of a block on exported graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ceed_vla.decoding.exits import ExitRule
from ceed_vla.decoding.loop import Computed, Span
from ceed_vla.edge.slots import MEASURES, Cache, Slots
from ceed_vla.errors import ConfigError


def runs_anywhere(rule: type[ExitRule]) -> bool:
    """Whether an exit rule is one of `ceed_vla.decoding`, which every process knows."""
    return rule.__module__.startswith("ceed_vla.decoding.")


def check_rules(rules: Sequence[ExitRule]) -> None:
    """Raise `ConfigError` for an exit rule whose measurement the graphs do not have."""
    for rule in rules:
        if type(rule).measure not in MEASURES or not runs_anywhere(type(rule)):
            raise ConfigError(
                f"The exit rule {type(rule).__name__} does not run on an export; "
                "use conf<P>, gap<P>, agree<D>, changed<K>, cap<K> or deadline<MS>."
            )


class GraphForwards:
    """The `ceed_vla.decoding.loop.Forwards` of a block on exported graphs.

    Args:
        read: Computes the slots behind tokens (1, k) that follow a cache.
        prefix: What the prefix predicts for slot 0, and its keys and values.
        tokens: (1, n) int64 the state, changed in place.
        rules: Exit rules.
        watched: End ``M`` of the watched slots.
    """

    def __init__(
        self,
        read: Callable[[Cache, np.ndarray], Slots],
        prefix: Slots,
        tokens: np.ndarray,
        rules: Sequence[ExitRule],
        watched: int,
    ) -> None:
        self.tokens = tokens
        self._read = read
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
        """Compute the slots behind `tokens` (1, k), which follow the committed ones."""
        self._slots = self._read(self._cache, tokens)
        return self._slots
