"""The input of a decoder: one block to decode behind one prefix."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.observers import Observer, ProvenStream, StateRecorder
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.fields import short

if TYPE_CHECKING:
    from torch import Tensor

    from ceed_vla.backbones.base import Backbone, Prefix


@dataclass(frozen=True)
class BlockRequest:
    """One block to decode.

    In real-time chunking, a robot executes one chunk while the next one is decoded. The steps that
    it executes meanwhile are frozen at the start of the next chunk, so that the two chunks join
    without a jump: the rest of the chunk is the model's greedy continuation of the frozen tokens.

    Attributes:
        config: How to decode, and what ends decoding.
        guess: (B, n) int64, the initial state. Slot 0 is not read unless it is frozen, as the
            prefix gives it. AR takes the tokens that it does not decode from the guess.
        tokens_per_step: Tokens of one control step; None if tokens do not belong to steps.
        ordered: Whether neighbouring tokens stand for neighbouring actions.
        exact_dims: Dimensions of a step that must be exact in decoders that accept near tokens.
        executed_steps: Steps ``h`` that are executed before the next replan; None for all.
        frozen_steps: Steps ``k`` at the start of the guess that stay as they are; fewer than the
            block has.
        stop: Token that ends a row as soon as it is proven; None if all blocks have fixed length.
        readable: Maps tokens (B, n) to the rows (B,) that decode to a chunk; None for all.
        record_states: Whether the result holds every state.
        on_proven: Called during decoding with the tokens (B, n), the number of leading tokens
            proven in every row, and the forwards so far. Proven tokens no longer change, except
            behind the stop token. AR, Jacobi decoding and drafts call it. What it raises ends the
            decoding and reaches the caller.
        deadline_s: Time limit of this block, counted like the deadline of `config` and additional
            to it [s].
        forwards_before: Forwards that ran before, which the cap includes.
        settled: (B,) bool on the CPU, rows that ended before and keep the tokens of the guess; None
            for none. Some row is not settled.
        clock: Returns the time [s], for deadlines.
        started: When decoding began [s]; None until then (`begun`).
    """

    config: DecodingConfig = field(default_factory=DecodingConfig)
    guess: Tensor | None = None
    tokens_per_step: int | None = 1
    ordered: bool = True
    exact_dims: tuple[int, ...] = ()
    executed_steps: int | None = None
    frozen_steps: int = 0
    stop: int | None = None
    readable: Callable[[Tensor], Tensor] | None = None
    record_states: bool = False
    on_proven: Callable[[Any, int, int], None] | None = None
    deadline_s: float | None = None
    forwards_before: int = 0
    settled: Tensor | None = None
    clock: Callable[[], float] = time.perf_counter
    started: float | None = None

    def begun(self) -> BlockRequest:
        """This request with its start time, which is now unless it is set already."""
        return replace(self, started=self.clock()) if self.started is None else self

    @property
    def options(self) -> Any:
        """The options in the decoder's name; see `Decoder.options`."""
        return self.config.options

    def begin(
        self, backbone: Backbone, prefix: Prefix, guessed: bool = True
    ) -> tuple[Tensor, int, int]:
        """Roll the prefix back and make the first state.

        Args:
            backbone: The model.
            prefix: The prefix, which the block follows.
            guessed: Whether the decoder needs a guess; without one, the state is 0.

        Returns:
            The guess (B, n) on the prefix's device, with the prefix's token in slot 0 unless that
            is frozen; the number of frozen tokens; the end ``M`` of the watched slots.

        Raises:
            TokenError: A needed guess is missing, or its tokens do not fit.
            ConfigError: The executed or frozen steps do not fit the block.
        """
        import torch

        from ceed_vla.tensors import check_tokens

        rows = len(prefix.logits)
        device = prefix.logits.device
        n = backbone.block_length
        frozen = self.frozen_tokens(n)
        watched = self.watched_tokens(n, frozen)
        if self.guess is not None:
            check_tokens(self.guess, "The guess", (rows, n), backbone.vocabulary_size)
            tokens = self.guess.to(device, torch.int64, copy=True)
        elif guessed or frozen or watched < n:
            raise TokenError(
                f"The guess is missing, and {self.config.method} takes some of the {n} tokens from "
                f"it; pass a guess ({rows}, {n})."
            )
        else:
            tokens = torch.zeros(rows, n, dtype=torch.int64, device=device)
        if not frozen:
            first = prefix.logits.argmax(-1)  # (B,)
            if self.settled is not None:
                first = torch.where(self.settled.to(device), tokens[:, 0], first)
            tokens[:, 0] = first
        prefix.cache.roll_back()
        return tokens, frozen, watched

    def frozen_tokens(self, block_length: int) -> int:
        """How many tokens of a block of `block_length` are frozen.

        Raises:
            ConfigError: Steps are frozen although tokens do not belong to steps, or no step is
                left to decode.
        """
        frozen = self.frozen_steps
        width = self.tokens_per_step
        if not frozen:
            return 0
        if width is None:
            raise ConfigError(
                f"frozen_steps is {short(frozen)}; it must be 0, as tokens of variable length do "
                "not belong to steps. Leave it at 0."
            )
        steps = block_length // width
        if type(frozen) is not int or not 0 <= frozen < steps:
            raise ConfigError(
                f"frozen_steps is {short(frozen)}; it must be in [0, {steps - 1}], as a block has "
                f"{steps} steps and one must be left to decode."
            )
        return frozen * width

    def watched_tokens(self, block_length: int, frozen: int) -> int:
        """End ``M`` of the slots that must be right: the `frozen` ones and those of the executed
        steps behind them.

        Raises:
            ConfigError: There are more executed steps than the block has.
        """
        executed = self.executed_steps
        width = self.tokens_per_step
        if self.config.watch == "block" or executed is None or width is None:
            return block_length
        if block_length % width:
            raise ConfigError(
                f"A block of {block_length} tokens is not a whole number of steps of {width} "
                "tokens."
            )
        steps = block_length // width
        if not 1 <= executed <= steps:
            raise ConfigError(f"executed_steps is {executed}; a block has {steps} steps.")
        return min(frozen + executed * width, block_length)

    def refuse_jacobi_settings(self) -> None:
        """Raise `ConfigError` for settings that only Jacobi decoding supports."""
        config = self.config
        relaxed = config.relaxations or self.deadline_s is not None
        if relaxed or config.tail == "fresh" or config.window:
            raise ConfigError(
                f"The decoder {config.method} does not support exit rules, a fresh tail or a "
                "window; leave them out, or use jacobi."
            )

    def observers(self, guess: Tensor) -> tuple[list[Observer], StateRecorder | None]:
        """The block's observers, from its `guess` (B, n) on, and the recorder among them."""
        recorder = StateRecorder(guess) if self.record_states else None
        observers: list[Observer] = [] if recorder is None else [recorder]
        if self.on_proven is not None:
            observers.append(ProvenStream(self.on_proven))
        return observers, recorder

    def rows_readable(self, tokens: Tensor) -> np.ndarray:
        """Which rows (B,) of `tokens` (B, n) decode to a chunk."""
        if self.readable is None:
            return np.ones(len(tokens), dtype=bool)
        return self.readable(tokens).cpu().numpy()

    def finished(
        self, tokens: Tensor, states: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """`tokens` (B, n) and `states`, where the stop token fills the slots behind the first stop
        token of a row.
        """
        if self.stop is None:
            return tokens, states
        ends = (tokens == self.stop).int()  # (B, n)
        behind = ends.cumsum(1) - ends > 0
        if states is not None:
            states = [state.masked_fill(behind, self.stop) for state in states]
        return tokens.masked_fill(behind, self.stop), states
