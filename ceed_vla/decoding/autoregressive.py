"""Greedy autoregressive decoding: the reference. Cached, one token a forward, no look at the
host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.finite import check_rows, row_sums
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest, after_stop
from ceed_vla.decoding.result import DecodeResult


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
        ConfigError: More executed steps than the block has.
        NotFiniteError: Scores of a row are NaN or infinite.
    """
    started = request.clock()
    stop = request.stop
    batch = prefix.logits.shape[0]
    n = backbone.block_length
    tokens, given, wanted = request.begin(backbone, prefix, guessed=False)  # (B, n)

    # Scores (B, V) of the first slot that is free.
    first = _next_scores(backbone, prefix, tokens[:, :given]) if given else prefix.logits
    # scores, looked at once, at the end
    best = torch.empty(batch, n, dtype=first.dtype, device=first.device)
    torch.max(first, -1, out=(best[:, given], tokens[:, given]))
    states = [tokens.clone()] if request.record_states else None
    slot = given + 1
    while slot < wanted:
        if stop is not None and (tokens[:, :slot] == stop).any(1).all():
            break  # The only look at the host, where there is a stop token.
        logits = _next_scores(backbone, prefix, tokens[:, slot - 1 : slot])
        torch.max(logits, -1, out=(best[:, slot], tokens[:, slot]))
        slot += 1
        if states is not None:
            states.append(tokens.clone())
        if request.on_proven is not None and slot % (request.tokens_per_step or n) == 0:
            check_rows(row_sums(best[:, given:slot], backbone).cpu().numpy())
            request.on_proven(tokens, slot, slot - max(given, 1))

    check_rows(row_sums(best[:, given:slot], backbone).cpu().numpy())
    ended = torch.zeros(batch, dtype=torch.bool)  # (B,) rows with a stop token
    iterations = torch.full((batch,), slot - max(given, 1))
    if stop is not None:
        ended = (tokens[:, :slot] == stop).any(1).cpu()
        tokens[:, slot:] = stop
        tokens, states = after_stop(stop, tokens, states)
        iterations = iterations.where(~ended, (tokens != stop).sum(1).cpu())
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)  # or the time below would be that of the launches
    return DecodeResult(
        tokens=tokens,
        forwards=slot - max(given, 1),
        iterations=iterations,
        exit_reason=["stop" if row else "complete" for row in ended.tolist()],
        exact_tokens=torch.full((batch,), wanted),
        exact=torch.full((batch,), wanted == n),
        states=states,
        seconds={"decode": request.clock() - started},
    )


def _next_scores(backbone: Backbone, prefix: Prefix, tokens: Tensor) -> Tensor:
    """Scores (B, V) of the slot behind `tokens` (B, k), which are committed to the cache."""
    logits = backbone.block_logits(prefix, tokens)  # (B, k, V)
    prefix.cache.commit(tokens.shape[1])
    return logits[:, -1]
