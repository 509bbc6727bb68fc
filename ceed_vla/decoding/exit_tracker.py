"""Applies exit rules to a block after every iteration, and ends rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ceed_vla.decoding.exits import Cap, Deadline, ExitRule, Seen, exit_rules
from ceed_vla.decoding.rows import Rows
from ceed_vla.errors import ConfigError, raised_as

if TYPE_CHECKING:
    from ceed_vla.decoding.request import BlockRequest


class ExitTracker:
    """Exit rules of one block, and their measurements of its watched slots.

    Args:
        request: The block to decode.
        rows: Progress of the rows.
        watched: End ``M`` of the watched slots.
        frozen: Frozen tokens at the start, which are not measured.
        readable: Returns the rows (B,) bool whose tokens decode to a chunk.

    Attributes:
        rules: The rules, in order: the first that ends a row sets its exit reason.

    Raises:
        ConfigError: A rule does not fit the tokens.
    """

    def __init__(
        self,
        request: BlockRequest,
        rows: Rows,
        watched: int,
        frozen: int,
        readable: Callable[[], np.ndarray],
    ) -> None:
        self.rows = rows
        self.watched = watched
        self.frozen = frozen
        self.rules = _rules_of(request)
        self._readable = readable
        self._clock = request.clock
        self._last = request.clock()  # when the iteration before ended [s]
        self._started = self._last if request.started is None else request.started
        # Per rule (B, M - frozen), of the watched slots that are not frozen; None if it measures
        # nothing.
        self._measured: list[np.ndarray | None] = []

    def begin(self, slot_0: Sequence[np.ndarray | None]) -> None:
        """Take the measurement (B, 1) of slot 0 by every rule, None of a rule that measures
        nothing.
        """
        for values in slot_0:
            stored = None
            if values is not None:
                stored = np.zeros((len(values), self.watched - self.frozen))
                if not self.frozen:
                    stored[:, :1] = values
            self._measured.append(stored)

    def end_rows(
        self, iteration: int, start: int, moved: np.ndarray, measured: Sequence[np.ndarray]
    ) -> None:
        """Apply every rule after an iteration.

        Args:
            iteration: Iterations done, from 1.
            start: The first slot that the last iteration computed.
            moved: (B, M) bins by which it moved the watched tokens.
            measured: Per rule that measures, (B, w) of the ``w`` watched slots from `start` on.
        """
        if not self.rules:
            return
        values = iter(measured)
        for stored in self._measured:
            if stored is not None:
                stored[:, start - self.frozen :] = next(values)
        now = self._clock()
        elapsed = now - self._started
        last = now - self._last
        self._last = now
        seen = Seen(iteration, self.rows.exact, self.watched, moved, elapsed, last, self._readable)
        for rule, stored in zip(self.rules, self._measured, strict=True):
            ends = ended(rule, seen, stored)
            # Rows whose tokens do not decode to a chunk continue.
            self.rows.end(ends & self._readable() if np.any(ends) else ends, rule.reason, iteration)


def _rules_of(request: BlockRequest) -> tuple[ExitRule, ...]:
    """The rules of the request's decoding and its own deadline; earlier forwards lower the cap."""
    rules = exit_rules(request.config, request.ordered and request.stop is None)
    if used := request.forwards_before:
        rules = tuple(Cap(rule.most - used) if isinstance(rule, Cap) else rule for rule in rules)
    if request.deadline_s is not None:
        rules = (*rules, Deadline(request.deadline_s))
    return rules


def ended(rule: ExitRule, seen: Seen, measured: np.ndarray | None) -> np.ndarray | bool:
    """Call ``rule.ends``.

    Args:
        rule: The rule.
        seen: The state after an iteration.
        measured: (B, M - frozen) what the rule measured, or None.

    Returns:
        The rows that end, (B,) bool, or one bool for all rows.

    Raises:
        ConfigError: The rule fails, or returns anything else.
    """
    with raised_as(
        ConfigError, f"The exit rule {type(rule).__name__} does not work: ends", "correct it."
    ):
        rows = rule.ends(seen, measured)
        shape = seen.exact.shape
        if not isinstance(rows, bool) and not (
            isinstance(rows, np.ndarray) and rows.shape == shape
        ):
            raise TypeError(
                f"it returned {type(rows).__name__}, not a bool or a numpy array {shape}"
            )
    return rows
