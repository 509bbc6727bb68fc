"""Greedy autoregressive decoding: the reference. Cached, one token a forward, no look at the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.exits import must_converge
from ceed_vla.decoding.guesses import check_guess
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import TokenError


@torch.no_grad()
def decode_autoregressive(
    backbone: Backbone,
    prefix: Prefix,
    config: DecodingConfig,
    guess: Tensor | None = None,
    *,
    action_dim: int = 1,
    record_states: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeResult:
    """Decode a block token by token.

    With ``config.executed_steps = h`` only the first ``h * A`` tokens are decoded: a causal decoder owes no
    more before the next replan. The rest is then filled from `guess`, and `DecodeResult.exact_tokens` says
    where it starts.

    Args:
        backbone: The model.
        prefix: From ``backbone.prefill``; its cache is rolled back first.
        config: Only `executed_steps` is read.
        guess: (B, n) int64, the tokens of the slots that are not decoded; needed with fewer executed steps
            than the block has, and used by `record_states`.
        action_dim: Tokens ``A`` of one step.
        record_states: Keep the block after every token, undecoded slots from `guess` (0 without one).
        clock: Time in seconds.

    Returns:
        Tokens; ``forwards`` is one less than the tokens decoded, as the prefill gives the first.

    Raises:
        TokenError: No guess where one is needed, or one that does not fit.
        ConfigError: More executed steps than the block has.
    """
    started = clock()
    batch, n = prefix.logits.shape[0], backbone.block_length
    wanted = must_converge(config, n, action_dim)
    if guess is not None:
        check_guess(guess, batch, n, backbone.vocabulary_size)
        tokens = guess.to(prefix.logits.device, copy=True)  # (B, n)
    elif wanted == n:
        tokens = torch.zeros(batch, n, dtype=torch.int64, device=prefix.logits.device)
    else:
        raise TokenError(
            f"Only {wanted} of {n} tokens are decoded; pass a guess (B, {n}) that fills the others."
        )
    prefix.cache.roll_back()

    tokens[:, 0] = prefix.logits.argmax(-1)
    states = [tokens.clone()] if record_states else None
    for slot in range(1, wanted):
        tokens[:, slot] = decode_one_token(backbone, prefix, tokens[:, slot - 1 : slot])
        if states is not None:
            states.append(tokens.clone())

    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)  # or the time below would be that of the launches
    return DecodeResult(
        tokens=tokens,
        forwards=wanted - 1,
        iterations=torch.full((batch,), wanted - 1),
        exit_reason=["complete"] * batch,
        exact_tokens=torch.full((batch,), wanted),
        exact=torch.full((batch,), wanted == n),
        states=states,
        seconds={"decode": clock() - started},
    )


def decode_one_token(backbone: Backbone, prefix: Prefix, token: Tensor) -> Tensor:
    """The greedy successor (B,) of the last decoded `token` (B, 1), which is committed to the cache."""
    logits = backbone.block_logits(prefix, token)  # (B, 1, V)
    prefix.cache.commit(1)
    return logits[:, 0].argmax(-1)
