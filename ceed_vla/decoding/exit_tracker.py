"""The exit rules of a block while it is decoded: what they measure, and which rows they end."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ceed_vla.decoding.exits import Cap, Deadline, ExitRule, Seen, exit_rules
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.rows import Rows
from ceed_vla.errors import ConfigError, raised_as


class ExitTracker:
    """Exit rules of one block, with what they have measured in its watched slots.

    Args:
        request: What is decoded.
        logits: Of slot 0 (B, V), which the prefix gives.
        tokens: The state (B, n), which changes in place.
        rows: What is known about the rows.
        watched: End ``M`` of the watched slots.
        given: Frozen tokens at the start, which are not measured.

    Raises:
        ConfigError: A rule that does not fit the tokens, or that fails.
    """

    def __init__(
        self,
        request: BlockRequest,
        logits: Tensor,
        tokens: Tensor,
        rows: Rows,
        *,
        watched: int,
        given: int,
    ) -> None:
        self.request = request
        self.tokens = tokens
        self.rows = rows
        self.watched = watched
        self.given = given
        self.rules = _rules_of(request)
        self.last = request.clock()  # when the iteration before ended [s]
        self.started = self.last if request.started is None else request.started
        # By rule, (B, M - given) of the watched slots that are free; None for nothing.
        self.kept = [self._first(rule, logits, tokens[:, :1]) for rule in self.rules]

    def _first(self, rule: ExitRule, logits: Tensor, tokens: Tensor) -> np.ndarray | None:
        slot = measure(rule, logits[:, None], tokens)  # (B, 1)
        if slot is None:
            return None
        values = np.zeros((len(logits), self.watched - self.given))
        if not self.given:
            values[:, :1] = slot.float().cpu().numpy()
        return values

    def measure(self, logits: Tensor, new: Tensor, first: int) -> list[Tensor]:
        """What the rules need of the slots from `first` on, of logits (B, k, V) and tokens (B, k).

        Each is (B, w), of the watched ones among them.
        """
        width = max(self.watched - first, 0)
        found = (measure(rule, logits[:, :width], new[:, :width]) for rule in self.rules)
        return [values for values in found if values is not None]

    def end_rows(
        self, iteration: int, first: int, moved: np.ndarray, measured: list[np.ndarray]
    ) -> None:
        """End the rows that a rule ends after an iteration.

        Args:
            iteration: Iterations done, from 1.
            first: The first slot that it computed.
            moved: (B, M) by how many bins it moved the watched tokens.
            measured: What `measure` returned, on the host.
        """
        if not self.rules:
            return
        values = iter(measured)
        for kept in self.kept:
            if kept is not None:
                kept[:, first - self.given :] = next(values)
        now = self.request.clock()
        elapsed = now - self.started
        last = now - self.last
        self.last = now

        def readable() -> np.ndarray:
            return self.request.rows_readable(self.tokens)

        seen = Seen(iteration, self.rows.exact, self.watched, moved, elapsed, last, readable)
        for rule, kept in zip(self.rules, self.kept, strict=True):
            ends = ended(rule, seen, kept)
            # Rows whose tokens do not decode to a chunk go on.
            self.rows.end(ends & readable() if np.any(ends) else ends, rule.reason, iteration)


def _rules_of(request: BlockRequest) -> tuple[ExitRule, ...]:
    """The rules of the request's decoding, with what has been used up of its cap, and the request's
    own deadline.
    """
    rules = exit_rules(request.config, request.ordered and request.stop is None)
    if used := request.forwards_before:
        rules = tuple(Cap(rule.most - used) if isinstance(rule, Cap) else rule for rule in rules)
    if request.deadline_s is not None:
        rules = (*rules, Deadline(request.deadline_s))
    return rules


def measure(rule: ExitRule, logits: Tensor, tokens: Tensor) -> Tensor | None:
    """What `rule` measures (B, k), or None; `ConfigError` if it fails or returns anything else."""
    with raised_as(
        ConfigError, f"The exit rule {type(rule).__name__} does not work: measure", "correct it."
    ):
        measured = rule.measure(logits, tokens)
        if measured is not None and getattr(measured, "shape", None) != tokens.shape:
            raise TypeError(
                f"it gave {type(measured).__name__}, not a tensor {tuple(tokens.shape)}"
            )
    return measured


def ended(rule: ExitRule, seen: Seen, measured: np.ndarray | None) -> np.ndarray | bool:
    """Which rows `rule` ends: (B,) bool, or one answer for all; `ConfigError` if it fails, or
    returns something else.
    """
    with raised_as(
        ConfigError, f"The exit rule {type(rule).__name__} does not work: ends", "correct it."
    ):
        rows = rule.ends(seen, measured)
        shape = seen.exact.shape
        if not isinstance(rows, bool) and not (
            isinstance(rows, np.ndarray) and rows.shape == shape
        ):
            raise TypeError(f"it gave {type(rows).__name__}, not a bool or a numpy array {shape}")
    return rows
