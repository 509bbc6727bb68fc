"""Applies exit rules to a block: measures its slots after every iteration, and ends rows."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ceed_vla.decoding.exits import Cap, Deadline, ExitRule, Seen, exit_rules
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.rows import Rows
from ceed_vla.errors import ConfigError, raised_as


class ExitTracker:
    """Exit rules of one block, and their measurements of its watched slots.

    Args:
        request: The block to decode.
        logits: (B, V) of slot 0, from the prefix.
        tokens: (B, n) the state, which changes in place.
        rows: Progress of the rows.
        watched: End ``M`` of the watched slots.
        frozen: Frozen tokens at the start, which are not measured.

    Raises:
        ConfigError: A rule does not fit the tokens, or fails.
    """

    def __init__(
        self,
        request: BlockRequest,
        logits: Tensor,
        tokens: Tensor,
        rows: Rows,
        *,
        watched: int,
        frozen: int,
    ) -> None:
        self.request = request
        self.tokens = tokens
        self.rows = rows
        self.watched = watched
        self.frozen = frozen
        self.rules = _rules_of(request)
        self.last = request.clock()  # when the iteration before ended [s]
        self.started = self.last if request.started is None else request.started
        # Per rule (B, M - frozen), of the watched slots that are not frozen; None if it measures
        # nothing.
        self.measured = [self._slot_0(rule, logits, tokens[:, :1]) for rule in self.rules]

    def _slot_0(self, rule: ExitRule, logits: Tensor, tokens: Tensor) -> np.ndarray | None:
        slot = measure(rule, logits[:, None], tokens)  # (B, 1)
        if slot is None:
            return None
        values = np.zeros((len(logits), self.watched - self.frozen))
        if not self.frozen:
            values[:, :1] = slot.float().cpu().numpy()
        return values

    def measure(self, logits: Tensor, new: Tensor, start: int) -> list[Tensor]:
        """Measure the watched slots from `start` on; rules that measure nothing are left out.

        Args:
            logits: (B, k, V) of the slots from `start` on.
            new: (B, k) their tokens.
            start: The slot that they begin with.

        Returns:
            (B, w) for every other rule, of the ``w`` watched slots among them.
        """
        width = max(self.watched - start, 0)
        found = (measure(rule, logits[:, :width], new[:, :width]) for rule in self.rules)
        return [values for values in found if values is not None]

    def end_rows(
        self, iteration: int, start: int, moved: np.ndarray, measured: list[np.ndarray]
    ) -> None:
        """Apply every rule after an iteration.

        Args:
            iteration: Iterations done, from 1.
            start: The first slot that the last iteration computed.
            moved: (B, M) bins by which it moved the watched tokens.
            measured: The values that `measure` returned, on the host.
        """
        if not self.rules:
            return
        values = iter(measured)
        for stored in self.measured:
            if stored is not None:
                stored[:, start - self.frozen :] = next(values)
        now = self.request.clock()
        elapsed = now - self.started
        last = now - self.last
        self.last = now

        def readable() -> np.ndarray:
            return self.request.rows_readable(self.tokens)

        seen = Seen(iteration, self.rows.exact, self.watched, moved, elapsed, last, readable)
        for rule, stored in zip(self.rules, self.measured, strict=True):
            ends = ended(rule, seen, stored)
            # Rows whose tokens do not decode to a chunk continue.
            self.rows.end(ends & readable() if np.any(ends) else ends, rule.reason, iteration)


def _rules_of(request: BlockRequest) -> tuple[ExitRule, ...]:
    """The rules of the request's decoding and its own deadline; earlier forwards lower the cap."""
    rules = exit_rules(request.config, request.ordered and request.stop is None)
    if used := request.forwards_before:
        rules = tuple(Cap(rule.most - used) if isinstance(rule, Cap) else rule for rule in rules)
    if request.deadline_s is not None:
        rules = (*rules, Deadline(request.deadline_s))
    return rules


def measure(rule: ExitRule, logits: Tensor, tokens: Tensor) -> Tensor | None:
    """Call ``rule.measure``.

    Args:
        rule: The rule.
        logits: (B, k, V) of k slots.
        tokens: (B, k) their tokens.

    Returns:
        The values (B, k), or None.

    Raises:
        ConfigError: The rule fails, or returns anything else.
    """
    with raised_as(
        ConfigError, f"The exit rule {type(rule).__name__} does not work: measure", "correct it."
    ):
        measured = rule.measure(logits, tokens)
        if measured is not None and getattr(measured, "shape", None) != tokens.shape:
            raise TypeError(
                f"it returned {type(measured).__name__}, not a tensor {tuple(tokens.shape)}"
            )
    return measured


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
