"""Forwards in front of Jacobi decoding, of some layers or in another order: they prove and commit
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


def first_then_jacobi(
    backbone: Backbone,
    prefix: Prefix,
    request: BlockRequest,
    forwards: Sequence[Callable[[Tensor], Tensor]],
    layers: int,
) -> DecodeResult:
    """Jacobi decoding behind `forwards`, tokens (B, n - 1) to logits (B, n - 1, V), of so many
    `layers` in all.

    They prove and commit nothing. Raises as `decode_jacobi`, and `ConfigError` for a cap that
    leaves no full forward.
    """
    started = request.clock()
    config = request.config
    first = len(forwards)
    if config.max_iterations is not None:
        if config.max_iterations <= first:
            raise ConfigError(
                f"{config.method} with a cap of {config.max_iterations} proves nothing: the last "
                f"forward is full; use cap{first + 1}."
            )
        config = replace(config, max_iterations=config.max_iterations - first)
    tokens, given, _ = request.begin(backbone, prefix)
    for forward in forwards:
        tokens = after(tokens, forward(tokens[:, :-1]), given)
    result = decode_jacobi(
        backbone, prefix, rest(replace(request, config=config, guess=tokens), started)
    )
    result.layer_forwards = layers + result.iterations * backbone.num_layers
    result.forwards = result.forwards + first
    result.iterations = result.iterations + first
    return result


def rest(request: BlockRequest, started: float) -> BlockRequest:
    """The request with what is left of its deadline."""
    if request.config.deadline_s is None:
        return request
    left = max(request.config.deadline_s - (request.clock() - started), 1e-6)
    return replace(request, config=replace(request.config, deadline_s=left))


def after(tokens: Tensor, logits: Tensor, given: int) -> Tensor:
    """The state (B, n) that a forward with `logits` (B, n - 1, V) makes of `tokens` (B, n)."""
    state = tokens.clone()
    first = max(given, 1)
    state[:, first:] = logits[:, first - 1 :].argmax(-1)
    return state
