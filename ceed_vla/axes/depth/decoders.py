"""Decoders whose first forwards run a few layers; Jacobi decoding continues from their tokens, if
those do not suffice.

    depth2_cap2             2 layers, then a full forward from their tokens (as in ASE)
    depth1-2_cap3           1 layer, then 2, then a full forward
    deer3t0.7_conf0.2_cap2  rows end where the exits behind 2 and 3 layers agree (DeeR-VLA); other
                            rows run the remaining layers and continue
    sure3p0.3_conf0.2_cap2  rows end where the exit behind 3 layers is confident (DSSD)

A shallow forward proves and commits nothing: the next forward overwrites its keys and values. So
`depth` without an exit rule is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ceed_vla.axes.first_forwards import (
    ended,
    first_then_jacobi,
    joined,
    least_mass,
    next_state,
)
from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import (
    ComparesDepths,
    CutPrefix,
    CutsPrefix,
    ReadsDepths,
    offers,
    require,
)
from ceed_vla.decoding.finite import check_rows
from ceed_vla.decoding.host import row_sums
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.registry import Numbers, Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@dataclass(frozen=True)
class DepthOptions(Options):
    """Numbers of layers, one per shallow forward."""

    depths: Numbers


@register_decoder(
    r"depth(?P<depths>\d+(-\d+)*)",
    "depth<K>",
    "first forward through K layers; K-L: K, then L",
    ("depth{exit}",),
    options=DepthOptions,
    timed=True,
    needs=(ReadsDepths,),
)
@torch.no_grad()
def decode_depth(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Jacobi decoding whose first forwards run only the first ``K``, ... layers and their exits.

    A cap counts these forwards.

    Raises:
        ConfigError: The backbone has fewer layers, or the cap leaves no full forward; and as
            `decode_jacobi`.
    """
    reader = require(backbone, ReadsDepths, request.config.method)
    depths: Numbers = request.options.depths
    _check_layers(backbone, request, min(depths), max(depths))
    forwards = [partial(reader.shallow_logits, prefix, depth=depth) for depth in depths]
    layers = sum(map(reader.shallow_layers, depths))
    return first_then_jacobi(backbone, prefix, request, forwards, layers)


def cut_prefill(backbone: Any, batch: dict[str, Tensor], options: Any) -> Prefix:
    """Run the prefix through the layers of the shallow forward; through all layers if the model
    cannot cut a prefix.
    """
    if not offers(backbone, CutsPrefix):
        return backbone.prefill(batch)  # type: ignore[no-any-return]
    if not 1 <= options.depth < backbone.num_layers:
        raise ConfigError(
            f"A prefix cannot be cut behind {options.depth} layers; it must be in [1, "
            f"{backbone.num_layers - 1}]."
        )
    return backbone.prefill_to(batch, options.depth)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class DeerOptions(Options):
    """The deeper of the two exits, and the mean distance [bins] up to which they agree."""

    depth: int
    bins: float


