"""Validation of tokens and actions, shared by all vocabularies and decoders."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TypeGuard

import torch
from torch import Tensor

from ceed_vla.errors import ConfigError, TokenError, raised_as
from ceed_vla.fields import short

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor: not sparse, nested, quantised, or without data."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_nested or value.is_quantized or value.is_meta)
        and not (value.is_floating_point() and value.element_size() < 2)
    )


def check_tokens(
    tokens: object, what: str, shape: tuple[int | None, int], vocabulary: int, *, none: bool = False
) -> None:
    """Check that tokens are integers (B, k) in ``[0, V)``.

    Args:
        tokens: The tokens.
        what: Their name in messages.
        shape: (B, k), with None for any number of rows.
        vocabulary: ``V``; 0 to accept any value.
        none: Whether a row may be all -1.

    Raises:
        TokenError: The tokens do not fit.
    """
    rows, length = shape
    expected = f"({'B' if rows is None else rows}, {length}) integers"
    if not is_plain(tokens):
        raise TokenError(f"{what}: {type(tokens).__name__}, expected a dense tensor {expected}.")
    fits = tokens.ndim == 2 and tokens.shape[1] == length and tokens.dtype in _INTEGERS
    if not fits or rows not in (None, len(tokens)):
        raise TokenError(f"{what}: {tuple(tokens.shape)} {tokens.dtype}, expected {expected}.")
    if not vocabulary or not tokens.numel():
        return
    least, most = torch.stack(tokens.aminmax()).tolist()
    if 0 <= least <= most < vocabulary:
        return
    outside = (tokens < 0) | (tokens >= vocabulary)
    if none:
        outside &= (tokens != -1).any(dim=1, keepdim=True)
    if bool(outside.any()):
        b, slot = outside.nonzero()[0].tolist()
        raise TokenError(
            f"{what}[{b}, {slot}] is {tokens[b, slot].item()}; tokens must be in [0, "
            f"{vocabulary - 1}]" + (", or all -1 in a row without tokens." if none else ".")
        )


def check_actions(actions: object, chunk_steps: int, action_dim: int) -> None:
    """Raise `TokenError` unless `actions` are chunks (B, m, A) of finite numbers."""
    expected = f"expected (B, {chunk_steps}, {action_dim})"
    if not is_plain(actions):
        raise TokenError(f"actions are {type(actions).__name__}, {expected} in a dense tensor.")
    if (
        actions.ndim != 3
        or tuple(actions.shape[1:]) != (chunk_steps, action_dim)
        or actions.is_complex()
    ):
        raise TokenError(f"actions have shape {tuple(actions.shape)} {actions.dtype}, {expected}.")
    finite = torch.isfinite(actions)
    if not bool(finite.all()):
        b, step, d = (~finite).nonzero()[0].tolist()
        raise TokenError(
            f"actions[{b}, {step}, {d}] is {actions[b, step, d].item()} (batch row {b}, step "
            f"{step}, dimension {d}); only finite actions can become tokens. Clean the data or "
            "stop the robot."
        )


def numbers(values: object, name: str) -> list[float]:
    """Convert a sequence of numbers, an array or a tensor to plain numbers.

    Args:
        values: The values.
        name: Their name in messages.

    Raises:
        ConfigError: They are not a sequence of numbers.
    """
    with raised_as(ConfigError, f"{name} is {short(values)}", "it must be a sequence of numbers."):
        if isinstance(values, str | bytes | Mapping | Set):
            raise TypeError(f"a {type(values).__name__}")
        listed = list(values)  # type: ignore[call-overload]
        if any(isinstance(value, str | bytes | bool) for value in listed):
            raise TypeError("it contains text or a boolean")
        return [float(value) for value in listed]


def whole(values: object, name: str) -> list[int]:
    """`values` as whole numbers; see `numbers`."""
    found = numbers(values, name)
    if any(value != round(value) if abs(value) < 1e15 else True for value in found):
        raise ConfigError(f"{name} is {short(values)}; it must be whole numbers.")
    return [int(value) for value in found]
