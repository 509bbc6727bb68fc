"""Depth: first forwards of a few layers, whose tokens Jacobi decoding starts from, or which are
enough.

    depth2_cap2             2 layers, then a full forward from their tokens (as in ASE)
    depth1-2_cap3           1 layer, then 2, then a full forward
    deer3t0.7_conf0.2_cap2 rows whose exits behind 2 and 3 layers agree are done (DeeR-VLA); others
    run the other
                            layers too, and go on
    sure3p0.3_conf0.2_cap2  the same for rows whose exit behind 3 layers is confident (DSSD)

A shallow forward proves nothing and commits nothing: the next writes all again. So `depth` without
an exit is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, CutPrefix, Prefix
from ceed_vla.decoding.exits import mass_near
from ceed_vla.decoding.finite import check_rows, row_sums
from ceed_vla.decoding.first import after, first_then_jacobi, rest
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@register_decoder(
    r"depth(?P<depths>\d+(-\d+)*)", "depth<K>", "K layers, then Jacobi; K-L: K, L", ("depth{exit}",)
)
@torch.no_grad()
def decode_depth(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Jacobi decoding whose first forwards run ``K``, ... layers and their exits; a cap counts
    them.

    Raises as `decode_jacobi`, and `ConfigError` for a backbone of fewer layers or a cap that leaves
    no full forward.
    """
    depths = [int(depth) for depth in request.options["depths"].split("-")]
    _check_layers(backbone, request, min(depths), max(depths))
    exits = getattr(backbone, "exits", {})
    # layers of the exits
    own = sum(depth in exits and exits[depth].layer is not None for depth in depths)
    forwards = [partial(backbone.block_logits, prefix, depth=depth) for depth in depths]
    return first_then_jacobi(backbone, prefix, request, forwards, sum(depths) + own)


