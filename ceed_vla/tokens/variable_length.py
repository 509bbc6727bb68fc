"""Action vocabularies of variable length: a chunk takes as many tokens as it needs, then a stop
token.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from ceed_vla.errors import MalformedChunkError, TokenError
from ceed_vla.tensors import check_actions, check_tokens
from ceed_vla.tokens.base import ActionTokens


class VariableLengthTokens(ActionTokens):
    """Chunks that take as many tokens as they need.

    A block has ``n`` slots: the tokens of the chunk, then the stop token in every slot that is
    left. A slot belongs to no step and tokens have no order, so nothing can be relaxed by bins,
    frozen by steps or shifted by slots.
    """

    tokens_per_step = None
    stop: int  # ends a chunk that does not fill the block
    speculative: Tensor  # tokens (N,) that a guess may hold
    malformed: int = 0  # rows that `decode` has refused since construction

    @abc.abstractmethod
    def _write(self, actions: Tensor) -> list[list[int]]:
        """Tokens of every chunk of `actions` (B, m, A), without the stop token."""

    @abc.abstractmethod
    def _read(self, tokens: list[int]) -> Tensor:
        """The chunk (m, A) float64 that `tokens` before the stop token stand for, or
        `MalformedChunkError`.
        """

    def encode(self, actions: Tensor) -> Tensor:
        """Tokens (B, n) int64 of `actions` (B, m, A); `TokenError` for a chunk of more tokens than
        a block has.
        """
        check_actions(actions, self.chunk_steps, self.action_dim)
        rows = self._write(actions)
        longest = max(map(len, rows), default=0)
        if longest > self.block_length:
            raise TokenError(
                f"A chunk takes {longest} tokens, a block has {self.block_length}. Fit the tokens "
                "on these data too, or with a longer block."
            )
        padded = [row + [self.stop] * (self.block_length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=actions.device).view(
            -1, self.block_length
        )

    def decode(self, tokens: Tensor) -> Tensor:
        """Actions (B, m, A) float32 of `tokens` (B, n); what is behind a stop token is not read.
        `MalformedChunkError` for rows that stand for no chunk, which are counted in `malformed`.
        """
        chunks, errors = self._chunks(tokens)
        self.malformed += len(errors)
        if errors:
            row, reason = next(iter(errors.items()))
            raise MalformedChunkError(
                f"{len(errors)} of {len(tokens)} chunks are malformed, the first in row {row}: "
                f"{reason} ({self.malformed} so far.) Hold the robot; strict decoding and more "
                "training make this rarer."
            )
        empty = torch.empty(0, self.chunk_steps, self.action_dim)
        return (torch.stack(chunks).float() if chunks else empty).to(tokens.device)

    def readable(self, tokens: Tensor) -> Tensor:
        """Which rows (B,) of `tokens` (B, n) stand for a chunk; nothing is counted."""
        _, errors = self._chunks(tokens)
        return torch.tensor(
            [row not in errors for row in range(len(tokens))],
            dtype=torch.bool,
            device=tokens.device,
        )

    def _chunks(self, tokens: Tensor) -> tuple[list[Tensor], dict[int, MalformedChunkError]]:
        """The chunks (m, A) that `tokens` (B, n) stand for, and by row what is wrong with the
        others.
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
        """(B, n) float32: 1 up to and including the first stop token of every row of `tokens`, 0
        behind it.
        """
        ends = (tokens == self.stop).int()
        return (ends.cumsum(1) - ends == 0).float()

    def random_block(self, rows: int, generator: torch.Generator | None) -> Tensor:
        drawn = torch.randint(len(self.speculative), (rows, self.block_length), generator=generator)
        return self.speculative[drawn]

    def shifted(self, previous: Tensor, mid: Tensor, steps: int) -> Tensor:
        """`previous` (B, n) shifted in time and encoded again; `mid` (B, n) in rows that cannot
        be.
        """
        # the last one repeated
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
