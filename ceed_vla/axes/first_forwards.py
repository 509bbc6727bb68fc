"""Forwards that run before Jacobi decoding, through some of the layers or in another order.

They prove and commit nothing. Depth and programs use them.
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
        prefix: The prefix, which the block follows.
        request: The block to decode; a cap counts these forwards too.
        forwards: Each maps tokens (B, n - 1) to logits (B, n - 1, V).
        layers: Layers that run in all of them together.

    Raises:
        ConfigError: The cap leaves no full forward; and as `decode_jacobi`.
    """
    request = request.begun()
    count = len(forwards)
    cap = request.config.max_iterations
    if cap is not None and cap <= count:
        raise ConfigError(
            f"The cap of {request.config.method} is {cap}; it must exceed {count}, as the last "
            f"forward runs all layers. Use cap{count + 1}."
        )
    tokens, frozen, _ = request.begin(backbone, prefix)  # (B, n)
    for forward in forwards:
        tokens = next_state(tokens, forward(tokens[:, :-1]), frozen)
    result = decode_jacobi(backbone, prefix, replace(request, guess=tokens, forwards_before=count))
    result.layer_forwards = layers + result.iterations * backbone.num_layers
    result.forwards = result.forwards + count
    result.iterations = result.iterations + count
    return result


def next_state(tokens: Tensor, logits: Tensor, frozen: int) -> Tensor:
    """The state (B, n) after a forward.

    Args:
        tokens: (B, n) the state before.
        logits: (B, n - 1, V) of the forward.
        frozen: Leading tokens that do not change.
    """
    state = tokens.clone()
    start = max(frozen, 1)
    state[:, start:] = logits[:, start - 1 :].argmax(-1)
    return state
