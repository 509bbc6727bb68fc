"""Real-time chunking for policies that write tokens: what is left of the running chunk begins the
next one.

Flow policies are guided towards the left-over (arXiv 2506.07339); a causal one continues it
exactly. Its first steps, which the robot executes while the next chunk is decoded, are frozen;
the others are a warm start. Everywhere the two are written as the chunk before (`previous`), the
steps of it that were executed (`shift_steps`), and the number of steps behind these that stay
(`frozen_steps`).

A policy of increments plans its correction into the first steps of a chunk: behind frozen ones it
would be lost, again with every chunk. So its chunk is decoded freely, and what the frozen steps
move otherwise is made up behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.fields import short
from ceed_vla.tensors import is_plain
from ceed_vla.tokens.base import ActionTokens


def continuation(
    tokens: ActionTokens, left_over: Tensor, delay: int, rows: int
) -> tuple[Tensor | None, int]:
    """What the left-over of a chunk says about the next one, which is ready after the robot's next
    `delay` steps.

    It is actions (T, A) or (B, T, A) of `predict_action_chunk` that were not executed yet; rows of
    zeros at their end are LeRobot's filling, which is neither frozen nor a guess. `ConfigError` for
    a delay that is no number of steps, or tokens of variable length; `TokenError` for no actions,
    of another shape, or not finite.

    Returns the chunk before, from the next step on, (B, n) with its last step repeated, or None
    where nothing is left; and how many of its first steps are frozen.
    """
    if type(delay) is not int or delay < 0:
        raise ConfigError(
            f"inference_delay is {short(delay)}; it must be a number of steps, 0 or more."
        )
    if tokens.tokens_per_step is None:
        raise ConfigError(
            "Tokens of variable length belong to no step, so no chunk can continue another one's "
            "steps."
        )
    m, dim = tokens.chunk_steps, tokens.action_dim
    shape = (
        tuple(left_over.shape) if isinstance(left_over, Tensor) and is_plain(left_over) else None
    )
    if (
        shape is None
        or len(shape) not in (2, 3)
        or shape[-1] != dim
        or shape[:-2] not in ((), (1,), (rows,))
    ):
        raise TokenError(
            f"prev_chunk_left_over is {shape or type(left_over).__name__}; expected actions (T, "
            f"{dim}) or ({rows}, T, {dim})."
        )
    actions = left_over if len(shape) == 3 else left_over.unsqueeze(0)
    actions = actions[:, :m].expand(rows, -1, -1)
    given = (actions != 0).any(-1).any(0).nonzero()  # steps that are not filling
    if not len(given):
        return None, 0
    left = int(given[-1]) + 1
    last = actions[:, left - 1 : left].expand(-1, m - left, -1)
    chunk = tokens.encode(torch.cat([actions[:, :left], last], dim=1))  # (B, n)
    return chunk, min(delay, left, m - 1)


def decode_behind(
    policy: Any,
    batch: dict[str, Tensor],
    frozen_steps: int = 0,
    executed_steps: int | None = None,
    **arguments: Any,
) -> DecodeResult:
    """`CeedVLAPolicy.decode` of a chunk that begins with frozen steps.

    They are continued greedily, or, where the policy's actions are increments
    (``config.delta_dims``), made up for: then no token behind them is the greedy one for certain.
    """
    dims = policy.config.delta_dims
    tokens = policy.tokenizer
    if not frozen_steps or not dims:
        return policy.decode(
            batch, frozen_steps=frozen_steps, executed_steps=executed_steps, **arguments
        )
    if not isinstance(dims, list) or not all(
        type(dim) is int and 0 <= dim < tokens.action_dim for dim in dims
    ):
        raise ConfigError(
            f"delta_dims is {short(dims)}; they must be dimensions in [0, {tokens.action_dim - 1}]."
        )
    n_action_steps = policy.config.n_action_steps
    behind = n_action_steps if executed_steps is None else executed_steps
    executed_steps = min(frozen_steps + behind, tokens.chunk_steps)
    result = policy.decode(batch, executed_steps=executed_steps, **arguments)
    shift_steps = arguments.get("shift_steps")
    running = tokens.with_frozen(
        result.tokens,
        arguments.get("previous"),
        n_action_steps if shift_steps is None else shift_steps,
        frozen_steps,
    )
    frozen = running[:, : frozen_steps * tokens.tokens_per_step]
    result.tokens = made_up(tokens, result.tokens, frozen, dims)
    result.actions = tokens.decode(result.tokens)
    result.states = None
    result.exact_tokens = torch.full_like(result.exact_tokens, frozen.shape[1])
    result.exact = torch.zeros_like(result.exact)
    return result


def made_up(tokens: ActionTokens, chunk: Tensor, frozen: Tensor, dims: Sequence[int]) -> Tensor:
    """A chunk (B, n) behind the frozen tokens (B, f) of k steps: what these move less or more in
    the dimensions `dims` than the chunk's own first steps, the steps behind them make up for as
    fast as the ranges of actions allow.
    """
    wanted = tokens.decode(chunk)
    k = frozen.shape[1] * tokens.chunk_steps // tokens.block_length
    chunk = torch.cat([frozen, chunk[:, frozen.shape[1] :]], dim=1)
    actions = tokens.decode(chunk)
    dims = list(dims)
    missing = (wanted - actions)[:, :k, dims].sum(1)
    for step in range(k, tokens.chunk_steps):
        asked = wanted[:, step, dims] + missing
        actions[:, step, dims] = asked
        actions = tokens.decode(tokens.encode(actions))  # within the ranges
        missing = asked - actions[:, step, dims]
    return torch.cat([frozen, tokens.encode(actions)[:, frozen.shape[1] :]], dim=1)
