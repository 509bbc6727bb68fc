"""Decoding of blocks of variable length: own guesses, a grammar where there is one, caps that end in whole chunks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.autoregressive import decode_autoregressive
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.grammar import GrammarBackbone
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.variable_length import VariableLengthTokenizer


def decode_variable_block(
    backbone: Backbone,
    prefix: Prefix,
    config: DecodingConfig,
    *,
    tokenizer: VariableLengthTokenizer,
    previous: Tensor | None = None,
    shift_steps: int = 0,
    generator: torch.Generator | None = None,
    record_states: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeResult:
    """`decode_block` for tokens of variable length.

    A cap on the iterations ends a block only where it holds whole chunks; where it does not, decoding goes on to the
    fixed point, as half a chunk serves nobody. A deadline ends it in any case.
    """
    if tokenizer.grammar is not None:
        backbone = GrammarBackbone(backbone, prefix, tokenizer.grammar)
        prefix = backbone.prefix
    stop, dim = tokenizer.stop_token, tokenizer.action_dim
    guess = None
    if config.method == "jacobi" or record_states:
        if config.guess == "random" and generator is None:
            generator = torch.Generator().manual_seed(config.seed)
        guess = tokenizer.guess(config.guess, prefix.logits.shape[0], previous, shift_steps, generator)
    if config.method == "ar":
        return decode_autoregressive(
            backbone,
            prefix,
            config,
            guess,
            action_dim=dim,
            stop=stop,
            record_states=record_states,
            clock=clock,
        )
    assert guess is not None

    def jacobi(guess: Tensor, config: DecodingConfig) -> DecodeResult:
        return decode_jacobi(
            backbone,
            prefix,
            guess,
            config,
            action_dim=dim,
            stop=stop,
            record_states=record_states,
            clock=clock,
        )

    result = jacobi(guess, config)
    if "max_iterations" not in result.exit_reason or bool(tokenizer.readable(result.tokens).all()):
        return result
    rest = jacobi(result.tokens, replace(config, max_iterations=None))
    rest.forwards += result.forwards
    rest.iterations += result.iterations
    if rest.states is not None:
        rest.states = [*(result.states or ()), *rest.states[1:]]  # the first one is the last of `result`
    rest.seconds = {"decode": result.seconds["decode"] + rest.seconds["decode"]}
    return rest
