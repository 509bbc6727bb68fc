"""Decoders whose first forwards run a few layers: Jacobi decoding starts from their tokens, or they
are enough.

    depth2_cap2             2 layers, then a full forward from their tokens (as in ASE)
    depth1-2_cap3           1 layer, then 2, then a full forward
    deer3t0.7_conf0.2_cap2  rows whose exits behind 2 and 3 layers agree are done (DeeR-VLA); others
                            run the other layers too, and go on
    sure3p0.3_conf0.2_cap2  the same for rows whose exit behind 3 layers is confident (DSSD)

A shallow forward proves nothing and commits nothing: the next one writes all again. So `depth`
without an exit is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ceed_vla.axes.first_forwards import first_then_jacobi, next_state
from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import (
    ComparesDepths,
    CutPrefix,
    CutsPrefix,
    ReadsDepths,
    offers,
    require,
)
from ceed_vla.decoding.exits import mass_near
from ceed_vla.decoding.host import check_rows, row_sums
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.registry import Numbers, Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@dataclass(frozen=True)
class DepthOptions(Options):
    """Layers of the first forwards, one number each."""

    depths: Numbers


@register_decoder(
    r"depth(?P<depths>\d+(-\d+)*)",
    "depth<K>",
    "K layers, then Jacobi; K-L: K, L",
    ("depth{exit}",),
    options=DepthOptions,
    needs=(ReadsDepths,),
)
@torch.no_grad()
def decode_depth(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Jacobi decoding whose first forwards run ``K``, ... layers and their exits; a cap counts
    them.

    Raises:
        ConfigError: A backbone of fewer layers, or a cap that leaves no full forward; and as
            `decode_jacobi`.
    """
    reader = require(backbone, ReadsDepths, request.config.method)
    depths: Numbers = request.options.depths
    _check_layers(backbone, request, min(depths), max(depths))
    forwards = [partial(reader.shallow_logits, prefix, depth=depth) for depth in depths]
    layers = sum(map(reader.shallow_layers, depths))
    return first_then_jacobi(backbone, prefix, request, forwards, layers)


def cut_prefill(backbone: Any, batch: dict[str, Tensor], options: Any) -> Prefix:
    """Run the prefix as far as the first forward goes, where the model can."""
    if not offers(backbone, CutsPrefix):
        return backbone.prefill(batch)  # type: ignore[no-any-return]
    return backbone.prefill_to(batch, options.depth)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class DeerOptions(Options):
    """The deeper of the two exits that must agree, and the mean distance that is agreement."""

    depth: int
    bins: float


