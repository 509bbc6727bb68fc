"""Forwards in front of Jacobi decoding, of some layers or in another order; they prove and commit
nothing. Depth and programs use them.
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
    """Jacobi decoding that starts from the tokens of other forwards.

    Args:
        backbone: The model.
        prefix: What the block is decoded behind.
        request: What is decoded; a cap counts the forwards too.
        forwards: Each maps tokens (B, n - 1) to logits (B, n - 1, V).
        layers: Layers that run in all of them together.

    Raises:
        ConfigError: A cap that leaves no full forward; and as `decode_jacobi`.
    """
    request = request.begun()
    count = len(forwards)
    cap = request.config.max_iterations
    if cap is not None and cap <= count:
        raise ConfigError(
            f"{request.config.method} with a cap of {cap} proves nothing: the last forward is "
            f"full; use cap{count + 1}."
        )
    tokens, given, _ = request.begin(backbone, prefix)  # (B, n)
    for forward in forwards:
        tokens = next_state(tokens, forward(tokens[:, :-1]), given)
    result = decode_jacobi(backbone, prefix, replace(request, guess=tokens, forwards_before=count))
    result.layer_forwards = layers + result.iterations * backbone.num_layers
    result.forwards = result.forwards + count
    result.iterations = result.iterations + count
    return result


def next_state(tokens: Tensor, logits: Tensor, given: int) -> Tensor:
    """The state (B, n) that a forward with `logits` (B, n - 1, V) makes of `tokens` (B, n), of
    which the first `given` are frozen.
    """
    state = tokens.clone()
    first = max(given, 1)
    state[:, first:] = logits[:, first - 1 :].argmax(-1)
    return state
