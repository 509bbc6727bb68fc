"""Action vocabularies of variable length: a chunk takes as many tokens as it needs, then a stop token."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ceed_vla.errors import MalformedChunkError, TokenError
from ceed_vla.tensors import check_actions, check_tokens

if TYPE_CHECKING:
    from ceed_vla.decoding.grammar import Grammar


class VariableLengthTokenizer(abc.ABC):
    """The interface of `ActionTokenizer` for chunks that take as many tokens as they need.

    A block has ``n`` slots: the tokens of the chunk, then the stop token in every slot that is left. A slot belongs to
    no step and tokens have no order, so nothing can be relaxed by bins, frozen by steps or shifted by slots.

    Attributes:
        block_length: Slots ``n``.
        num_bins: Tokens ``V`` of the vocabulary.
        stop_token: Ends a chunk that does not fill the block.
        speculative: Tokens (N,) that a guess may hold.
        zero_bins: (n,) int64, the chunk that is zero throughout.
        grammar: Which tokens can complete a chunk; None where nobody knows.
        malformed: Rows that `decode` has refused since construction.
    """

    block_length: int
    num_bins: int
    chunk_steps: int
    action_dim: int
    stop_token: int
    gripper_dims: tuple[int, ...] = ()
    speculative: Tensor
    zero_bins: Tensor
    grammar: Grammar | None = None
    malformed: int = 0

    @abc.abstractmethod
    def _write(self, actions: Tensor) -> list[list[int]]:
        """Tokens of every chunk of `actions` (B, m, A), without the stop token."""

    @abc.abstractmethod
    def _read(self, tokens: list[int]) -> Tensor:
        """The chunk (m, A) float64 that `tokens` before the stop token stand for, or `MalformedChunkError`."""

    def encode(self, actions: Tensor) -> Tensor:
        """Tokens (B, n) int64 of `actions` (B, m, A).

        Raises:
            TokenError: Another shape, NaN or infinity, or a chunk that takes more tokens than a block has.
        """
        check_actions(actions, self.chunk_steps, self.action_dim)
        rows = self._write(actions)
        longest = max(map(len, rows), default=0)
        if longest > self.block_length:
            raise TokenError(
                f"A chunk takes {longest} tokens, a block has {self.block_length}. Fit the tokens on these data "
                "too, or with a longer block."
            )
        padded = [row + [self.stop_token] * (self.block_length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=actions.device).view(-1, self.block_length)

    def decode(self, tokens: Tensor) -> Tensor:
        """Actions (B, m, A) float32 of `tokens` (B, n); what is behind a stop token is not read.

        Raises:
            MalformedChunkError: Rows that stand for no chunk; they are counted in `malformed`.
            TokenError: Another shape, or not integers.
        """
        check_tokens(tokens, "tokens", (None, self.block_length), 0)
        chunks, errors = [], {}
        for row, ids in enumerate(tokens.tolist()):
            try:
                chunks.append(self._chunk(ids))
            except MalformedChunkError as error:
                errors[row] = str(error)
        self.malformed += len(errors)
        if errors:
            row, reason = next(iter(errors.items()))
            raise MalformedChunkError(
                f"{len(errors)} of {len(tokens)} chunks are malformed, the first in row {row}: {reason} "
                f"({self.malformed} so far.) Hold the robot; strict decoding and more training make this rarer."
            )
        empty = torch.empty(0, self.chunk_steps, self.action_dim)
        return (torch.stack(chunks).float() if chunks else empty).to(tokens.device)

    def readable(self, tokens: Tensor) -> Tensor:
        """Which rows (B,) of `tokens` (B, n) stand for a chunk; nothing is counted."""
        check_tokens(tokens, "tokens", (None, self.block_length), 0)
        rows = []
        for ids in tokens.tolist():
            try:
                self._chunk(ids)
                rows.append(True)
            except MalformedChunkError:
                rows.append(False)
        return torch.tensor(rows, dtype=torch.bool, device=tokens.device)

    def _chunk(self, ids: list[int]) -> Tensor:
        """The chunk (m, A) in front of the stop token."""
        return self._read(ids[: ids.index(self.stop_token)] if self.stop_token in ids else ids)

    def weight(self, tokens: Tensor) -> Tensor:
        """(B, n) float32: 1 up to and including the first stop token of every row of `tokens`, 0 behind it."""
        ends = (tokens == self.stop_token).int()
        return (ends.cumsum(1) - ends == 0).float()

    def guess(
        self,
        kind: str,
        batch: int,
        previous: Tensor | None,
        shift_steps: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """First state (B, n) int64 of Jacobi decoding; see `make_guess`.

        "previous" is the previous chunk, shifted in time and encoded again; rows that cannot be are "mid".
        """
        if kind == "random":
            drawn = torch.randint(len(self.speculative), (batch, self.block_length), generator=generator)
            return self.speculative[drawn]
        guess = self.zero_bins.repeat(batch, 1)  # (B, n)
        if kind == "mid" or previous is None:
            return guess
        check_tokens(previous, "The previous chunk", (batch, self.block_length), self.num_bins, none=True)
        if not isinstance(shift_steps, int) or not 0 <= shift_steps <= self.chunk_steps:
            raise TokenError(
                f"shift_steps is {shift_steps!r}; it must be whole steps, at most {self.chunk_steps}."
            )
        for row, tokens in enumerate(previous.cpu()):
            shifted = self._shifted(tokens, shift_steps)
            if shifted is not None:
                guess[row] = shifted
        return guess

    def _shifted(self, tokens: Tensor, steps: int) -> Tensor | None:
        """Tokens (n,) of the chunk behind its first `steps` steps, the last one repeated; None if there is none."""
        try:
            chunk = self._chunk(tokens.tolist())
            if not steps:
                return tokens
            order = torch.arange(steps, steps + self.chunk_steps).clamp(max=self.chunk_steps - 1)
            return self.encode(chunk[order].unsqueeze(0))[0]
        except TokenError:
            return None
