"""The frozen prefix of a block: leading steps that are committed before decoding starts, and never change.

A robot that executes one chunk while the next is decoded will have consumed some steps of it by then. Freezing
them makes the rest of the next chunk a continuation of what really happens ("real-time chunking"), exactly as a
causal model defines it: the greedy continuation of the frozen tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.errors import TokenError


def frozen_length(
    frozen: Tensor | None, batch: int, block_length: int, action_dim: int, vocabulary: int
) -> int:
    """Tokens in `frozen`, 0 for None, after checking them.

    Args:
        frozen: (B, k * A) int64, the first ``k`` steps of the block.
        batch: Rows ``B``.
        block_length: Tokens ``n``.
        action_dim: Tokens ``A`` of one step.
        vocabulary: Action tokens ``V``.

    Raises:
        TokenError: Not whole steps, nothing left to decode, or tokens outside the vocabulary.
    """
    if frozen is None:
        return 0
    rows, length = frozen.shape if frozen.ndim == 2 else (-1, -1)
    if rows != batch or length % action_dim or not 0 <= length < block_length or frozen.dtype != torch.int64:
        raise TokenError(
            f"The frozen prefix is {tuple(frozen.shape)} {frozen.dtype}; expected ({batch}, k * {action_dim}) "
            f"torch.int64 with fewer tokens than the block's {block_length}."
        )
    if length:
        least, most = (int(value) for value in frozen.aminmax())
        if not 0 <= least <= most < vocabulary:
            raise TokenError(
                f"The frozen prefix holds tokens from {least} to {most}; they must lie in [0, {vocabulary - 1}]."
            )
    return length


def commit_frozen(backbone: Backbone, prefix: Prefix, frozen: Tensor) -> Tensor:
    """Write `frozen` (B, f) to the rolled-back cache and commit it, in one forward.

    Returns:
        Scores (B, V) of slot ``f``, the first that is free.
    """
    logits = backbone.block_logits(prefix, frozen)  # (B, f, V)
    prefix.cache.commit(frozen.shape[1])
    return logits[:, -1]