@register_decoder(
    r"deer(?P<depth>\d+)t(?P<bins>\d*\.?\d+)",
    "deer<K>t<D>",
    "or two exits agree",
    ("deer{exit}t0.5", "deer{exit}t1", "deer{exit}t2", "deer{exit}t3"),
    options=DeerOptions,
    relaxes=True,
    compiles=False,  # a compiled prefix runs through all layers
    prefill=cut_prefill,
    needs=(ComparesDepths,),
)
@torch.no_grad()
def decode_deer(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """One forward of ``K`` layers; where two exits agree on the watched slots, that is all (arXiv
    2411.02359).

    The prefix has only run that far too, and rows that go on continue prefix and forward, where the
    backbone can; elsewhere the prefix is whole, and their forward begins again.

    Raises:
        ConfigError: A backbone of fewer layers; and as `decode_jacobi`.
    """
    options: DeerOptions = request.options

    def agree(tokens: Tensor, scores: Sequence[Tensor], given: int, watched: int) -> Tensor:
        lower, upper = (next_state(tokens, logits, given)[:, given:watched] for logits in scores)
        return (lower - upper).abs().double().mean(1) <= options.bins

    depths = (options.depth - 1, options.depth)
    return _first_or_more(backbone, prefix, request, depths, agree, "depths_agree")


@dataclass(frozen=True)
class SureOptions(Options):
    """The exit that decides, and the confidence that it needs."""

    depth: int
    confidence: float


@register_decoder(
    r"sure(?P<depth>\d+)p(?P<confidence>0?\.\d+|0|1(?:\.0*)?)",
    "sure<K>p<P>",
    "or an exit is sure",
    tuple(f"sure{{exit}}p{confidence}" for confidence in (0.7, 0.5, 0.4, 0.3, 0.2, 0.1)),
    options=SureOptions,
    relaxes=True,
    compiles=False,
    prefill=cut_prefill,
    needs=(ComparesDepths,),
)
@torch.no_grad()
def decode_sure(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """As `decode_deer`, for rows whose exit behind ``K`` layers is as confident as ``conf<P>``
    requires of all layers.
    """
    options: SureOptions = request.options

    def sure(tokens: Tensor, scores: Sequence[Tensor], given: int, watched: int) -> Tensor:
        first = max(given, 1)
        logits = scores[0][:, first - 1 : watched - 1]
        mass = mass_near(logits, logits.argmax(-1))  # (B, watched - first)
        if not given:
            mass = torch.cat([mass_near(prefix.logits[:, None], tokens[:, :1]), mass], dim=1)
        if not mass.shape[1]:
            return torch.ones_like(tokens[:, 0], dtype=torch.bool)
        return mass.amin(1) > options.confidence

    return _first_or_more(backbone, prefix, request, (options.depth,), sure, "depth_sure")


# State (B, n), scores (B, n - 1, V) at every depth, frozen slots, watched slots -> rows (B,) done.
Ends = Callable[[Tensor, Sequence[Tensor], int, int], Tensor]


def _first_or_more(
    backbone: Backbone,
    prefix: Prefix,
    request: BlockRequest,
    depths: tuple[int, ...],
    ends: Ends,
    reason: str,
) -> DecodeResult:
    """A forward of the deepest of `depths`, then Jacobi decoding for rows that it does not end."""
    request = request.begun()
    depth = depths[-1]
    _check_layers(backbone, request, depths[0], depth)
    if request.tokens_per_step is None or not request.ordered or request.record_states:
        raise ConfigError(
            "deer and sure keep no states, and need tokens that are bins, a fixed number; use "
            "jacobi."
        )
    tokens, given, watched = request.begin(backbone, prefix)  # (B, n)
    reader = require(backbone, ComparesDepths, request.config.method)
    scores, hidden = reader.depth_logits(prefix, tokens[:, :-1], depths)
    largest = [prefix.logits.amax(-1, keepdim=True), *(found.amax(-1) for found in scores)]
    check_rows(row_sums(torch.cat(largest, dim=1)).cpu().numpy())
    done = ends(tokens, scores, given, watched).cpu()  # (B,)
    cut = isinstance(prefix, CutPrefix)
    first = _shallow_result(next_state(tokens, scores[-1], given), depth, reason)
    first.exact_tokens.fill_(given if cut else max(given, 1))
    first.prefix_layers = torch.full_like(first.iterations, depth if cut else backbone.num_layers)
    if done.all():
        return first
    whole = backbone.extend(prefix) if cut else prefix  # type: ignore[attr-defined]
    going = _Continued(backbone, tokens[:, :-1], hidden, depth, cut)
    more = decode_jacobi(going, whole, request)
    more.layer_forwards = more.iterations * backbone.num_layers + depth * going.again
    return _joined(first, more, done, backbone.num_layers)


def _shallow_result(state: Tensor, depth: int, reason: str) -> DecodeResult:
    """The result of rows (B, n) for which one forward of `depth` layers is enough."""
    ones = torch.ones(len(state), dtype=torch.int64)
    return DecodeResult(
        tokens=state,
        forwards=1,
        iterations=ones,
        exit_reason=[reason] * len(state),
        exact_tokens=ones.clone(),
        exact=torch.zeros(len(state), dtype=torch.bool),
        layer_forwards=depth * ones,
    )


def _joined(first: DecodeResult, more: DecodeResult, done: Tensor, num_layers: int) -> DecodeResult:
    """Rows that are `done` (B,) of the first result, the others of the second."""
    first.forwards = more.forwards
    first.tokens = torch.where(done.to(first.tokens.device).unsqueeze(1), first.tokens, more.tokens)
    for row in (~done).nonzero().flatten().tolist():
        first.exit_reason[row] = more.exit_reason[row]
    for name in ("iterations", "exact_tokens", "exact", "layer_forwards"):
        setattr(first, name, torch.where(done, getattr(first, name), getattr(more, name)))
    assert first.prefix_layers is not None
    first.prefix_layers = torch.where(done, first.prefix_layers, num_layers)
    return first


class _Continued:
    """A backbone whose next forward of the same tokens goes on where a shallow one ended.

    Attributes:
        again: (B,) 1 for rows whose forward begins again: the exit's first token was not the
            prefix's.
    """

    def __init__(
        self, backbone: Backbone, tokens: Tensor, hidden: Tensor, depth: int, cut: bool
    ) -> None:
        self._backbone: Any = backbone
        self.block_length = backbone.block_length
        self.vocabulary_size = backbone.vocabulary_size
        self.num_layers = backbone.num_layers
        self._depth = depth
        self._cut = cut
        self._first: tuple[Tensor, Tensor] | None = (tokens.clone(), hidden)
        self.again = torch.ones(len(tokens), dtype=torch.int64)

    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        return self._backbone.prefill(observation)  # type: ignore[no-any-return]

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        if self._first is not None:
            shown, hidden = self._first
            self._first = None
            if self._cut and shown.shape == tokens.shape:
                same = (shown == tokens).all(1)  # (B,)
                self.again = (~same).long().cpu()
                if same.all():
                    return self._backbone.continue_block(  # type: ignore[no-any-return]
                        prefix, hidden, self._depth
                    )
        return self._backbone.block_logits(prefix, tokens)  # type: ignore[no-any-return]


def _check_layers(backbone: Backbone, request: BlockRequest, lowest: int, deepest: int) -> None:
    layers = backbone.num_layers
    if not 1 <= lowest <= deepest < layers:
        raise ConfigError(
            f"{request.config.method} reads layers {lowest} to {deepest}; allowed are [1, "
            f"{layers - 1}]."
        )
