"""FAST tokens fitted on own data: the ids of a `FastCodec`, and a stop token behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ceed_vla.decoding.grammar import Grammar
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.fast_codec import FastCodec
from ceed_vla.variable_length import VariableLengthTokenizer


class FastTokenizer(VariableLengthTokenizer):
    """FAST ids of a fitted `FastCodec`, and the stop token behind them.

    Args:
        low: Smallest value of every dimension [action units]; maps to -1 before the cosine transform.
        high: Largest value, which maps to 1. Values outside are clipped and counted.
        chunk_steps: Steps ``m``.
        codec: Fitted on chunks of this many steps.
        block_length: Slots ``n``.
        gripper_dims: Two-valued dimensions; they decode to the nearer range end exactly.

    Attributes:
        clipped: Values that `encode` clipped since construction.
        grammar: Decoding under it always gives a whole chunk.
        smoothed: Chunks that lost their highest frequencies because they would have overfilled a block.

    Raises:
        ConfigError: Ranges that define no scale, or a block too short for the chunk that is zero.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        chunk_steps: int,
        codec: FastCodec,
        block_length: int,
        gripper_dims: Sequence[int] = (),
    ) -> None:
        self.low = torch.tensor([float(v) for v in low], dtype=torch.float64)  # (A,)
        self.high = torch.tensor([float(v) for v in high], dtype=torch.float64)  # (A,)
        if len(low) != len(high) or not len(low) or not bool((self.low < self.high).all()):
            raise ConfigError(f"low {list(low)} must be below high {list(high)} in every dimension.")
        self.action_dim, self.chunk_steps, self.block_length = len(low), int(chunk_steps), int(block_length)
        self.gripper_dims = tuple(sorted({int(d) % self.action_dim for d in gripper_dims}))
        self.codec = codec
        self.stop_token = codec.vocabulary_size
        self.num_bins = codec.vocabulary_size + 1
        self.speculative = torch.arange(self.num_bins)
        lengths = torch.cat([codec.id_lengths(), torch.zeros(1, dtype=torch.int64)])  # (V,)
        total = self.chunk_steps * self.action_dim
        self.grammar = Grammar(lengths, self.stop_token, total, self.block_length)
        self.clipped = self.smoothed = 0
        zero = torch.zeros(1, self.chunk_steps, self.action_dim, dtype=torch.float64)
        try:
            self.zero_bins = self.encode(zero.clamp(self.low, self.high))[0]
        except TokenError as error:
            raise ConfigError(
                f"block_length {block_length} does not even hold the chunk of zeros."
            ) from error
        self.clipped = 0

    def _write(self, actions: Tensor) -> list[list[int]]:
        actions = actions.detach().cpu().double()
        inside = actions.clamp(self.low, self.high)
        self.clipped += int(((inside - actions).abs() > 1e-6 * (self.high - self.low)).sum())
        scaled = normalise(inside, self.low, self.high)
        rows = self.codec.encode(scaled)
        for row, ids in enumerate(rows):
            kept = self.chunk_steps
            while len(rows[row]) > self.block_length and kept > 1:
                kept -= 1
                rows[row] = self.codec.encode(scaled[row : row + 1], kept)[0]
            self.smoothed += rows[row] is not ids
        return rows

    def _read(self, tokens: list[int]) -> Tensor:
        chunk = self.codec.decode(tokens, self.chunk_steps, self.action_dim)
        # The rounded cosines overshoot a step by a few per cent, which no action of the data did.
        chunk = ((chunk + 1) / 2 * (self.high - self.low) + self.low).clamp(self.low, self.high)
        for d in self.gripper_dims:
            middle = (self.low[d] + self.high[d]) / 2
            chunk[:, d] = torch.where(chunk[:, d] > middle, self.high[d], self.low[d])
        return chunk


def normalise(actions: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`actions` (..., A) with every dimension mapped from [low, high] to [-1, 1]."""
    return 2 * (actions - low) / (high - low) - 1


def fit_codec(
    chunks: Tensor, low: Sequence[float], high: Sequence[float], vocabulary_size: int, scale: float
) -> tuple[FastCodec, int]:
    """Fit FAST tokens on own data.

    Args:
        chunks: (N, m, A) every chunk that training will encode [action units].
        low: Range of every dimension, as for `FastTokenizer`.
        high: Range of every dimension.
        vocabulary_size: Most ids, the stop token not counted.
        scale: Quantisation; the step of a coefficient is ``1 / scale`` of half a range.

    Returns:
        The codec, and the tokens that the longest chunk takes.
    """
    bounds = [torch.tensor([float(v) for v in values], dtype=torch.float64) for values in (low, high)]
    scaled = normalise(chunks.cpu().double().clamp(*bounds), *bounds)
    codec = FastCodec.fit(scaled, vocabulary_size, scale)
    return codec, max(map(len, codec.encode(scaled)))
