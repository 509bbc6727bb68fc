"""Frames to draw at a step when decoding one decodes its neighbours too: they come from windows
that take turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.frames import FrameStore


class SlidingWindows:
    """Draws rows from `most` windows at a time; these slide through all windows, shuffled anew for
    every pass.

    A window that has been open for as many draws as it has rows, on average, gives way to the next:
    an epoch decodes every window once. What is drawn follows from the seed and the rows drawn
    before: a resumed run needs no state.

    Args:
        edges: First row of every window, and one past the last row (W + 1,).
        most: Windows that are open at once, fewer than W.
        seed: Seed of the order.
        rows: What is drawn (N,), in the order that `edges` counts; 0..N-1 if None.
    """

    def __init__(
        self, edges: NDArray[np.int64], most: int, seed: int, rows: NDArray[np.int64] | None = None
    ) -> None:
        self.edges = edges
        self.most = most
        self.rows = rows
        self.count = len(edges) - 1
        # Two passes at most are open at once.
        self._pass = lru_cache(2)(
            lambda number: np.random.default_rng([seed, number, 2]).permutation(self.count)
        )

    def open(self, drawn: float) -> NDArray[np.int64]:
        """The windows that are open when so many rows have been drawn."""
        first = int(drawn * self.count / int(self.edges[-1]))
        places = range(first, first + self.most)
        return np.array([self._pass(place // self.count)[place % self.count] for place in places])

    def draw(self, random: np.random.Generator, size: int, drawn: float) -> NDArray[np.int64]:
        """Rows (size,), each of the open windows' rows as likely as any other; the steps before
        drew `drawn`.
        """
        windows = self.open(drawn)
        ends = np.cumsum(self.edges[windows + 1] - self.edges[windows])
        picks = random.integers(int(ends[-1]), size=size)
        places = np.searchsorted(ends, picks, side="right")
        found = self.edges[windows[places] + 1] - ends[places] + picks
        return found if self.rows is None else self.rows[found]


def sliding(
    edges: NDArray[np.int64], most: float, seed: int, rows: NDArray[np.int64] | None = None
) -> SlidingWindows | None:
    """None if `most` windows are all: then it is drawn from all rows at any time, streamed or
    not.
    """
    return SlidingWindows(edges, max(1, int(most)), seed, rows) if most < len(edges) - 1 else None


def row_windows(
    stores: Sequence[FrameStore],
    root: NDArray[np.int64],
    frame: NDArray[np.int64],
    rows: NDArray[np.int64],
    seed: int,
) -> SlidingWindows | None:
    """Windows of `rows` (R,) of a table over data sets: in row i, frame ``frame[i]`` of
    ``stores[root[i]]``.
    """
    most = min(store.together for store in stores)
    if math.isinf(most):
        return None
    rows = rows[np.lexsort((frame[rows], root[rows]))]
    window = np.empty(len(rows), np.int64)
    seen = 0
    for index, store in enumerate(stores):
        own = root[rows] == index
        window[own] = seen + np.searchsorted(store.edges, frame[rows[own]], side="right")
        seen += len(store.edges)
    return sliding(
        np.append(np.flatnonzero(np.diff(window, prepend=-1)), len(rows)), most, seed, rows
    )
