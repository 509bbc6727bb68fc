"""Greedy autoregressive decoding: the reference. Cached, one token a forward, no look at the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.exits import after_stop, check_variable_length, must_converge
from ceed_vla.decoding.finite import check_rows, row_sums
from ceed_vla.decoding.frozen import commit_frozen, frozen_length
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import TokenError
from ceed_vla.tensors import check_tokens


@torch.no_grad()
def decode_autoregressive(
    backbone: Backbone,
    prefix: Prefix,
    config: DecodingConfig,
    guess: Tensor | None = None,
    *,
    action_dim: int = 1,
    frozen: Tensor | None = None,
    stop: int | None = None,
    record_states: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeResult:
    """Decode a block token by token.

    With ``config.executed_steps = h`` only the first ``h * A`` tokens behind the frozen ones are decoded: a
    causal decoder owes no more before the next replan. The rest is then filled from `guess`, and
    `DecodeResult.exact_tokens` says where it starts.

    Args:
        backbone: The model.
        prefix: From ``backbone.prefill``; its cache is rolled back first.
        config: Only `executed_steps` is read.
        guess: (B, n) int64, the tokens of the slots that are not decoded; needed with fewer executed steps
            than the block has, and used by `record_states`.
        action_dim: Tokens ``A`` of one step.
        frozen: (B, k * A) int64, given tokens of the first ``k`` steps; see `ceed_vla.decoding.frozen`.
        stop: Token that ends a row of a variable-length vocabulary; decoding ends with the last row's.
            Executed steps are then not read, as every step needs every token.
        record_states: Keep the block after every token, undecoded slots from `guess` (0 without one).
        clock: Time in seconds.

    Returns:
        Tokens; ``forwards`` is one less than the tokens decoded, as the prefill gives the first. All frozen
        tokens together take one.

    Raises:
        TokenError: No guess where one is needed, or a guess or frozen tokens that do not fit.
        ConfigError: More executed steps than the block has.
        NotFiniteError: Scores of a row are NaN or infinite.
    """
    started = clock()
    batch, n = prefix.logits.shape[0], backbone.block_length
    given = frozen_length(frozen, batch, n, action_dim, backbone.vocabulary_size)
    if stop is not None:
        check_variable_length(config, given)
    wanted = n if stop is not None else must_converge(config, n, action_dim, given)
    if guess is not None:
        check_tokens(guess, "The guess", (batch, n), backbone.vocabulary_size)
        tokens = guess.to(prefix.logits.device, torch.int64, copy=True)  # (B, n)
    elif wanted == n:
        tokens = torch.zeros(batch, n, dtype=torch.int64, device=prefix.logits.device)
    else:
        raise TokenError(f"Only {wanted} of {n} tokens are decoded; pass a guess (B, {n}) for the others.")
    prefix.cache.roll_back()

    first = prefix.logits  # (B, V), of the first slot that is free
    if frozen is not None and given:
        tokens[:, :given] = frozen
        first = commit_frozen(backbone, prefix, tokens[:, :given])
    best, tokens[:, given] = first.max(-1)
    scores = [best]  # (B,) each: looked at once, at the end
    states = [tokens.clone()] if record_states else None
    slot = given + 1
    while slot < wanted and not _all_stopped(tokens[:, :slot], stop):
        best, tokens[:, slot] = decode_one_token(backbone, prefix, tokens[:, slot - 1 : slot])
        scores.append(best)
        slot += 1
        if states is not None:
            states.append(tokens.clone())

    check_rows(row_sums(torch.stack(scores, dim=1), backbone)[:, 0].cpu().numpy())
    ended = torch.zeros(batch, dtype=torch.bool)  # (B,) rows with a stop token
    iterations = torch.full((batch,), slot - max(given, 1))
    if stop is not None:
        ended = (tokens[:, :slot] == stop).any(1).cpu()
        tokens[:, slot:] = stop
        tokens, *cut = after_stop(tokens, stop, *(states or ()))
        states = cut if record_states else None
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
        seconds={"decode": clock() - started},
    )


def _all_stopped(tokens: Tensor, stop: int | None) -> bool:
    """Whether every row of `tokens` (B, t) holds `stop`. The only look at the host, where there is a stop token."""
    return stop is not None and bool((tokens == stop).any(1).all())


def decode_one_token(backbone: Backbone, prefix: Prefix, token: Tensor) -> tuple[Tensor, Tensor]:
    """Score and id (B,) of the greedy successor of the last decoded `token` (B, 1), which is committed to the cache."""
    logits = backbone.block_logits(prefix, token)  # (B, 1, V)
    prefix.cache.commit(1)
    best, ids = logits[:, 0].max(-1)
    return best, ids
