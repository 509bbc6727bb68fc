"""What a decoder is asked for: one block behind one prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.tensors import check_tokens, is_plain


@dataclass(frozen=True)
class BlockRequest:
    """One block to decode.

    A robot that executes one chunk while the next is decoded will have consumed some steps of it by
    then. Freezing them makes the rest of the next chunk a continuation of what really happens
    ("real-time chunking"), exactly as a causal model defines it: the greedy continuation of the
    frozen tokens.
    """

    config: DecodingConfig = field(default_factory=DecodingConfig)  # what ends decoding
    # (B, n) int64, the first state; slot 0 is not read, as the prefix knows it. AR fills up from
    # it.
    guess: Tensor | None = None
    tokens_per_step: int | None = 1  # tokens of one step; None where tokens belong to no step
    ordered: bool = True  # whether neighbouring tokens stand for neighbouring actions
    # dimensions of a step that stay exact where others may be near
    exact_dims: tuple[int, ...] = ()
    executed_steps: int | None = (
        None  # steps ``h`` that are executed before the next replan; None for all
    )
    frozen: Tensor | None = (
        None  # (B, k * tokens_per_step) int64, given tokens of the first ``k`` steps, which stay
    )
    stop: int | None = (
        None  # token that ends a row as soon as it is proven; None where every block is full
    )
    # Which rows (B,) bool of tokens (B, n) stand for a chunk; None for all.
    readable: Callable[[Tensor], Tensor] | None = None
    record_states: bool = False  # keep every state
    # Told, while decoding goes on, the tokens (B, n), how many leading ones are right in every row,
    # and the forwards so far. Those that are right do not change any more.
    on_proven: Callable[[Tensor, int, int], None] | None = None
    options: Mapping[str, str] = field(default_factory=dict)  # named groups of the decoder's name
    clock: Callable[[], float] = time.perf_counter  # time in seconds, for deadlines

    def frozen_tokens(self, backbone: Backbone, batch: int) -> int:
        """How many tokens are given, after a check of them.

        `ConfigError` where tokens belong to no step; `TokenError` for those of no whole steps, or
        outside the vocabulary, or if nothing is left to decode.
        """
        frozen, n = self.frozen, backbone.block_length
        if frozen is None:
            return 0
        if self.tokens_per_step is None:
            raise ConfigError(
                "Tokens of variable length belong to no step, so none can be frozen; pass no "
                "frozen."
            )
        length = frozen.shape[1] if is_plain(frozen) and frozen.ndim == 2 else n
        if length % self.tokens_per_step or length >= n:
            found = f"{tuple(frozen.shape)}" if is_plain(frozen) else type(frozen).__name__
            raise TokenError(
                f"The frozen prefix is {found}; expected ({batch}, k * {self.tokens_per_step}) "
                f"with fewer tokens than the block's {n}."
            )
        check_tokens(frozen, "The frozen prefix", (batch, length), backbone.vocabulary_size)
        return length

    def watched_tokens(self, block_length: int, given: int) -> int:
        """End ``M`` of the slots that must be right: the `given` ones and those of the executed
        steps behind them.

        `ConfigError` for more executed steps than the block has.
        """
        if (
            self.config.watch == "block"
            or self.executed_steps is None
            or self.tokens_per_step is None
        ):
            return block_length
        if block_length % self.tokens_per_step:
            raise ConfigError(
                f"A block of {block_length} tokens is not a whole number of steps of "
                f"{self.tokens_per_step} tokens."
            )
        steps = block_length // self.tokens_per_step
        if not 1 <= self.executed_steps <= steps:
            raise ConfigError(
                f"executed_steps is {self.executed_steps}; a block has {steps} steps."
            )
        return min(given + self.executed_steps * self.tokens_per_step, block_length)

    def begin(
        self, backbone: Backbone, prefix: Prefix, guessed: bool = True
    ) -> tuple[Tensor, int, int]:
        """What a decoder starts from, behind a prefix that is rolled back: the guess (B, n) with
        the frozen tokens, or the prefix's own first one, on the prefix's device; how many are
        frozen; and the end ``M`` of the watched slots.

        Without a guess, which only some need to be `guessed`, the state is 0. `TokenError` and
        `ConfigError` for a guess, frozen tokens or executed steps that do not fit.
        """
        (rows, _), device, n = prefix.logits.shape, prefix.logits.device, backbone.block_length
        given = self.frozen_tokens(backbone, rows)
        watched = self.watched_tokens(n, given)
        if self.guess is not None:
            check_tokens(self.guess, "The guess", (rows, n), backbone.vocabulary_size)
            tokens = self.guess.to(device, torch.int64, copy=True)
        elif guessed or watched < n:
            raise TokenError(
                f"{self.config.method} does not decode all {n} tokens anew; pass a guess ({rows}, "
                f"{n})."
            )
        else:
            tokens = torch.zeros(rows, n, dtype=torch.int64, device=device)
        if given:
            tokens[:, :given] = cast("Tensor", self.frozen)
        else:
            tokens[:, 0] = prefix.logits.argmax(-1)
        prefix.cache.roll_back()
        return tokens, given, watched


def after_stop(
    stop: int, block: Tensor, states: list[Tensor] | None
) -> tuple[Tensor, list[Tensor] | None]:
    """`block` (B, n) and `states` with `stop` in every slot behind the first `stop` of the block's
    row.
    """
    ends = (block == stop).int()  # (B, n)
    behind = ends.cumsum(1) - ends > 0
    filled = None if states is None else [state.masked_fill(behind, stop) for state in states]
    return block.masked_fill(behind, stop), filled
