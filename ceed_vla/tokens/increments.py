"""Chunks of increments behind frozen steps, for arrays of torch and of numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError
from ceed_vla.fields import short


class StepTokens(Protocol):
    """What is needed of an action vocabulary; see `ceed_vla.tokens.base.ActionTokens`."""

    @property
    def chunk_steps(self) -> int: ...

    @property
    def tokens_per_step(self) -> int | None: ...

    def encode(self, actions: Any) -> Any: ...

    def decode(self, tokens: Any) -> Any: ...

    def with_frozen(
        self, guess: Any, previous: Any, shift_steps: int, frozen_steps: int
    ) -> Any: ...


def check_dims(dims: object, action_dim: int) -> list[int]:
    """Return `dims` if they are dimensions of actions; raise `ConfigError` otherwise."""
    if not isinstance(dims, list) or not all(
        type(dim) is int and 0 <= dim < action_dim for dim in dims
    ):
        raise ConfigError(
            f"delta_dims is {short(dims)}; it must be dimensions in [0, {action_dim - 1}]."
        )
    return dims


def steps_behind(frozen: int, executed: int | None, usual: int, chunk: int) -> int:
    """Steps of a chunk up to the last one that is executed, if they count from the frozen ones on.

    Args:
        frozen: Frozen steps at its start.
        executed: Steps that are executed; None for `usual`.
        usual: Those of the policy.
        chunk: Steps of the chunk.

    Raises:
        ConfigError: A number is outside its range.
    """
    executed = usual if executed is None else executed
    if type(executed) is not int or not 1 <= executed <= chunk:
        raise ConfigError(
            f"executed_steps is {short(executed)}; it must be an int in [1, {chunk}]."
        )
    if type(frozen) is not int or not 0 <= frozen < chunk:
        raise ConfigError(
            f"frozen_steps is {short(frozen)}; it must be an int in [0, {chunk - 1}]."
        )
    return min(frozen + executed, chunk)


def put_behind(
    tokens: StepTokens,
    result: DecodeResult,
    previous: Any,
    shift_steps: int,
    frozen_steps: int,
    dims: Sequence[int],
) -> None:
    """Replace the first steps of a decoded chunk by frozen ones; see `made_up`.

    Args:
        tokens: The action vocabulary.
        result: A chunk that was decoded without frozen steps; it is changed in place.
        previous: (B, n) tokens of the previous chunk.
        shift_steps: Its executed steps.
        frozen_steps: Steps behind these, which are frozen.
        dims: Action dimensions that are increments.

    Raises:
        ConfigError: Tokens do not belong to steps.
        TokenError: `previous` does not have these steps.
    """
    running = tokens.with_frozen(result.tokens, previous, shift_steps, frozen_steps)
    assert tokens.tokens_per_step is not None
    frozen = running[:, : frozen_steps * tokens.tokens_per_step]
    result.tokens = made_up(tokens, result.tokens, frozen, dims)
    result.actions = tokens.decode(result.tokens)
    result.states = None
    result.exact_tokens = result.exact_tokens * 0 + frozen.shape[1]  # the others are not greedy
    result.exact = result.exact & False


def made_up(tokens: StepTokens, chunk: Any, frozen: Any, dims: Sequence[int]) -> Any:
    """Replace the first steps of a chunk by frozen ones, and compensate for the difference.

    In the dimensions `dims`, the frozen steps move by another distance than the chunk's own first
    steps. The steps behind them add this difference, as fast as the ranges of actions allow.

    Args:
        tokens: The action vocabulary, of a fixed number of tokens per step.
        chunk: (B, n) the decoded chunk.
        frozen: (B, f) tokens of k frozen steps.
        dims: Action dimensions that are increments.

    Returns:
        (B, n), the frozen tokens first.
    """
    assert tokens.tokens_per_step is not None
    f = frozen.shape[1]
    k = f // tokens.tokens_per_step
    dims = list(dims)
    decoded = tokens.decode(chunk)  # (B, m, A)
    begun = chunk + 0
    begun[:, :f] = frozen
    actions = tokens.decode(begun)
    missing = decoded[:, 0, dims] - actions[:, 0, dims]  # (B, len(dims))
    for step in range(1, k):
        missing = missing + (decoded[:, step, dims] - actions[:, step, dims])
    for step in range(k, tokens.chunk_steps):
        target = decoded[:, step, dims] + missing
        actions[:, step, dims] = target
        actions = tokens.decode(tokens.encode(actions))  # within the ranges
        missing = target - actions[:, step, dims]
    result = tokens.encode(actions)
    result[:, :f] = frozen
    return result
