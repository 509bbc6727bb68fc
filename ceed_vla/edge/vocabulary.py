"""Uniform action tokens with numpy: guesses, frozen steps and actions."""

from __future__ import annotations

import numpy as np

from ceed_vla.edge.settings import TokenSettings
from ceed_vla.errors import CheckpointError, TokenError
from ceed_vla.tokens.guesses import check_frozen, check_shift


class Vocabulary:
    """Tokens (1, n) of a chunk of ``m`` steps of ``A`` dimensions, as
    `ceed_vla.tokens.uniform.ActionTokenizer` has them.

    Attributes:
        zero: (1, n) int64, the block nearest "do not move".
    """

    def __init__(self, settings: TokenSettings) -> None:
        self.settings = settings
        self.chunk_steps = settings.chunk_steps
        self.action_dim = self.tokens_per_step = len(settings.low)
        self.vocabulary_size = settings.num_bins
        self.block_length = self.chunk_steps * self.tokens_per_step
        low = np.array(settings.low, dtype=np.float64)  # (A,)
        high = np.array(settings.high, dtype=np.float64)  # (A,)
        top = self.vocabulary_size - 1
        value = np.arange(self.vocabulary_size, dtype=np.float64)[:, None]  # (V, 1)
        # As weighted means of the ends, v and top - v of a symmetric range are exactly opposite.
        self._low = low
        self._bin = (high - low) / top  # (A,) distance of two bin centres
        self._centres = (((top - value) * low + value * high) / top).astype(np.float32)  # (V, A)
        nearest = np.clip(np.round(-low / self._bin), 0, top).astype(np.int64)
        self.zero = np.tile(nearest, self.chunk_steps)[None]

    def check(self, tokens: object, what: str) -> np.ndarray:
        """`tokens` as (1, n) int64; `TokenError` if they do not fit."""
        shapes = ((self.block_length,), (1, self.block_length))
        if (
            not isinstance(tokens, np.ndarray)
            or tokens.shape not in shapes
            or not np.issubdtype(tokens.dtype, np.integer)
        ):
            raise TokenError(
                f"{what}: {getattr(tokens, 'shape', type(tokens).__name__)}, expected an array "
                f"(1, {self.block_length}) of integers."
            )
        array = np.asarray(tokens, dtype=np.int64).reshape(1, self.block_length)
        if array.min() < 0 or array.max() >= self.vocabulary_size:
            raise TokenError(
                f"{what} has tokens from {array.min()} to {array.max()}; they must be in [0, "
                f"{self.vocabulary_size - 1}]."
            )
        return array

    def guess(
        self, kind: str, previous: np.ndarray | None, shift_steps: int, frozen_steps: int
    ) -> np.ndarray:
        """The initial guess (1, n), which begins with the frozen steps of the previous chunk.

        Raises:
            TokenError: The previous chunk, or the numbers of steps, do not fit.
        """
        check_shift(shift_steps, self.chunk_steps)
        check_frozen(frozen_steps, shift_steps, self.chunk_steps)
        guess = self.zero.copy()
        if previous is not None:
            previous = self.check(previous, "The previous chunk")
        if previous is not None and kind == "previous":
            start = shift_steps * self.tokens_per_step
            last = previous[:, self.block_length - self.tokens_per_step :]
            guess = np.concatenate([previous[:, start:], np.tile(last, (1, shift_steps))], axis=1)
        if not frozen_steps:
            return guess
        return self.with_frozen(guess, previous, shift_steps, frozen_steps)

    def with_frozen(
        self, guess: np.ndarray, previous: object, shift_steps: int, frozen_steps: int
    ) -> np.ndarray:
        """Replace the first steps of a guess (1, n) by frozen steps of the previous chunk.

        Raises:
            TokenError: The previous chunk, or the numbers of steps, do not fit.
        """
        check_frozen(frozen_steps, shift_steps, self.chunk_steps)
        if previous is None:
            raise TokenError(
                f"frozen_steps is {frozen_steps}, but there is no previous chunk to copy steps "
                "from. Pass previous, or set frozen_steps to 0."
            )
        start = shift_steps * self.tokens_per_step
        length = frozen_steps * self.tokens_per_step
        frozen = self.check(previous, "The previous chunk")[:, start : start + length]
        return np.concatenate([frozen, guess[:, length:]], axis=1)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Tokens (1, n) int64 of the bins nearest to actions (1, m, A) [action units]."""
        bins = (actions.astype(np.float64) - self._low) / self._bin
        nearest = np.clip(np.round(bins), 0, self.vocabulary_size - 1)
        return nearest.astype(np.int64).reshape(1, self.block_length)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Actions (1, m, A) float32 of decoded `tokens` (1, n) [action units].

        Raises:
            CheckpointError: The graphs return tokens that the settings do not have.
        """
        if tokens.max() >= self.vocabulary_size:
            raise CheckpointError(
                f"The exported graph returned token {tokens.max()}, but the settings have "
                f"{self.vocabulary_size} bins; copy the whole folder again."
            )
        steps = tokens.reshape(1, self.chunk_steps, self.tokens_per_step)
        return np.take_along_axis(self._centres[None], steps, axis=1)
