"""What is known about every row of a block, on the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ceed_vla.decoding.result import DecodeResult


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

    def accept(self, old: np.ndarray, new: np.ndarray, first: int) -> None:
        """Prove tokens of the running rows: `new` (B, k) was computed from `old` (B, k), from slot
        `first` on.

        The first changed slot is right now, as all slots before it were; no change proves every
        slot. A window that ends before what a row has proven already takes nothing back.
        """
        changed = new != old  # (B, k)
        proven = np.where(changed.any(1), changed.argmax(1) + 1, new.shape[1])  # (B,)
        self.exact = np.where(self.running, np.maximum(self.exact, first + proven), self.exact)

    def end(self, rows: np.ndarray | bool, reason: str, iteration: int) -> None:
        """End those of `rows` (B,) bool that run. Behind a stop token there is nothing to prove."""
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

    def result(self, tokens: Tensor, forwards: int, states: list[Tensor] | None) -> DecodeResult:
        """The result of decoding `tokens` (B, n)."""
        return DecodeResult(
            tokens=tokens,
            forwards=forwards,
            iterations=torch.from_numpy(self.iterations),
            exit_reason=[reason or "converged" for reason in self.reasons],
            exact_tokens=torch.from_numpy(self.exact),
            exact=torch.from_numpy(self.exact >= self.block_length),
            states=states,
        )
