"""Observers of a block while it is decoded: they record states and stream proven steps.

An observer is called after every iteration with the tokens (B, n), the number of leading tokens
proven in each row (B,), and the forwards so far. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Observer = Callable[[Any, np.ndarray, int], None]


class StateRecorder:
    """Stores a copy of every state (B, n), from the guess on."""

    def __init__(self, guess: Tensor) -> None:
        self.states = [guess.clone()]

    def __call__(self, tokens: Tensor, exact: np.ndarray, forwards: int) -> None:
        self.states.append(tokens.clone())


class ProvenStream:
    """Reports how many leading tokens are proven in all rows; these no longer change."""

    def __init__(self, on_proven: Callable[[Tensor, int, int], None]) -> None:
        self.on_proven = on_proven

    def __call__(self, tokens: Tensor, exact: np.ndarray, forwards: int) -> None:
        self.on_proven(tokens, int(exact.min()), forwards)