@register_decoder(
    r"deer(?P<depth>\d+)t(?P<bins>\d*\.?\d+)",
    "deer<K>t<D>",
    "or two exits agree",
    ("deer{exit}t0.5", "deer{exit}t1", "deer{exit}t2", "deer{exit}t3"),
)
@torch.no_grad()
def decode_deer(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """One forward of ``K`` layers; where two exits agree on the watched slots, that is all (arXiv
    2411.02359).

    The prefix has only run that far too, and rows that go on continue prefix and forward, where the
    backbone can; elsewhere the prefix is whole, and their forward begins again.

    Raises as `decode_jacobi`, and `ConfigError` for a backbone of fewer layers.
    """
    depth = int(request.options["depth"])
    most = float(request.options["bins"])

    def agree(tokens: Tensor, scores: Sequence[Tensor], given: int, watched: int) -> Tensor:
        lower, upper = (after(tokens, logits, given)[:, given:watched] for logits in scores)
        return (lower - upper).abs().double().mean(1) <= most

    return _first_or_more(backbone, prefix, request, (depth - 1, depth), agree, "depths_agree")


@register_decoder(
    r"sure(?P<depth>\d+)p(?P<confidence>0?\.\d+|0|1(?:\.0*)?)",
    "sure<K>p<P>",
    "or an exit is sure",
    (
        "sure{exit}p0.7",
        "sure{exit}p0.5",
        "sure{exit}p0.4",
        "sure{exit}p0.3",
        "sure{exit}p0.2",
        "sure{exit}p0.1",
    ),
)
@torch.no_grad()
def decode_sure(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """As `decode_deer`, for rows whose exit behind ``K`` layers is as confident as ``conf<P>`` asks
    of all layers.
    """
    depth = int(request.options["depth"])
    least = float(request.options["confidence"])

    def sure(tokens: Tensor, scores: Sequence[Tensor], given: int, watched: int) -> Tensor:
        first = max(given, 1)
        logits = scores[0][:, first - 1 : watched - 1]
        mass = mass_near(logits, logits.argmax(-1))  # (B, watched - first)
        if not given:
            mass = torch.cat([mass_near(prefix.logits[:, None], tokens[:, :1]), mass], dim=1)
        return (
            mass.amin(1) > least
            if mass.shape[1]
            else torch.ones_like(tokens[:, 0], dtype=torch.bool)
        )

    return _first_or_more(backbone, prefix, request, (depth,), sure, "depth_sure")


def _first_or_more(
    backbone: Backbone,
    prefix: Prefix,
    request: BlockRequest,
    depths: tuple[int, ...],
    ends: Callable[[Tensor, Sequence[Tensor], int, int], Tensor],
    reason: str,
) -> DecodeResult:
    """A forward of the deepest of `depths`, then Jacobi decoding for rows where `ends` (B,) says
    no, of the state, the scores (B, n - 1, V) of every depth, the slots that are given and those
    that are watched.
    """
    started = request.clock()
    depth = depths[-1]
    _check_layers(backbone, request, depths[0], depth)
    if request.tokens_per_step is None or not request.ordered or request.record_states:
        raise ConfigError(
            "deer and sure keep no states, and need tokens that are bins, a fixed number; use "
            "jacobi."
        )
    tokens, given, watched = request.begin(backbone, prefix)
    scores, hidden = cast("Any", backbone).depth_logits(prefix, tokens[:, :-1], depths)
    best = torch.cat(
        [prefix.logits.amax(-1, keepdim=True), *(found.amax(-1) for found in scores)], dim=1
    )
    check_rows(row_sums(best, backbone).cpu().numpy())
    state = after(tokens, scores[-1], given)
    batch = len(tokens)
    cut = isinstance(prefix, CutPrefix)
    done = ends(tokens, scores, given, watched).cpu()  # (B,)
    proven = torch.full((batch,), given if cut else max(given, 1))
    ran = depth if cut else backbone.num_layers
    result = DecodeResult(
        state,
        1,
        torch.ones(batch, dtype=torch.int64),
        [reason] * batch,
        proven,
        torch.zeros_like(done),
        torch.full((batch,), depth),
        torch.full((batch,), ran),
    )
    if not done.all():
        whole = cast("Any", backbone).extend(prefix) if cut else prefix
        going = _Continued(backbone, tokens[:, :-1], hidden, depth, cut)
        more = decode_jacobi(cast("Backbone", going), whole, rest(request, started))
        more.layer_forwards = more.iterations * backbone.num_layers + depth * going.again
        result.forwards = more.forwards
        result.tokens = torch.where(done.to(state.device).unsqueeze(1), state, more.tokens)
        for row in (~done).nonzero().flatten().tolist():
            result.exit_reason[row] = more.exit_reason[row]
        for name in ("iterations", "exact_tokens", "exact", "layer_forwards"):
            setattr(result, name, torch.where(done, getattr(result, name), getattr(more, name)))
        result.prefix_layers = torch.where(done, ran, backbone.num_layers)
    result.seconds = {"decode": request.clock() - started}
    return result


def _cut_prefill(backbone: Any, batch: dict[str, Tensor], options: Mapping[str, Any]) -> Prefix:
    cuts = getattr(backbone, "cuts", False)
    return cast(
        "Prefix",
        backbone.prefill_to(batch, int(options["depth"])) if cuts else backbone.prefill(batch),
    )


for _decoder in (cast("Any", decode_deer), cast("Any", decode_sure)):
    _decoder.prefill = _cut_prefill
    _decoder.relaxes = lambda _: True
    _decoder.eager_only = True  # a compiled prefix runs through all layers


class _Continued:
    """A backbone whose next forward of the same tokens goes on where a shallow one ended.

    Attributes:
        again: (B,) 1 for rows whose forward begins again: the exit's first token was not the
            prefix's.
    """

    def __init__(
        self, backbone: Backbone, tokens: Tensor, hidden: Tensor, depth: int, cut: bool
    ) -> None:
        self._backbone = backbone
        self._depth = depth
        self._cut = cut
        self._first: tuple[Tensor, Tensor] | None = (tokens.clone(), hidden)
        self.again = torch.ones(len(tokens), dtype=torch.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def block_logits(self, prefix: Prefix, tokens: Tensor, depth: int | None = None) -> Tensor:
        if self._first is not None:
            (shown, hidden), self._first = self._first, None
            same = (
                (shown == tokens).all(1) & self._cut
                if shown.shape == tokens.shape
                else self.again.bool() & False
            )
            self.again = (~same).long().cpu()
            if same.all():
                return cast(
                    "Tensor",
                    cast("Any", self._backbone).continue_block(prefix, hidden, self._depth),
                )
        return self._backbone.block_logits(prefix, tokens, depth)


def _check_layers(backbone: Backbone, request: BlockRequest, lowest: int, deepest: int) -> None:
    layers = backbone.num_layers
    if not 1 <= lowest <= deepest < layers:
        raise ConfigError(
            f"{request.config.method} reads layers {lowest} to {deepest}; allowed are [1, "
            f"{layers - 1}]."
        )
