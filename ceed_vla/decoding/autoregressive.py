"""Greedy autoregressive decoding, the reference: cached, one token per forward.

Unless there is a stop token or a stream of proven tokens, the only transfer to the host is at the
end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.finite import check_rows
from ceed_vla.decoding.host import row_sums
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@torch.no_grad()
def decode_autoregressive(
    backbone: Backbone, prefix: Prefix, request: BlockRequest
) -> DecodeResult:
    """Decode a block token by token.

    With ``watch="executed"`` only the tokens of the executed steps are decoded, as they do not
    depend on later ones. The remaining tokens are those of the guess, from slot
    `DecodeResult.exact_tokens` on. All frozen tokens together take one forward; without frozen
    tokens, the prefill gives the first token.

    Raises:
        TokenError: A needed guess is missing, or the guess or the frozen tokens do not fit.
        ConfigError: There are more executed steps than the block has, or a deadline.
        NotFiniteError: The logits of a row are NaN or infinite.
    """
    if request.deadline_s is not None:
        raise ConfigError(
            f"deadline_s is {request.deadline_s}, but token-by-token decoding has no early exit; "
            "leave it out, or use jacobi."
        )
    stop = request.stop
    n = backbone.block_length
    tokens, frozen, end = request.begin(backbone, prefix, guessed=False)  # (B, n)
    free = max(frozen, 1)  # the first slot that takes a forward
    # Logits (B, V) of the first free slot.
    logits = _next_logits(backbone, prefix, tokens[:, :frozen]) if frozen else prefix.logits
    best = torch.empty(len(tokens), n, dtype=logits.dtype, device=logits.device)
    torch.max(logits, -1, out=(best[:, frozen], tokens[:, frozen]))
    states = [tokens.clone()] if request.record_states else None
    slot = frozen + 1
    while slot < end:
        # With a stop token, the only transfer in the loop.
        if stop is not None and (tokens[:, :slot] == stop).any(1).all():
            break
        logits = _next_logits(backbone, prefix, tokens[:, slot - 1 : slot])
        torch.max(logits, -1, out=(best[:, slot], tokens[:, slot]))
        slot += 1
        if states is not None:
            states.append(tokens.clone())
        if request.on_proven is not None and slot % (request.tokens_per_step or n) == 0:
            check_rows(row_sums(best[:, frozen:slot]).cpu().numpy())
            request.on_proven(tokens, slot, slot - free)

    check_rows(row_sums(best[:, frozen:slot]).cpu().numpy())
    ended = torch.zeros(len(tokens), dtype=torch.bool)  # (B,) rows with a stop token
    iterations = torch.full((len(tokens),), slot - free)
    if stop is not None:
        ended = (tokens[:, :slot] == stop).any(1).cpu()
        tokens[:, slot:] = stop
        tokens, states = request.finished(tokens, states)
        iterations = iterations.where(~ended, (tokens != stop).sum(1).cpu())
    return DecodeResult(
        tokens=tokens,
        forwards=slot - free,
        iterations=iterations,
        exit_reason=["stop" if row else "complete" for row in ended.tolist()],
        exact_tokens=torch.full((len(tokens),), end),
        exact=torch.full((len(tokens),), end == n),
        states=states,
    )


def _next_logits(backbone: Backbone, prefix: Prefix, tokens: Tensor) -> Tensor:
    """Commit `tokens` (B, k) to the cache and return the logits (B, V) of the next slot."""
    logits = backbone.block_logits(prefix, tokens)  # (B, k, V)
    prefix.cache.commit(tokens.shape[1])
    return logits[:, -1]
