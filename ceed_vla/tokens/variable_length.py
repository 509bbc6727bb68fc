"""Base of action vocabularies of variable length: the tokens of a chunk, then a stop token."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from ceed_vla.errors import MalformedChunkError, TokenError
from ceed_vla.tensors import check_actions, check_tokens
from ceed_vla.tokens.base import ActionTokens


class VariableLengthTokens(ActionTokens):
    """Chunks with different numbers of tokens.

    A block has ``n`` slots: the tokens of the chunk, then the stop token in all remaining slots.
    Slots do not belong to steps and tokens have no order, so decoding cannot be relaxed by bins,
    steps cannot be frozen, and chunks cannot be shifted by slots.
    """

    tokens_per_step = None
    stop: int  # ends a chunk that does not fill the block
    speculative: Tensor  # (N,) tokens that a guess may contain
    malformed: int = 0  # malformed rows in calls of `decode` since construction

    @abc.abstractmethod
    def _write(self, actions: Tensor) -> list[list[int]]:
        """Tokens of every chunk of `actions` (B, m, A), without the stop token."""

    @abc.abstractmethod
    def _read(self, tokens: list[int]) -> Tensor:
        """Decode the `tokens` in front of the stop token to a chunk (m, A) float64.

        Raises:
            MalformedChunkError: The tokens are not a chunk.
        """

    def encode(self, actions: Tensor) -> Tensor:
        """Convert `actions` (B, m, A) to tokens (B, n) int64.

        Raises:
            TokenError: A chunk has more tokens than a block.
        """
        check_actions(actions, self.chunk_steps, self.action_dim)
        rows = self._write(actions)
        longest = max(map(len, rows), default=0)
        if longest > self.block_length:
            raise TokenError(
                f"A chunk takes {longest} tokens; a block has {self.block_length}. Fit the tokens "
                "to these data too, or set a longer block."
            )
        padded = [row + [self.stop] * (self.block_length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=actions.device).view(
            -1, self.block_length
        )

    def decode(self, tokens: Tensor) -> Tensor:
        """Convert `tokens` (B, n) to actions (B, m, A) float32.

        Tokens behind a stop token are not read.

        Raises:
            MalformedChunkError: Rows are not a chunk; they are counted in `malformed`.
        """
        chunks, errors = self._chunks(tokens)
        self.malformed += len(errors)
        if errors:
            row, reason = next(iter(errors.items()))
            raise MalformedChunkError(
                f"{len(errors)} of {len(tokens)} chunks are malformed, the first in row {row}: "
                f"{reason} ({self.malformed} so far.) Hold the robot; use strict decoding or train "
                "longer to make this rarer."
            )
        empty = torch.empty(0, self.chunk_steps, self.action_dim)
        return (torch.stack(chunks).float() if chunks else empty).to(tokens.device)

    def readable(self, tokens: Tensor) -> Tensor:
        """The rows (B,) bool of `tokens` (B, n) that decode to a chunk; `malformed` does not
        change.
        """
        _, errors = self._chunks(tokens)
        return torch.tensor(
            [row not in errors for row in range(len(tokens))],
            dtype=torch.bool,
            device=tokens.device,
        )

    def _chunks(self, tokens: Tensor) -> tuple[list[Tensor], dict[int, MalformedChunkError]]:
        """Decode `tokens` (B, n).

        Returns:
            The chunks (m, A) of the rows that decode, and the errors of the other rows.
        """
        check_tokens(tokens, "tokens", (None, self.block_length), 0)
        chunks, errors = [], {}
        for row, ids in enumerate(tokens.tolist()):
            try:
                chunks.append(self._chunk(ids))
            except MalformedChunkError as error:
                errors[row] = error
        return chunks, errors

    def _chunk(self, ids: list[int]) -> Tensor:
        """The chunk (m, A) in front of the stop token."""
        return self._read(ids[: ids.index(self.stop)] if self.stop in ids else ids)

    def weight(self, tokens: Tensor, padded: Tensor | None = None) -> Tensor:
        """Weights (B, n) float32: 1 up to and including the first stop token of a row, 0 behind
        it.
        """
        ends = (tokens == self.stop).int()
        return (ends.cumsum(1) - ends == 0).float()

    def random_block(self, rows: int, generator: torch.Generator | None) -> Tensor:
        drawn = torch.randint(len(self.speculative), (rows, self.block_length), generator=generator)
        return self.speculative[drawn]

    def shifted(self, previous: Tensor, mid: Tensor, steps: int) -> Tensor:
        """Shift `previous` (B, n) in time and encode it again; rows that do not decode become those
        of `mid` (B, n).
        """
        # The last step is repeated.
        order = torch.arange(steps, steps + self.chunk_steps).clamp(max=self.chunk_steps - 1)
        for row, tokens in enumerate(previous.cpu()):
            if not steps and tokens[0] >= 0:
                mid[row] = tokens
                continue
            try:
                chunk = self._chunk(tokens.tolist())
                mid[row] = self.encode(chunk[order].unsqueeze(0))[0]
            except TokenError:
                continue
        return mid
