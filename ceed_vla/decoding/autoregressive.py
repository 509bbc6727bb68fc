"""Greedy autoregressive decoding, the reference: cached, one token a forward, without a transfer
to the host until its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.host import check_rows, row_sums
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@register_decoder("ar", "ar", "token by token; ar_h: the executed steps")
@torch.no_grad()
def decode_autoregressive(
    backbone: Backbone, prefix: Prefix, request: BlockRequest
) -> DecodeResult:
    """Decode a block token by token.

    With ``watch="executed"`` only the tokens of the executed steps are decoded: a causal decoder
    owes no more before the next replan. The rest is then the guess, and `DecodeResult.exact_tokens`
    says where it starts. All frozen tokens together take one forward; without any, the prefill
    gives the first token.

    Raises:
        TokenError: No guess where one is needed, or a guess or frozen tokens that do not fit.
        ConfigError: More executed steps than the block has, or a deadline.
        NotFiniteError: Scores of a row are NaN or infinite.
    """
    if request.deadline_s is not None:
        raise ConfigError(
            "Token by token, nothing ends early: leave out deadline_s, or use jacobi."
        )
    stop = request.stop
    n = backbone.block_length
    tokens, given, wanted = request.begin(backbone, prefix, guessed=False)  # (B, n)
    free = max(given, 1)  # the first slot that takes a forward
    # Scores (B, V) of the first free slot.
    first = _next_scores(backbone, prefix, tokens[:, :given]) if given else prefix.logits
    best = torch.empty(len(tokens), n, dtype=first.dtype, device=first.device)
    torch.max(first, -1, out=(best[:, given], tokens[:, given]))
    states = [tokens.clone()] if request.record_states else None
    slot = given + 1
    while slot < wanted:
        # The only transfer in the loop, where there is a stop token.
        if stop is not None and (tokens[:, :slot] == stop).any(1).all():
            break
        logits = _next_scores(backbone, prefix, tokens[:, slot - 1 : slot])
        torch.max(logits, -1, out=(best[:, slot], tokens[:, slot]))
        slot += 1
        if states is not None:
            states.append(tokens.clone())
        if request.on_proven is not None and slot % (request.tokens_per_step or n) == 0:
            check_rows(row_sums(best[:, given:slot]).cpu().numpy())
            request.on_proven(tokens, slot, slot - free)

    check_rows(row_sums(best[:, given:slot]).cpu().numpy())
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
        exact_tokens=torch.full((len(tokens),), wanted),
        exact=torch.full((len(tokens),), wanted == n),
        states=states,
    )


def _next_scores(backbone: Backbone, prefix: Prefix, tokens: Tensor) -> Tensor:
    """Scores (B, V) of the slot behind `tokens` (B, k), which are committed to the cache."""
    logits = backbone.block_logits(prefix, tokens)  # (B, k, V)
    prefix.cache.commit(tokens.shape[1])
    return logits[:, -1]
