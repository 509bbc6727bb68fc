"""Decoding of action blocks: greedy autoregressive, and Jacobi with early exit; one file a decoder.

prefix = backbone.prefill(observation) result = decode_block(backbone, prefix, tokens, "cap2",
previous=last.tokens, shift_steps=4, executed_steps=4)
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.autoregressive import decode_autoregressive
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.exits import ExitRule, Seen
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.names import named_config
from ceed_vla.decoding.registry import (
    decoder_ladders,
    exit_ladders,
    find_decoder,
    register_decoder,
    register_exit,
)
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError
from ceed_vla.tensors import check_tokens
from ceed_vla.tokens.base import ActionTokens
from ceed_vla.tokens.grammar import GrammarBackbone

# each registers what it holds; another can be added, or deleted
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def prefill(backbone: Backbone, batch: dict[str, Tensor], config: DecodingConfig) -> Prefix:
    """Run the prefix, as the decoder has it made: by its ``prefill(backbone, batch, options)``, or
    whole.
    """
    entry, options = find_decoder(config.method)
    if getattr(entry.make, "eager_only", False) and hasattr(backbone, "compile_now"):
        raise ConfigError(
            f"{config.method} runs eagerly only; use the backbone that was not compiled."
        )
    own = getattr(entry.make, "prefill", None)
    return backbone.prefill(batch) if own is None else cast("Prefix", own(backbone, batch, options))


def decode_block(
    backbone: Backbone,
    prefix: Prefix,
    tokens: ActionTokens,
    decoding: str | DecodingConfig,
    *,
    previous: Tensor | None = None,
    shift_steps: int = 0,
    executed_steps: int | None = None,
    frozen: Tensor | None = None,
    generator: torch.Generator | None = None,
    record_states: bool = False,
    on_proven: Callable[[Tensor, int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeResult:
    """Make the guess that a decoding names (`ceed_vla.decoding.names`) and decode one block from
    it.

    The `prefix`, of ``backbone.prefill``, may be decoded several times. `previous` are tokens (B,
    n) of the last chunk (rows of -1 have none), of which `shift_steps` were executed since. Random
    guesses are drawn from `generator`; a new one from ``config.seed`` if None, so that equal calls
    give equal guesses; see `BlockRequest`. No actions come.

    Raises:
        ConfigError: Settings that do not fit the block.
        TokenError: A previous chunk or frozen tokens that do not fit the block or the vocabulary.
        NotFiniteError: The model's scores are NaN or infinite.
    """
    config = named_config(decoding)
    if tokens.grammar is not None:
        backbone = GrammarBackbone(backbone, prefix, tokens.grammar)
        prefix = backbone.prefix
    guess = None
    if config.method != "ar" or record_states or config.watch == "executed":
        if config.guess == "random" and generator is None:
            generator = torch.Generator().manual_seed(config.seed)
        guess = tokens.guess(config.guess, len(prefix.logits), previous, shift_steps, generator)
    elif previous is not None:  # token by token it is not read
        shape = (len(prefix.logits), tokens.block_length)
        check_tokens(previous, "The previous chunk", shape, tokens.vocabulary_size, none=True)
    entry, options = find_decoder(config.method)
    request = BlockRequest(
        config=config,
        guess=guess,
        tokens_per_step=tokens.tokens_per_step,
        ordered=tokens.ordered,
        exact_dims=tokens.gripper_dims,
        executed_steps=executed_steps,
        frozen=frozen,
        stop=tokens.stop,
        readable=tokens.readable if tokens.stop is not None else None,
        record_states=record_states,
        on_proven=on_proven,
        options=options,
        clock=clock,
    )
    result = entry.make(backbone, prefix, request)
    if not isinstance(result, DecodeResult):
        raise ConfigError(
            f"The decoder {config.method!r} returned a {type(result).__name__}, not a DecodeResult."
        )
    if result.layer_forwards is None:
        result.layer_forwards = result.iterations * backbone.num_layers
    if result.prefix_layers is None:
        result.prefix_layers = torch.full_like(result.iterations, backbone.num_layers)
    return result
