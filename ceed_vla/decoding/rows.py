"""Progress of every row of a block, on the host."""

from __future__ import annotations

import numpy as np


class Rows:
    """Progress of the rows of a block.

    Attributes:
        running: (B,) bool, rows without an exit reason.
        exact: (B,) leading tokens proven equal to greedy AR.
        iterations: (B,) iterations until the row ended.
        reasons: Exit reason of every row, None while it runs.
    """

    def __init__(self, batch: int, block_length: int, exact: int) -> None:
        self.block_length = block_length
        self.running = np.ones(batch, dtype=bool)
        self.exact: np.ndarray = np.full(batch, exact, dtype=np.int64)
        self.iterations = np.zeros(batch, dtype=np.int64)
        self.reasons: list[str | None] = [None] * batch

    @property
    def proven(self) -> int:
        """Leading tokens that are proven in every running row."""
        return int(self.exact[self.running].min())

    def accept(self, old: np.ndarray, new: np.ndarray, start: int) -> None:
        """Accept new tokens of the running rows up to and including the first that changed.

        That token is exact, because all slots in front of it were a fixed point already; without a
        change, every slot is exact. Tokens that are proven stay proven, even if the slots end
        before them.

        Args:
            old: (B, k) the tokens of the slots in the state before.
            new: (B, k) the tokens that a forward computed from that state.
            start: The slot that they begin with.
        """
        changed = new != old  # (B, k)
        proven = np.where(changed.any(1), changed.argmax(1) + 1, new.shape[1])  # (B,)
        self.exact = np.where(self.running, np.maximum(self.exact, start + proven), self.exact)

    def end(self, rows: np.ndarray | bool, reason: str, iteration: int) -> None:
        """End the running rows among `rows` (B,) bool; a row with a stop token is exact."""
        for row in np.flatnonzero(self.running & rows):
            self.reasons[row] = reason
            self.iterations[row] = iteration
            self.running[row] = False
            if reason == "stop":
                self.exact[row] = self.block_length

    def end_proven(self, watched: int, iteration: int) -> None:
        """End the rows whose block, or whose `watched` leading tokens, are proven."""
        stable = self.exact >= watched
        if stable.any():
            self.end(self.exact >= self.block_length, "converged", iteration)
            self.end(stable, "stable", iteration)

    @property
    def exit_reasons(self) -> list[str]:
        """Exit reason of every row, when all have ended."""
        return [reason or "converged" for reason in self.reasons]
