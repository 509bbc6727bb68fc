"""What watches a block while it is decoded, and changes nothing: recorded states, streamed steps.

An observer is called after every iteration with the tokens (B, n), the leading tokens proven in
every row (B,), and the forwards so far.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

Observer = Callable[[Tensor, np.ndarray, int], None]


class StateRecorder:
    """Keeps a copy of every state (B, n), from the guess on."""

    def __init__(self, guess: Tensor) -> None:
        self.states = [guess.clone()]

    def __call__(self, tokens: Tensor, exact: np.ndarray, forwards: int) -> None:
        self.states.append(tokens.clone())


class ProvenStream:
    """Passes on how many leading tokens are proven in all rows; those no longer change."""

    def __init__(self, on_proven: Callable[[Tensor, int, int], None]) -> None:
        self.on_proven = on_proven

    def __call__(self, tokens: Tensor, exact: np.ndarray, forwards: int) -> None:
        self.on_proven(tokens, int(exact.min()), forwards)
