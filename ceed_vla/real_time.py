"""Real-time chunking for policies that write tokens: the remainder of the running chunk becomes the
start of the next one.

Flow policies are guided towards the remainder (arXiv 2506.07339); a causal policy continues it
exactly. The first steps of the remainder, which the robot executes while the next chunk is decoded,
are frozen; the other steps are a warm start. Functions take the previous chunk (`previous`), the
number of its executed steps (`shift_steps`), and the number of steps behind these that are frozen
(`frozen_steps`).

A policy of increments puts its correction into the first steps of a chunk. Behind frozen steps,
this correction would be lost in every chunk. So the chunk is decoded without frozen steps, and the
steps behind the frozen ones compensate for the difference between their motion and the decoded
motion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.fields import short
from ceed_vla.tensors import is_plain
from ceed_vla.tokens.base import ActionTokens
from ceed_vla.tokens.increments import check_dims, put_behind, steps_behind
from ceed_vla.tokens.increments import made_up as made_up


def continuation(
    tokens: ActionTokens, left_over: Tensor, delay: int, rows: int
) -> tuple[Tensor | None, int]:
    """Convert the remainder of the running chunk to the start of the next one.

    Args:
        tokens: The action vocabulary.
        left_over: Actions (T, A) or (B, T, A) of `predict_action_chunk` that are not executed yet.
            Rows of zeros at the end are LeRobot's padding and are ignored.
        delay: Steps that the robot executes until the next chunk is ready.
        rows: Rows ``B``.

    Returns:
        The running chunk from the next step on, (B, n) with its last step repeated, or None if
        nothing remains; and the number of its first steps that are frozen.

    Raises:
        ConfigError: `delay` is not a number of steps, or tokens have variable length.
        TokenError: `left_over` is not actions of this shape, or not finite.
    """
    if type(delay) is not int or delay < 0:
        raise ConfigError(
            f"inference_delay is {short(delay)}; it must be a number of steps, 0 or more."
        )
    if tokens.tokens_per_step is None:
        raise ConfigError(
            "Real-time chunking needs tokens of fixed length; tokens of variable length do not "
            "belong to steps, so a chunk cannot continue the steps of another one."
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
    moving = (actions != 0).any(-1).any(0).nonzero()  # steps that are not padding
    if not len(moving):
        return None, 0
    left = int(moving[-1]) + 1
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
    """Decode a chunk that starts with frozen steps; see `CeedVLAPolicy.decode`.

    The chunk is the greedy continuation of the frozen steps. If the policy's actions are increments
    (``config.delta_dims``), later steps compensate for the frozen ones instead, and no token behind
    them is proven to be greedy.
    """
    dims = policy.config.delta_dims
    tokens = policy.tokenizer
    if not frozen_steps or not dims:
        return policy.decode(
            batch, frozen_steps=frozen_steps, executed_steps=executed_steps, **arguments
        )
    check_dims(dims, tokens.action_dim)
    n_action_steps = policy.config.n_action_steps
    executed_steps = steps_behind(frozen_steps, executed_steps, n_action_steps, tokens.chunk_steps)
    result = policy.decode(batch, executed_steps=executed_steps, **arguments)
    shift_steps = arguments.get("shift_steps")
    shift_steps = n_action_steps if shift_steps is None else shift_steps
    put_behind(tokens, result, arguments.get("previous"), shift_steps, frozen_steps, dims)
    return result
