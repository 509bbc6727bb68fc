"""Drafts: the next tokens are guessed cheaply, and all layers verify them in one forward. The
result is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.finite import check_rows, row_sums, to_host
from ceed_vla.decoding.jacobi import Rows, jacobi_iteration
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


class Drafter:
    """Guesses the next tokens."""

    # Whether the first forward computes the whole block, so that its tail is a warm start.
    whole_first: ClassVar[bool] = False
    length: int  # of a draft
    # exits whose tokens `saw` wants, in the place of those that a forward verifies
    depths: Sequence[int] = ()

    def draft(
        self, backbone: Backbone, prefix: Prefix, tokens: Tensor, rows: Rows, exact: int, end: int
    ) -> int:
        """Write into `tokens` (B, n) what may follow the proven ones of every running row, up to
        slot ``end - 1``.

        `exact` are the leading tokens that are proven in all of them. Returns layers that ran.
        """
        raise NotImplementedError

    def saw(self, depth: int, right: int, total: int) -> None:
        """Of `total` tokens that an exit would have drafted, so many were `right`."""


@torch.no_grad()
def decode_drafts(
    backbone: Backbone, prefix: Prefix, request: BlockRequest, drafter: Drafter, near: int = 0
) -> DecodeResult:
    """Greedy tokens: drafts, each verified by one forward, which is right up to the first wrong
    token and one behind.

    Within `near` bins a drafted token stays (arXiv 2507.22424); such rows end as "near", exact up
    to the first of them.

    Raises:
        TokenError: No guess where one is needed, or a guess or frozen tokens that do not fit.
        ConfigError: Tokens of variable length, or settings that only Jacobi decoding has.
        NotFiniteError: Scores of a running row are NaN or infinite.
    """
    started = request.clock()
    batch = len(prefix.logits)
    n = backbone.block_length
    if request.stop is not None or request.tokens_per_step is None:
        raise ConfigError(
            "Drafts (ngram, spec, del) are of blocks of fixed length; variable lengths need jacobi."
        )
    if near and not request.ordered:
        raise ConfigError("Drafts that are only near (spec<K>x<L>r<R>) need tokens that are bins.")
    refuse_jacobi_settings(request.config)
    tokens, given, watched = request.begin(backbone, prefix, guessed=drafter.whole_first)  # (B, n)
    check_rows(row_sums(prefix.logits.amax(-1, keepdim=True), backbone).cpu().numpy())
    rows = Rows(batch, n, max(given, 1))
    forwards = 0
    calls = np.zeros(batch, dtype=np.int64)
    states = [tokens.clone()] if request.record_states else None
    loose = np.isin(np.arange(n) % request.tokens_per_step, request.exact_dims, invert=True)  # (n,)
    strict = np.full(batch, n)  # tokens in front of the first that is only near
    rows.end(rows.exact >= watched, "stable" if watched < n else "converged", 0)
    while rows.running.any():
        start = prefix.cache.committed
        exact = int(rows.exact[rows.running].min())
        # Behind L right drafts the next token is known too.
        first = max(start + 1, given)
        end = min(watched, exact + drafter.length + 1)
        if drafter.whole_first and not forwards:
            end = n
        calls += rows.running * (
            drafter.draft(backbone, prefix, tokens, rows, exact, end) + backbone.num_layers
        )
        before = tokens[:, first:end].clone()  # (B, k)
        shallow: list[Tensor] = []
        # What every exit would have drafted. No layer call: these are the verifying forward's first
        # layers again.
        if drafter.depths:
            logits, _ = cast("Any", backbone).depth_logits(
                prefix, tokens[:, start : end - 1], drafter.depths
            )
            # each (B, k)
            shallow = [scores[:, first - start - 1 :].argmax(-1) for scores in logits]
        _, best, new = jacobi_iteration(backbone, prefix, tokens, first, end, rows.running)
        forwards += 1
        old, fresh, sums, *others = to_host(before, new, row_sums(best, backbone), *shallow)
        check_rows(sums, rows.running)
        known = rows.exact.copy()
        slots = np.arange(first, end)
        apart = np.abs(fresh - old)  # (B, k)
        close = (apart > 0) & (apart <= near) & loose[first:end] & rows.running[:, None]
        close[:, -1] &= known > end - 1  # nobody drafted the last one
        rows.accept(old, np.where(close, old, fresh), first)
        if close.any():
            tokens[:, first:end] = torch.where(torch.from_numpy(close).to(new.device), before, new)
            kept = np.where(close & (slots < rows.exact[:, None]), slots, n)
            strict = np.minimum(strict, kept.min(1))
        # (B, k): what was read before these was right.
        fair = rows.running[:, None] & (slots >= known[:, None]) & (slots < rows.exact[:, None])
        for depth, tried in zip(drafter.depths, others, strict=True):
            drafter.saw(depth, int(((tried == fresh) & fair).sum()), int(fair.sum()))
        rows.end(rows.exact >= n, "converged", forwards)
        rows.end(rows.exact >= watched, "stable", forwards)
        if states is not None:
            states.append(tokens.clone())
        if rows.running.any():
            prefix.cache.commit(int(rows.exact[rows.running].min()) - 1 - start)
    result = rows.result(tokens, forwards, states, request.clock() - started)
    result.layer_forwards = torch.from_numpy(calls)
    result.exact_tokens = torch.minimum(result.exact_tokens, torch.from_numpy(strict))
    result.exact &= torch.from_numpy(strict >= n)
    result.exit_reason = [
        r if s == n else "near" for r, s in zip(result.exit_reason, strict, strict=True)
    ]
    return result


def refuse_jacobi_settings(config: DecodingConfig) -> None:
    """Raise `ConfigError` where a decoder would drop a setting without a word."""
    if config.relaxations or config.tail == "fresh" or config.window:
        raise ConfigError(
            f"The decoder {config.method} has no exits, fresh tail or window, which are settings "
            "of jacobi; leave them out."
        )
