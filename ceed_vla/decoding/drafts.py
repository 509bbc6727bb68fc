"""Self-speculation: the first layers draft the next tokens one by one, all layers verify them in one forward.

    spec2x4   drafts of 4 tokens from the exit behind 2 layers (LayerSkip)
    del       depth and length chosen before every draft, by expected tokens a layer call (DEL, arXiv 2504.05598)

The result is exact: every token is the greedy one. Drafts are not committed, so each reads those before it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.finite import check_rows, row_sums, to_host
from ceed_vla.decoding.jacobi import Rows, jacobi_iteration
from ceed_vla.decoding.ngram import refuse_jacobi_settings
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError, TokenError

LONGEST = 12  # tokens of a draft that `del` considers
PRIOR = (3.0, 4.0)  # right of all drafted tokens, before any was seen


@register_decoder(
    r"spec(?P<depth>\d+)x(?P<length>\d+)", "spec<K>x<L>", "K layers draft L tokens, verified", ("spec1x4", "spec2x4")
)
@torch.no_grad()
def decode_spec(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Greedy tokens, drafted ``L`` at a time by ``K`` layers and their exit.

    Raises:
        ConfigError: Not that many layers, no tokens, tokens of variable length, or settings of Jacobi decoding.
        TokenError: No guess where the tail is not decoded, or a guess or frozen tokens that do not fit.
        NotFiniteError: Scores of a running row are NaN or infinite.
    """
    return _decode(backbone, prefix, request, _Fixed(int(request.options["depth"]), int(request.options["length"])))


@register_decoder("del", "del", "as spec, with K and L chosen online")
@torch.no_grad()
def decode_del(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Greedy tokens; depth and length of every draft are those that promise most tokens a layer call.

    A verifying forward shows, beside its own tokens, what every exit would have drafted in its place.

    Raises:
        ConfigError: As `decode_spec`, or a backbone without exits to choose from.
        TokenError: As `decode_spec`.
        NotFiniteError: As `decode_spec`.
    """
    exits = getattr(backbone, "exits", {})
    depths = [depth for depth, own in exits.items() if own.layer is None]
    if not depths:
        raise ConfigError("del chooses among linear exits, and this policy has none; train them with `ceed-vla exits`.")
    return _decode(backbone, prefix, request, _Online(depths, backbone.num_layers))


class _Fixed:
    """One depth and length."""

    depths: Sequence[int] = ()  # whose tokens `saw` wants

    def __init__(self, depth: int, length: int) -> None:
        self.choice = depth, length

    def saw(self, depth: int, right: int, total: int) -> None:
        """Of `total` tokens that an exit would have drafted, so many were `right`."""


class _Online(_Fixed):
    """DEL's choice: with acceptance p, a draft of L tokens gives (1 - p^(L + 1)) / (1 - p) for L * K + all layers."""

    def __init__(self, depths: Sequence[int], layers: int) -> None:
        self.depths, self.layers = sorted(depths), layers
        self.counts = {depth: list(PRIOR) for depth in depths}

    @property
    def choice(self) -> tuple[int, int]:  # type: ignore[override]
        def rate(pair: tuple[int, int]) -> float:
            depth, length = pair
            right, total = self.counts[depth]
            return sum((right / total) ** i for i in range(length + 1)) / (length * depth + self.layers)

        return max(((d, length) for d in self.depths for length in range(1, LONGEST + 1)), key=rate)

    def saw(self, depth: int, right: int, total: int) -> None:
        self.counts[depth][0] += right
        self.counts[depth][1] += total


def _decode(backbone: Backbone, prefix: Prefix, request: BlockRequest, chooser: _Fixed) -> DecodeResult:
    started, batch, n, layers = request.clock(), len(prefix.logits), backbone.block_length, backbone.num_layers
    if request.stop is not None or not (1 <= chooser.choice[0] < layers and chooser.choice[1] >= 1):
        raise ConfigError(
            f"{request.config.method} drafts a token or more of a block of fixed length, by some of {layers} layers."
        )
    refuse_jacobi_settings(request.config.method, request.config)
    given = request.frozen_tokens(backbone, batch)
    watched = request.watched_tokens(n, given)
    if watched < n and request.guess is None:
        raise TokenError(f"Only {watched} of {n} tokens are decoded; pass a guess (B, {n}) for the others.")
    prefix.cache.roll_back()
    tokens = request.first_state(backbone, prefix, given)  # (B, n)
    best, first_tokens = prefix.logits.max(-1, keepdim=True)
    check_rows(row_sums(best, backbone).cpu().numpy())
    if not given:
        tokens[:, :1] = first_tokens
    rows, forwards, calls = Rows(batch, n, max(given, 1)), 0, np.zeros(batch, dtype=np.int64)
    states = [tokens.clone()] if request.record_states else None
    while rows.running.any() and watched > 1:
        start, exact = prefix.cache.committed, int(rows.exact[rows.running].min())
        depth, length = chooser.choice
        end = min(exact + length, watched - 1)  # slots [exact, end) are drafted; the forward knows slot `end` too
        calls += rows.running * ((end - exact) * depth + layers)
        for slot in range(exact, end):
            drafted = backbone.block_logits(prefix, tokens[:, start:slot], depth)[:, -1].argmax(-1)  # (B,)
            mine = torch.from_numpy(rows.running & (rows.exact <= slot)).to(drafted.device)
            tokens[:, slot] = torch.where(mine, drafted, tokens[:, slot])
        first = max(start + 1, given)
        before = tokens[:, first : end + 1].clone()  # (B, k)
        shallow = _shallow(backbone, prefix, tokens[:, start:end], chooser.depths, first - start - 1)
        _, best, new = jacobi_iteration(backbone, prefix, tokens, first, end + 1, rows.running)
        forwards += 1
        old, fresh, sums, *others = to_host(before, new, row_sums(best, backbone), *shallow)
        check_rows(sums, rows.running)
        known, running = rows.exact.copy(), rows.running.copy()
        rows.accept(old, fresh, first)
        slots = np.arange(first, end + 1)
        fair = running[:, None] & (slots >= known[:, None]) & (slots < rows.exact[:, None])  # (B, k): inputs were right
        for exit_depth, tried in zip(chooser.depths, others, strict=True):
            chooser.saw(exit_depth, int(((tried == fresh) & fair).sum()), int(fair.sum()))
        rows.end(rows.exact >= n, "converged", forwards)
        rows.end(rows.exact >= watched, "stable", forwards)
        if states is not None:
            states.append(tokens.clone())
        if rows.running.any():
            prefix.cache.commit(int(rows.exact[rows.running].min()) - 1 - start)
    result = rows.result(tokens, forwards, states, request.clock() - started)
    result.layer_forwards = torch.from_numpy(calls)
    return result


def _shallow(backbone: Backbone, prefix: Prefix, tokens: Tensor, depths: Sequence[int], skip: int) -> list[Tensor]:
    """What every exit makes of the `tokens` (B, t) that are verified: its tokens (B, t - skip).

    A forward to the deepest exit shows them all. Its layers are the verifying forward's first ones, which could keep
    them: it is not counted as a layer call.
    """
    if not depths:
        return []
    return [logits[:, skip:].argmax(-1) for logits in backbone.depth_logits(prefix, tokens, depths)]  # type: ignore[attr-defined]
