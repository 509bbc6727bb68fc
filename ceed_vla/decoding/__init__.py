"""Decoding of action blocks: greedy autoregressive, and Jacobi with early exit.

config = DecodingConfig(method="jacobi", guess="previous", max_iterations=2)
prefix = backbone.prefill(observation)
result = decode_block(backbone, prefix, config, tokenizer=tokenizer, previous=last.tokens, shift_steps=4)
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ceed_vla.action_tokens import ActionTokens
from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.autoregressive import decode_autoregressive
from ceed_vla.decoding.config import DecodingConfig, named_config
from ceed_vla.decoding.guesses import make_guess
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.decoding.variable import decode_variable_block
from ceed_vla.errors import ConfigError
from ceed_vla.variable_length import VariableLengthTokenizer

__all__ = [
    "DecodeResult",
    "DecodingConfig",
    "decode_autoregressive",
    "decode_block",
    "decode_jacobi",
    "make_guess",
    "named_config",
]


def decode_block(
    backbone: Backbone,
    prefix: Prefix,
    config: DecodingConfig,
    *,
    tokenizer: ActionTokens,
    previous: Tensor | None = None,
    shift_steps: int = 0,
    frozen: Tensor | None = None,
    generator: torch.Generator | None = None,
    record_states: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeResult:
    """Make the guess that `config` names and decode one block from it.

    Args:
        backbone: The model.
        prefix: From ``backbone.prefill``; may be decoded several times.
        config: Method, guess and exit rules.
        tokenizer: Layout of the block: dimensions, steps, bins, grippers.
        previous: Tokens (B, n) of the previous chunk; rows of -1 have none.
        shift_steps: Steps of `previous` that were executed since.
        frozen: Tokens (B, k * A) of the first ``k`` steps, which are given: they will have been executed before
            this block is ready. The rest is decoded behind them, exactly as far as `config` is strict, and
            the must-converge window starts after them.
        generator: Random source of random guesses; a new one from ``config.seed`` if None, so that equal
            calls give equal guesses.
        record_states: Keep every state.
        clock: Time in seconds, for the deadline.

    Returns:
        Tokens and how they came about; `DecodeResult.actions` stays None.

    Raises:
        ConfigError: Settings that do not fit the block.
        TokenError: A previous chunk or frozen tokens that do not fit the block or the vocabulary.
    """
    n, dim = backbone.block_length, tokenizer.action_dim
    if isinstance(tokenizer, VariableLengthTokenizer):
        if frozen is not None:
            raise ConfigError(
                "Tokens of variable length belong to no step, so none can be frozen; pass no frozen."
            )
        return decode_variable_block(
            backbone,
            prefix,
            config,
            tokenizer=tokenizer,
            previous=previous,
            shift_steps=shift_steps,
            generator=generator,
            record_states=record_states,
            clock=clock,
        )
    guess = None
    if config.method == "jacobi" or record_states or config.executed_steps is not None:
        if config.guess == "random" and generator is None:
            generator = torch.Generator().manual_seed(config.seed)
        guess = make_guess(
            config.guess,
            prefix.logits.shape[0],
            n,
            backbone.vocabulary_size,
            tokenizer.zero_bins,
            previous,
            shift_steps * dim,
            generator,
            device=prefix.logits.device,
        )
    if config.method == "ar":
        return decode_autoregressive(
            backbone,
            prefix,
            config,
            guess,
            action_dim=dim,
            frozen=frozen,
            record_states=record_states,
            clock=clock,
        )
    assert guess is not None
    return decode_jacobi(
        backbone,
        prefix,
        guess,
        config,
        action_dim=dim,
        gripper_dims=tokenizer.gripper_dims,
        frozen=frozen,
        record_states=record_states,
        clock=clock,
    )
