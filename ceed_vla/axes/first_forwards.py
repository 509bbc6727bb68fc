"""Forwards that run before Jacobi decoding, through some of the layers or in another order.

They prove and commit nothing, but rows may end behind them. Depth and programs use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.measures import mass_near
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
    check_cap(request, count)
    tokens, frozen, _ = request.begin(backbone, prefix)  # (B, n)
    states = [tokens]
    for forward in forwards:
        tokens = next_state(tokens, forward(tokens[:, :-1]), frozen)
        states.append(tokens)
    result = decode_jacobi(backbone, prefix, replace(request, guess=tokens, forwards_before=count))
    result.layer_forwards = layers + result.iterations * backbone.num_layers
    result.forwards = result.forwards + count
    result.iterations = result.iterations + count
    if result.states is not None:
        _, before = request.finished(result.tokens, states[:-1])
        result.states = [*(before or []), *result.states]
    return result


def check_cap(request: BlockRequest, count: int) -> None:
    """Raise `ConfigError` if the cap leaves no forward of all layers behind `count` others."""
    cap = request.config.max_iterations
    if cap is not None and cap <= count:
        raise ConfigError(
            f"The cap of {request.config.method} is {cap}; it must exceed {count}, as the last "
            f"forward runs all layers. Use cap{count + 1}."
        )


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


def least_mass(prefix: Prefix, logits: Tensor, tokens: Tensor, frozen: int, watched: int) -> Tensor:
    """The mass (B,) near the least certain watched token after a forward; see `mass_near`.

    Args:
        prefix: The prefix, which predicts slot 0.
        logits: (B, n - 1, V) of the forward.
        tokens: (B, n) the state before it.
        frozen: Leading tokens that do not change.
        watched: End of the watched slots.
    """
    start = max(frozen, 1)
    seen = logits[:, start - 1 : watched - 1]
    mass = mass_near(seen, seen.argmax(-1))  # (B, watched - start)
    if not frozen:
        mass = torch.cat([mass_near(prefix.logits[:, None], tokens[:, :1]), mass], dim=1)
    return mass.amin(1) if mass.shape[1] else torch.ones_like(tokens[:, 0], dtype=mass.dtype)


def ended(state: Tensor, layers: Tensor, prefix_layers: int, reason: str) -> DecodeResult:
    """The result of rows (B, n) that end after one forward of `layers` (B,)."""
    ones = torch.ones(len(state), dtype=torch.int64)
    return DecodeResult(
        tokens=state,
        forwards=1,
        iterations=ones,
        exit_reason=[reason] * len(state),
        exact_tokens=ones.clone(),
        exact=torch.zeros(len(state), dtype=torch.bool),
        layer_forwards=layers,
        prefix_layers=prefix_layers * ones,
    )


def joined(first: DecodeResult, full: DecodeResult, done: Tensor, num_layers: int) -> DecodeResult:
    """The rows that are `done` (B,) from the first result, all others from the full one, whose
    prefix ran all layers.
    """
    mask = done.to(first.tokens.device).unsqueeze(1)  # (B, 1)
    first.forwards = full.forwards
    first.tokens = torch.where(mask, first.tokens, full.tokens)
    for row in (~done).nonzero().flatten().tolist():
        first.exit_reason[row] = full.exit_reason[row]
    for name in ("iterations", "exact_tokens", "exact", "layer_forwards"):
        setattr(first, name, torch.where(done, getattr(first, name), getattr(full, name)))
    assert first.prefix_layers is not None
    first.prefix_layers = torch.where(done, first.prefix_layers, num_layers)
    return first
