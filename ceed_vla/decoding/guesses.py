"""First states of Jacobi decoding. Every guess holds action tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from ceed_vla.decoding.config import GUESSES
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.tensors import check_tokens


def make_guess(
    kind: str,
    batch: int,
    block_length: int,
    vocabulary: int,
    zero_bins: Tensor,
    previous: Tensor | None = None,
    shift_tokens: int = 0,
    generator: torch.Generator | None = None,
    *,
    action_dim: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """First state of a block.

    Args:
        kind: "random" (uniform tokens), "mid" (the bins nearest zero), or "previous" (the previous chunk,
            shifted by what was executed; "mid" in rows that have none).
        batch: Rows ``B``.
        block_length: Tokens ``n``.
        vocabulary: Action tokens ``V``.
        zero_bins: Bins nearest zero, (A,) for every dimension or (n,) for every slot.
        previous: Tokens (B, n) of the previous chunk for "previous"; rows of -1 have none.
        shift_tokens: Executed tokens ``h * A`` to drop from `previous`.
        generator: Random source of "random", on the CPU; torch's global one if None.
        action_dim: Tokens ``A`` of one step; needed only where `zero_bins` is given for every slot.
        device: Where the guess goes; the device of `previous`, else the CPU.

    Returns:
        (B, n) int64.

    Raises:
        ConfigError: Unknown kind.
        TokenError: Shapes, shift or previous tokens that do not fit the block.
    """
    if kind not in GUESSES:
        raise ConfigError(f"The guess is {kind!r}; choose one of {', '.join(GUESSES)}.")
    if previous is not None:
        check_tokens(previous, "The previous chunk", (batch, block_length), vocabulary, none=True)
        previous = previous.long()
    if device is None:
        device = previous.device if previous is not None else "cpu"
    if kind == "random":
        # Drawn on the CPU, so that a seed means the same tokens on every device.
        return torch.randint(vocabulary, (batch, block_length), generator=generator).to(device)
    if zero_bins.ndim != 1 or block_length % len(zero_bins):
        raise TokenError(
            f"zero_bins have shape {tuple(zero_bins.shape)}, which does not "
            f"divide a block of {block_length} tokens."
        )
    mid = zero_bins.to(device).repeat(block_length // len(zero_bins)).expand(batch, block_length)  # (B, n)
    if kind == "mid" or previous is None:
        return mid.clone()
    return _shifted(previous.to(device), mid, shift_tokens, action_dim or len(zero_bins))


def _shifted(previous: Tensor, mid: Tensor, shift: int, action_dim: int) -> Tensor:
    """`previous` (B, n) without its first `shift` tokens, its last step repeated; `mid` in rows of -1."""
    block_length = mid.shape[1]
    if (
        not isinstance(shift, int)
        or not 0 <= shift <= block_length
        or shift % action_dim
        or block_length % action_dim
    ):
        raise TokenError(
            f"Cannot shift a block of {block_length} tokens by {shift}; a shift is a whole number of steps "
            f"of {action_dim} tokens within the block."
        )
    repeats = shift // action_dim
    last_step = previous[:, block_length - action_dim :]  # (B, A)
    guess = torch.cat([previous[:, shift:], last_step.repeat(1, repeats)], dim=1)  # (B, n)
    return torch.where(previous[:, :1] < 0, mid, guess)
