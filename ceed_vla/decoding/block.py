"""Prefill a prefix and decode one block behind it, with any decoder."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import Compiled, offers, require
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.names import named_config
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError
from ceed_vla.tensors import check_tokens
from ceed_vla.tokens.base import ActionTokens
from ceed_vla.tokens.grammar import GrammarBackbone


def prefill(backbone: Backbone, batch: dict[str, Tensor], config: DecodingConfig) -> Prefix:
    """Run the prefix with the decoder's own prefill; without one, the whole prefix.

    Raises:
        ConfigError: The decoder does not run on this backbone.
    """
    decoder = config.decoder
    if not decoder.compiles and offers(backbone, Compiled):
        raise ConfigError(f"{config.method} runs eagerly only; use the uncompiled backbone.")
    for capability in decoder.needs:
        require(backbone, capability, config.method)
    if decoder.prefill is None:
        return backbone.prefill(batch)
    return decoder.prefill(backbone, batch, config.options)


def decode_block(
    backbone: Backbone,
    prefix: Prefix,
    tokens: ActionTokens,
    decoding: str | DecodingConfig,
    *,
    previous: Tensor | None = None,
    shift_steps: int = 0,
    executed_steps: int | None = None,
    frozen_steps: int = 0,
    generator: torch.Generator | None = None,
    record_states: bool = False,
    on_proven: Callable[[Tensor, int, int], None] | None = None,
    deadline_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeResult:
    """Make the initial guess and decode one block.

    One `prefix` of ``backbone.prefill`` can be decoded several times. The result holds tokens; its
    actions are None.

    Args:
        backbone: The model.
        prefix: The prefilled prefix, which the block follows.
        tokens: The action vocabulary.
        decoding: A decoder name (`ceed_vla.decoding.names`), or its configuration.
        previous: Tokens (B, n) of the previous chunk; -1 in rows that have none.
        shift_steps: Steps of the previous chunk that were executed since it was decoded.
        executed_steps: See `BlockRequest`.
        frozen_steps: Steps ``k`` at the start of the block, copied from `previous` behind the
            executed ones; decoding does not change them.
        generator: Source of random guesses; a new one from ``config.seed`` if None, so that equal
            calls give equal guesses.
        record_states: See `BlockRequest`.
        on_proven: See `BlockRequest`.
        deadline_s: See `BlockRequest`.
        clock: See `BlockRequest`.

    Raises:
        ConfigError: The settings do not fit the block.
        TokenError: The previous chunk does not fit the block or the vocabulary, or lacks the
            frozen steps.
        NotFiniteError: The model's scores are NaN or infinite.
    """
    config = named_config(decoding)
    if tokens.grammar is not None:
        backbone = GrammarBackbone(backbone, prefix, tokens.grammar)
        prefix = backbone.prefix
    guess = None
    if config.method != "ar" or record_states or config.watch == "executed" or frozen_steps:
        if config.guess == "random" and generator is None:
            generator = torch.Generator().manual_seed(config.seed)
        guess = tokens.guess(config.guess, len(prefix.logits), previous, shift_steps, generator)
        if frozen_steps:
            guess = tokens.with_frozen(guess, previous, shift_steps, frozen_steps)
    elif previous is not None:  # AR does not read it, but a wrong one is an error all the same
        shape = (len(prefix.logits), tokens.block_length)
        check_tokens(previous, "The previous chunk", shape, tokens.vocabulary_size, none=True)
    request = BlockRequest(
        config=config,
        guess=guess,
        tokens_per_step=tokens.tokens_per_step,
        ordered=tokens.ordered,
        exact_dims=tokens.gripper_dims,
        executed_steps=executed_steps,
        frozen_steps=frozen_steps,
        stop=tokens.stop,
        readable=tokens.readable if tokens.stop is not None else None,
        record_states=record_states,
        on_proven=on_proven,
        deadline_s=deadline_s,
        clock=clock,
    )
    result = config.decoder.decode(backbone, prefix, request)
    if not isinstance(result, DecodeResult):
        raise ConfigError(
            f"The decoder {config.method!r} returned a {type(result).__name__}, not a DecodeResult."
        )
    if result.layer_forwards is None:
        result.layer_forwards = result.iterations * backbone.num_layers
    if result.prefix_layers is None:
        ran = backbone.num_layers + prefix.more_layers
        result.prefix_layers = torch.full_like(result.iterations, ran)
    return result
