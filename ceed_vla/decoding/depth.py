"""Depth: a first forward of a few layers, whose tokens Jacobi decoding starts from, or which are enough.

    depth2_cap2             2 layers, then a full forward (ASE's schedule: the last is full)
    deer3t0.7_conf0.2_cap3  3 layers; rows where the exits behind 2 and 3 agree are done (DeeR-VLA), others go on

A shallow forward proves nothing and commits nothing: whatever it writes, the next one writes again. So `depth` without
an exit rule stays exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, CutPrefix, Prefix
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError, TokenError


@register_decoder(r"depth(?P<depth>\d+)", "depth<K>", "a first forward of K layers, then Jacobi")
@torch.no_grad()
def decode_depth(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Jacobi decoding whose first forward runs ``K`` layers and their exit; a cap counts it.

    Raises:
        ConfigError: Not that many layers, or a cap below 2.
        TokenError: As `decode_jacobi`.
        NotFiniteError: As `decode_jacobi`.
    """
    started, depth = request.clock(), int(request.options["depth"])
    (guess,) = shallow_states(backbone, prefix, request, (depth,))
    return _go_on(backbone, prefix, request, guess, depth, started)


def prefix_depth(options: Mapping[str, str]) -> int:
    """How far `decode_deer` wants its prefix run."""
    return int(options["depth"])


@register_decoder(
    r"deer(?P<depth>\d+)t(?P<bins>\d*\.?\d+)", "deer<K>t<D>", "done if exits K - 1 and K are D bins apart on average",
    ("deer3t0.3", "deer3t0.5", "deer3t0.7", "deer3t1", "deer3t2"),
)  # fmt: skip
@torch.no_grad()
def decode_deer(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """One forward of ``K`` layers; where two exits agree on the watched slots, that is all (arXiv 2411.02359).

    The prefix has only run that far too, where the backbone can cut it. The other rows go on as `decode_depth` does.

    Raises:
        ConfigError: As `decode_depth`.
        TokenError: As `decode_jacobi`.
        NotFiniteError: As `decode_jacobi`.
    """
    started, depth, most = request.clock(), int(request.options["depth"]), float(request.options["bins"])
    lower, upper = shallow_states(backbone, prefix, request, (depth - 1, depth))
    cut, batch, n = isinstance(prefix, CutPrefix), len(upper), backbone.block_length
    given = request.frozen_tokens(backbone, batch)
    watched = request.watched_tokens(n, given)
    done = ((lower - upper).abs()[:, :watched].double().mean(1) <= most).cpu()  # (B,)
    proven, ran = torch.full((batch,), given if cut else max(given, 1)), depth if cut else backbone.num_layers
    result = DecodeResult(
        upper, 1, torch.ones(batch, dtype=torch.int64), ["depths_agree"] * batch, proven, torch.zeros_like(done)
    )
    result.layer_forwards, result.prefix_layers = torch.full((batch,), depth), torch.full((batch,), ran)
    if not done.all():
        whole = cast("Any", backbone).extend(prefix) if cut else prefix
        more = _go_on(backbone, whole, request, upper, depth, started)
        result.forwards = more.forwards
        result.tokens = torch.where(done.to(upper.device).unsqueeze(1), upper, more.tokens)
        for row in (~done).nonzero().flatten().tolist():
            result.exit_reason[row] = more.exit_reason[row]
        for name in ("iterations", "exact_tokens", "exact", "layer_forwards"):
            setattr(result, name, torch.where(done, getattr(result, name), getattr(more, name)))
        result.prefix_layers = torch.where(done, ran, backbone.num_layers)
    result.seconds = {"decode": request.clock() - started}
    return result


decode_deer.prefix_depth = prefix_depth  # type: ignore[attr-defined]
decode_deer.eager_only = True  # type: ignore[attr-defined]  # a compiled prefix runs through all layers


def _go_on(
    backbone: Backbone, prefix: Prefix, request: BlockRequest, guess: Tensor, depth: int, started: float
) -> DecodeResult:
    """Jacobi decoding from the state of a forward of `depth` layers, which its counts include."""
    config = request.config
    if config.max_iterations is not None:
        if config.max_iterations < 2:
            raise ConfigError(f"{config.method} with a cap of 1 proves nothing: the last forward is full; use cap2.")
        config = replace(config, max_iterations=config.max_iterations - 1)
    if config.deadline_s is not None:
        config = replace(config, deadline_s=max(config.deadline_s - (request.clock() - started), 1e-6))
    result = decode_jacobi(backbone, prefix, replace(request, config=config, guess=guess))
    result.layer_forwards = depth + result.iterations * backbone.num_layers
    result.forwards, result.iterations = result.forwards + 1, result.iterations + 1
    return result


def shallow_states(backbone: Backbone, prefix: Prefix, request: BlockRequest, depths: tuple[int, ...]) -> list[Tensor]:
    """The states (B, n) that one forward makes of the guess, read at each of the `depths`."""
    batch, n, layers = len(prefix.logits), backbone.block_length, backbone.num_layers
    if not 1 <= depths[0] <= depths[-1] < layers:
        raise ConfigError(f"{request.config.method} reads layers {depths}; they must lie in [1, {layers - 1}].")
    if request.guess is None:
        raise TokenError(f"Jacobi decoding starts from a guess ({batch}, {n}); pass one.")
    given = request.frozen_tokens(backbone, batch)
    prefix.cache.roll_back()
    tokens = request.first_state(backbone, prefix, given)
    if not given:
        tokens[:, 0] = prefix.logits.argmax(-1)
    first, shown = max(given, 1), tokens[:, :-1]
    if len(depths) == 1:
        read = [backbone.block_logits(prefix, shown, depths[0])]
    else:
        read = cast("Any", backbone).depth_logits(prefix, shown, depths)
    states = []
    for logits in read:
        states.append(tokens.clone())
        states[-1][:, first:] = logits[:, first - 1 :].argmax(-1)
    return states
