"""Uniform action tokens with numpy: guesses, frozen steps and actions."""

from __future__ import annotations

import numpy as np

from ceed_vla.edge.settings import TokenSettings
from ceed_vla.errors import CheckpointError, ConfigError, TokenError
from ceed_vla.tokens.guesses import check_frozen, check_shift


class Vocabulary:
    """Tokens (1, n) of a chunk of ``m`` steps of ``A`` dimensions, as
    `ceed_vla.tokens.uniform.ActionTokenizer` has them.

    Attributes:
        zero: (1, n) int64, the block nearest "do not move".
    """

    def __init__(self, settings: TokenSettings) -> None:
        self.settings = settings
        self.steps = settings.chunk_steps
        self.width = len(settings.low)
        self.size = settings.num_bins
        self.length = self.steps * self.width
        low = np.array(settings.low, dtype=np.float64)  # (A,)
        high = np.array(settings.high, dtype=np.float64)  # (A,)
        top = self.size - 1
        value = np.arange(self.size, dtype=np.float64)[:, None]  # (V, 1)
        # As weighted means of the ends, v and top - v of a symmetric range are exactly opposite.
        self._centres = (((top - value) * low + value * high) / top).astype(np.float32)  # (V, A)
        nearest = np.clip(np.round(-low / ((high - low) / top)), 0, top).astype(np.int64)
        self.zero = np.tile(nearest, self.steps)[None]

    def check(self, tokens: object, what: str) -> np.ndarray:
        """`tokens` as (1, n) int64; `TokenError` if they do not fit."""
        shapes = ((self.length,), (1, self.length))
        if (
            not isinstance(tokens, np.ndarray)
            or tokens.shape not in shapes
            or not np.issubdtype(tokens.dtype, np.integer)
        ):
            raise TokenError(
                f"{what}: {getattr(tokens, 'shape', type(tokens).__name__)}, expected an array "
                f"(1, {self.length}) of integers."
            )
        array = np.asarray(tokens, dtype=np.int64).reshape(1, self.length)
        if array.min() < 0 or array.max() >= self.size:
            raise TokenError(
                f"{what} has tokens from {array.min()} to {array.max()}; they must be in [0, "
                f"{self.size - 1}]."
            )
        return array

    def guess(
        self, kind: str, previous: np.ndarray | None, shift_steps: int, frozen_steps: int
    ) -> np.ndarray:
        """The initial guess (1, n), which begins with the frozen steps of the previous chunk.

        Raises:
            ConfigError: The guess is "random", whose source is torch's.
            TokenError: The previous chunk, or the numbers of steps, do not fit.
        """
        if kind == "random":
            raise ConfigError(
                "The guess is 'random', which takes torch's random numbers; exports support "
                "'previous' and 'mid'."
            )
        check_shift(shift_steps, self.steps)
        check_frozen(frozen_steps, shift_steps, self.steps)
        if previous is None:
            if frozen_steps:
                raise TokenError(
                    f"frozen_steps is {frozen_steps}, but there is no previous chunk to copy steps "
                    "from. Pass previous, or set frozen_steps to 0."
                )
            return self.zero.copy()
        previous = self.check(previous, "The previous chunk")
        start = shift_steps * self.width
        last = previous[:, self.length - self.width :]
        shifted = np.concatenate([previous[:, start:], np.tile(last, (1, shift_steps))], axis=1)
        guess = shifted if kind == "previous" else self.zero.copy()
        frozen = frozen_steps * self.width
        guess[:, :frozen] = shifted[:, :frozen]
        return guess

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Actions (1, m, A) float32 of decoded `tokens` (1, n) [action units].

        Raises:
            CheckpointError: The graphs return tokens that the settings do not have.
        """
        if tokens.max() >= self.size:
            raise CheckpointError(
                f"The exported graph returned token {tokens.max()}, but the settings have "
                f"{self.size} bins; copy the whole folder again."
            )
        steps = tokens.reshape(1, self.steps, self.width)
        return np.take_along_axis(self._centres[None], steps, axis=1)
