"""The frozen prefix of a block: leading steps that are committed before decoding starts, and never change.

A robot that executes one chunk while the next is decoded will have consumed some steps of it by then. Freezing
them makes the rest of the next chunk a continuation of what really happens ("real-time chunking"), exactly as a
causal model defines it: the greedy continuation of the frozen tokens.
"""

from __future__ import annotations

from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.errors import TokenError
from ceed_vla.tensors import check_tokens, is_plain


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
    length = frozen.shape[1] if is_plain(frozen) and frozen.ndim == 2 else block_length
    if length % action_dim or length >= block_length:
        found = f"{tuple(frozen.shape)}" if is_plain(frozen) else type(frozen).__name__
        raise TokenError(
            f"The frozen prefix is {found}; expected ({batch}, k * {action_dim}) with fewer tokens than the block's "
            f"{block_length}."
        )
    check_tokens(frozen, "The frozen prefix", (batch, length), vocabulary)
    return length


def commit_frozen(backbone: Backbone, prefix: Prefix, frozen: Tensor) -> Tensor:
    """Write `frozen` (B, f) to the rolled-back cache and commit it, in one forward.

    Returns:
        Scores (B, V) of slot ``f``, the first that is free.
    """
    logits = backbone.block_logits(prefix, frozen)  # (B, f, V)
    prefix.cache.commit(frozen.shape[1])
    return logits[:, -1]