@register_decoder(
    r"deer(?P<depth>\d+)t(?P<bins>\d*\.?\d+)",
    "deer<K>t<D>",
    "ends when two early exits agree within D bins",
    ("deer{exit}t0.5", "deer{exit}t1", "deer{exit}t2", "deer{exit}t3"),
    options=DeerOptions,
    relaxes=True,
    compiles=False,  # a compiled prefix runs through all layers
    prefill=cut_prefill,
    timed=True,
    needs=(ComparesDepths,),
)
@torch.no_grad()
def decode_deer(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Run one forward of ``K`` layers; rows whose two exits agree on the watched slots end (arXiv
    2411.02359).

    If the backbone can cut a prefix, the prefix runs ``K`` layers too, and the other rows continue
    prefix and forward from there. Otherwise the prefix runs all layers, and the forward of the
    other rows starts over; so does that of a row whose first token the whole prefix changes. A
    forward that starts over counts as one more, which the cap does not include.

    Raises:
        ConfigError: The backbone has fewer layers; and as `decode_jacobi`.
    """
    options: DeerOptions = request.options

    def agree(tokens: Tensor, scores: Sequence[Tensor], frozen: int, watched: int) -> Tensor:
        lower, upper = (next_state(tokens, logits, frozen)[:, frozen:watched] for logits in scores)
        return (lower - upper).abs().double().mean(1) <= options.bins

    depths = (options.depth - 1, options.depth)
    return _first_or_more(backbone, prefix, request, depths, agree, "depths_agree")


@dataclass(frozen=True)
class SureOptions(Options):
    """Depth of the exit that decides, and the confidence that it needs."""

    depth: int
    confidence: float


@register_decoder(
    r"sure(?P<depth>\d+)p(?P<confidence>0?\.\d+|0|1(?:\.0*)?)",
    "sure<K>p<P>",
    "ends when an early exit is confident",
    tuple(f"sure{{exit}}p{confidence}" for confidence in (0.7, 0.5, 0.4, 0.3, 0.2, 0.1)),
    options=SureOptions,
    relaxes=True,
    compiles=False,
    prefill=cut_prefill,
    timed=True,
    needs=(ComparesDepths,),
)
@torch.no_grad()
def decode_sure(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """As `decode_deer`, but rows end if the exit behind ``K`` layers is confident.

    Confidence is that of ``conf<P>``.
    """
    options: SureOptions = request.options

    def sure(tokens: Tensor, scores: Sequence[Tensor], frozen: int, watched: int) -> Tensor:
        return least_mass(prefix, scores[0], tokens, frozen, watched) > options.confidence

    return _first_or_more(backbone, prefix, request, (options.depth,), sure, "depth_sure")


# State (B, n), logits (B, n - 1, V) at every depth, number of frozen slots, end of the watched
# slots -> rows (B,) that end.
Ends = Callable[[Tensor, Sequence[Tensor], int, int], Tensor]


def _first_or_more(
    backbone: Backbone,
    prefix: Prefix,
    request: BlockRequest,
    depths: tuple[int, ...],
    ends: Ends,
    reason: str,
) -> DecodeResult:
    """A forward of the deepest of `depths`, then Jacobi decoding for the rows that did not end."""
    request = request.begun()
    depth = depths[-1]
    _check_layers(backbone, request, depths[0], depth)
    if request.tokens_per_step is None or not request.ordered or request.record_states:
        raise ConfigError(
            "deer and sure need a fixed number of tokens, neighbouring tokens that stand for "
            "neighbouring actions, and record_states=False; use jacobi."
        )
    tokens, frozen, watched = request.begin(backbone, prefix)  # (B, n)
    reader = require(backbone, ComparesDepths, request.config.method)
    scores, hidden = reader.depth_logits(prefix, tokens[:, :-1], depths)
    largest = [prefix.logits.amax(-1, keepdim=True), *(found.amax(-1) for found in scores)]
    check_rows(row_sums(torch.cat(largest, dim=1)).cpu().numpy())
    done = ends(tokens, scores, frozen, watched).cpu()  # (B,)
    cut = isinstance(prefix, CutPrefix)
    layers = torch.full_like(done, depth, dtype=torch.int64)
    state = next_state(tokens, scores[-1], frozen)
    shallow = ended(state, layers, depth if cut else backbone.num_layers, reason)
    shallow.exact_tokens.fill_(frozen if cut else max(frozen, 1))
    if done.all():
        return shallow
    whole = backbone.extend(prefix) if cut else prefix  # type: ignore[attr-defined]
    going = _Continued(backbone, tokens[:, :-1], hidden, depth, done if cut else None)
    guess = torch.where(done.to(state.device)[:, None], state, tokens)
    full = decode_jacobi(going, whole, replace(request, guess=guess, settled=done))
    full.layer_forwards = full.iterations * backbone.num_layers + depth * going.again
    full.iterations = full.iterations + going.again
    full.forwards += int((going.again * ~done).max())
    return joined(shallow, full, done, backbone.num_layers)


class _Continued:
    """A backbone whose first forward, if it has the same tokens, continues a shallow one.

    Args:
        backbone: The model.
        tokens: (B, n - 1) that the shallow forward read.
        hidden: What it returned.
        depth: Its layers.
        done: (B,) rows that ended behind it; None if the prefix is not cut, so that every forward
            starts over.

    Attributes:
        again: (B,) 1 for rows whose forward starts over: their first token from the cut prefix
            differs from that of the whole prefix.
    """

    def __init__(
        self, backbone: Backbone, tokens: Tensor, hidden: Tensor, depth: int, done: Tensor | None
    ) -> None:
        self._backbone: Any = backbone
        self.block_length = backbone.block_length
        self.vocabulary_size = backbone.vocabulary_size
        self.num_layers = backbone.num_layers
        self._depth = depth
        self._done = done
        self._first: tuple[Tensor, Tensor] | None = (tokens.clone(), hidden)
        self.again = torch.ones(len(tokens), dtype=torch.int64)

    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        return self._backbone.prefill(observation)  # type: ignore[no-any-return]

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        if self._first is not None:
            shown, hidden = self._first
            self._first = None
            if self._done is not None and shown.shape == tokens.shape:
                same = (shown == tokens).all(1).cpu() | self._done  # (B,)
                self.again = (~same).long()
                if same.all():
                    return self._backbone.continue_block(  # type: ignore[no-any-return]
                        prefix, hidden, self._depth
                    )
        return self._backbone.block_logits(prefix, tokens)  # type: ignore[no-any-return]


def _check_layers(backbone: Backbone, request: BlockRequest, lowest: int, deepest: int) -> None:
    layers = backbone.num_layers
    if not 1 <= lowest <= deepest < layers:
        raise ConfigError(
            f"{request.config.method} reads layers {lowest} to {deepest}; they must be in [1, "
            f"{layers - 1}]."
        )
