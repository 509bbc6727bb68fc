"""Depth: a first forward of a few layers, whose tokens Jacobi decoding starts from, or which are enough.

    depth2_cap2             2 layers, then a full forward from their tokens (ASE's schedule: the last is full)
    deer3t0.7_conf0.2_cap2  rows whose exits behind 2 and 3 layers agree are done (DeeR-VLA); others run the other
                            layers too, and go on

A shallow forward proves nothing and commits nothing: whatever it writes, the next one writes again. So `depth` without
an exit rule stays exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, CutPrefix, Prefix
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@register_decoder(r"depth(?P<depth>\d+)", "depth<K>", "K layers, then Jacobi", ("depth{exit}",))
@torch.no_grad()
def decode_depth(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Jacobi decoding whose first forward runs ``K`` layers and their exit; a cap counts it.

    Raises as `decode_jacobi`, and `ConfigError` for a backbone of fewer layers or a cap below 2.
    """
    depth = int(request.options["depth"])
    _check_layers(backbone, request, depth, depth)
    own = getattr(backbone, "exits", {}).get(depth)
    shallow = depth + (own is not None and own.layer is not None)  # with the exit's own layer
    return first_then_jacobi(backbone, prefix, request, lambda t: backbone.block_logits(prefix, t, depth), shallow)


def first_then_jacobi(
    backbone: Backbone, prefix: Prefix, request: BlockRequest, forward: Callable[[Tensor], Tensor], layers: int
) -> DecodeResult:
    """Jacobi decoding behind one `forward`, tokens (B, n - 1) to logits (B, n - 1, V), of so many `layers`.

    It proves and commits nothing. Raises as `decode_jacobi`, and `ConfigError` for a cap below 2.
    """
    started, config = request.clock(), request.config
    if config.max_iterations is not None:
        if config.max_iterations < 2:
            raise ConfigError(f"{config.method} with a cap of 1 proves nothing: the last forward is full; use cap2.")
        config = replace(config, max_iterations=config.max_iterations - 1)
    tokens, given, _ = _first_state(backbone, prefix, request)
    guess = _after(tokens, forward(tokens[:, :-1]), given)
    result = decode_jacobi(backbone, prefix, _rest(replace(request, config=config, guess=guess), started))
    result.layer_forwards = layers + result.iterations * backbone.num_layers
    result.forwards, result.iterations = result.forwards + 1, result.iterations + 1
    return result


@register_decoder(
    r"deer(?P<depth>\d+)t(?P<bins>\d*\.?\d+)", "deer<K>t<D>", "or until two exits agree",
    ("deer{exit}t0.5", "deer{exit}t1", "deer{exit}t2", "deer{exit}t3"),
)  # fmt: skip
@torch.no_grad()
def decode_deer(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """One forward of ``K`` layers; where two exits agree on the watched slots, that is all (arXiv 2411.02359).

    The prefix has only run that far too, and rows that go on continue prefix and forward, where the backbone can;
    elsewhere the prefix is whole, and their forward begins again.

    Raises as `decode_jacobi`, and `ConfigError` for a backbone of fewer layers.
    """
    started, depth, most = request.clock(), int(request.options["depth"]), float(request.options["bins"])
    _check_layers(backbone, request, depth - 1, depth)
    tokens, given, watched = _first_state(backbone, prefix, request)
    (lower, upper), hidden = cast("Any", backbone).depth_logits(prefix, tokens[:, :-1], (depth - 1, depth))
    state, batch = _after(tokens, upper, given), len(tokens)
    apart = (_after(tokens, lower, given) - state).abs()[:, :watched]
    done = (apart.double().mean(1) <= most).cpu()  # (B,)
    cut = isinstance(prefix, CutPrefix)
    proven, ran = torch.full((batch,), given if cut else max(given, 1)), depth if cut else backbone.num_layers
    result = DecodeResult(
        state, 1, torch.ones(batch, dtype=torch.int64), ["depths_agree"] * batch, proven, torch.zeros_like(done),
        torch.full((batch,), depth), torch.full((batch,), ran),
    )  # fmt: skip
    if not done.all():
        whole = cast("Any", backbone).extend(prefix) if cut else prefix
        going = _Continued(backbone, tokens[:, :-1], hidden, depth, cut)
        more = decode_jacobi(cast("Backbone", going), whole, _rest(request, started))
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


decode_deer.prefill = lambda backbone, batch, options: (  # type: ignore[attr-defined]
    backbone.prefill_to(batch, int(options["depth"])) if getattr(backbone, "cuts", False) else backbone.prefill(batch)
)
decode_deer.relaxes = lambda _: True  # type: ignore[attr-defined]
decode_deer.eager_only = True  # type: ignore[attr-defined]  # a compiled prefix runs through all layers


class _Continued:
    """A backbone whose next forward of the same tokens goes on where a shallow one ended.

    Attributes:
        again: (B,) 1 for rows whose forward begins again: the exit's first token was not the prefix's.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor, hidden: Tensor, depth: int, cut: bool) -> None:
        self._backbone, self._depth, self._cut = backbone, depth, cut
        self._first: tuple[Tensor, Tensor] | None = (tokens.clone(), hidden)
        self.again = torch.ones(len(tokens), dtype=torch.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def block_logits(self, prefix: Prefix, tokens: Tensor, depth: int | None = None) -> Tensor:
        if self._first is not None:
            (shown, hidden), self._first = self._first, None
            same = (shown == tokens).all(1) & self._cut if shown.shape == tokens.shape else self.again.bool() & False
            self.again = (~same).long().cpu()
            if same.all():
                return cast("Tensor", cast("Any", self._backbone).continue_block(prefix, hidden, self._depth))
        return self._backbone.block_logits(prefix, tokens, depth)


def _check_layers(backbone: Backbone, request: BlockRequest, lowest: int, deepest: int) -> None:
    layers = backbone.num_layers
    if not 1 <= lowest <= deepest < layers:
        raise ConfigError(f"{request.config.method} reads layers {lowest} to {deepest}; allowed are [1, {layers - 1}].")


def _first_state(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> tuple[Tensor, int, int]:
    """`BlockRequest.begin`, with the prefix's token."""
    tokens, given, watched = request.begin(backbone, prefix)
    if not given:
        tokens[:, 0] = prefix.logits.argmax(-1)
    return tokens, given, watched


def _rest(request: BlockRequest, started: float) -> BlockRequest:
    """The request with what is left of its deadline."""
    if request.config.deadline_s is None:
        return request
    left = max(request.config.deadline_s - (request.clock() - started), 1e-6)
    return replace(request, config=replace(request.config, deadline_s=left))


def _after(tokens: Tensor, logits: Tensor, given: int) -> Tensor:
    """The state (B, n) that a forward with `logits` (B, n - 1, V) makes of `tokens` (B, n)."""
    state, first = tokens.clone(), max(given, 1)
    state[:, first:] = logits[:, first - 1 :].argmax(-1)
    return state
