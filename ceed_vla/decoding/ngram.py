"""Drafts without a model: what followed the last two tokens before is tried again, and verified in one forward.

Prompt lookup (an n-gram draft, as in lookahead decoding, arXiv 2402.02057) for action blocks: the text that is searched
is the newest state of the block, which begins as the shifted chunk before, and the tokens that are proven. Tokens only
follow one another where the same dimension of an action follows. The result is exact: every token is the greedy one.
"""

from __future__ import annotations

import numpy as np
import torch

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.finite import check_rows, row_sums, to_host
from ceed_vla.decoding.jacobi import Rows, jacobi_iteration
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError, TokenError

DRAFT = 8  # tokens, where the name says no number


@register_decoder(
    r"ngram(?P<length>\d*)", "ngram<L>", "drafts of L tokens from the chunk before, verified", ("ngram4", "ngram8")
)
@torch.no_grad()
def decode_ngram(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode a block by drafting up to ``L`` tokens behind the proven ones and verifying them in one forward.

    As in Jacobi decoding, the first forward computes the whole block, so that its tail is a warm start.

    Raises:
        TokenError: No guess, or a guess or frozen tokens that do not fit.
        ConfigError: Tokens of variable length, a draft of no tokens, or settings that only Jacobi decoding has.
        NotFiniteError: Scores of a running row are NaN or infinite.
    """
    started, batch, n = request.clock(), len(prefix.logits), backbone.block_length
    length, period = int(request.options["length"] or DRAFT), request.tokens_per_step
    if request.stop is not None or period is None or length < 1:
        raise ConfigError(f"ngram drafts {length} tokens of a block of fixed length; variable lengths need jacobi.")
    refuse_jacobi_settings("ngram", request.config)
    if request.guess is None:
        raise TokenError(f"Drafts are looked up in a guess ({batch}, {n}); pass one.")
    given = request.frozen_tokens(backbone, batch)
    watched = request.watched_tokens(n, given)
    prefix.cache.roll_back()
    tokens = request.first_state(backbone, prefix, given)  # (B, n)
    best, first_tokens = prefix.logits.max(-1, keepdim=True)
    check_rows(row_sums(best, backbone).cpu().numpy())
    if not given:
        tokens[:, :1] = first_tokens
    text = tokens.cpu().numpy().copy()  # (B, n): the guess, and what is proven over it
    guess, rows, forwards = text.copy(), Rows(batch, n, max(given, 1)), 0
    states = [tokens.clone()] if request.record_states else None
    while rows.running.any() and watched > 1:
        start = prefix.cache.committed
        reach = int(rows.exact[rows.running].min()) + length + 1  # behind L right drafts the next token is known too
        first, end = max(start + 1, given), min(watched, reach) if forwards else n
        for row in np.flatnonzero(rows.running):
            exact = int(rows.exact[row])
            text[row, exact:end] = draft(guess[row], text[row, :exact], end - exact, period)
        tokens[:, first:end] = torch.from_numpy(text[:, first:end]).to(tokens.device)
        _, best, new = jacobi_iteration(backbone, prefix, tokens, first, end, rows.running)
        forwards += 1
        fresh, sums = to_host(new, row_sums(best, backbone))
        check_rows(sums, rows.running)
        rows.accept(text[:, first:end], fresh, first)
        text[:, first:end] = guess[:, first:end] = fresh
        rows.end(rows.exact >= n, "converged", forwards)
        rows.end(rows.exact >= watched, "stable", forwards)
        if states is not None:
            states.append(tokens.clone())
        if rows.running.any():
            prefix.cache.commit(int(rows.exact[rows.running].min()) - 1 - start)
    return rows.result(tokens, forwards, states, request.clock() - started)


def draft(guess: np.ndarray, proven: np.ndarray, count: int, period: int) -> np.ndarray:
    """The next `count` tokens behind the `proven` ones (k,), from where their last two stood before.

    The `guess` (n,) as it stands comes first if it agrees, then the newest place in the proven tokens, then in it.
    """
    k, n = len(proven), len(guess)
    places = [(guess, k)]
    places += [(proven, end) for end in range(k - period, 1, -period)]
    places += [(guess, end) for end in range(k + (n - 1 - k) // period * period, 1, -period)]
    for text, end in places if k >= 2 else ():
        if (text[end - 2 : end] == proven[-2:]).all():
            found = text[end : end + count]
            return np.concatenate([found, guess[k + len(found) : k + count]])
    return guess[k : k + count]


def refuse_jacobi_settings(name: str, config: DecodingConfig) -> None:
    """Raise `ConfigError` where a decoder would drop a setting without a word."""
    if config.relaxations or config.tail == "fresh" or config.window:
        raise ConfigError(
            f"The decoder {name} has no exits, fresh tail or window, which are settings of jacobi; leave them out."
        )
