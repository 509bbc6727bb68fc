"""Decoders whose first forward runs a program and ends the rows that are confident of it.

route0.2_conf0.2_cap2        the program that the router of the checkpoint chooses for the row
skip7-8p0.2_conf0.2_cap2     the same one for all: without layers 7 and 8

Rows that are not confident continue with Jacobi decoding from the tokens of this forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ceed_vla.axes.first_forwards import check_cap, ended, joined, least_mass, next_state
from ceed_vla.axes.programs.decoder import check_program
from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import RoutesPrograms, RunsPrograms, require
from ceed_vla.decoding.finite import check_rows
from ceed_vla.decoding.host import row_sums
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.registry import Numbers, Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError

REASON = "program_sure"
_CONFIDENCE = r"0?\.\d+|0|1(?:\.0*)?"


@dataclass(frozen=True)
class RouteOptions(Options):
    """Confidence at which a row ends, as in ``conf<P>``."""

    confidence: float


@dataclass(frozen=True)
class SkipOptions(RouteOptions):
    """Layers that do not run, counted from 0."""

    layers: Numbers


@register_decoder(
    rf"route(?P<confidence>{_CONFIDENCE})",
    "route<P>",
    "first forward by the router's program; ends if it is confident",
    options=RouteOptions,
    relaxes=True,
    compiles=False,
    timed=True,
    needs=(RunsPrograms, RoutesPrograms),
)
@torch.no_grad()
def decode_route(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Run the program that the router chooses for every row; confident rows end.

    Raises:
        ConfigError: The checkpoint has no router; and as `decode_skip`.
    """
    routers = require(backbone, RoutesPrograms, request.config.method).router
    if not routers:
        raise ConfigError(
            "The checkpoint has no router of programs; train one with `ceed-vla route`, or use "
            "another decoder."
        )
    if prefix.state is None:
        raise ConfigError(
            f"A router reads the state of the prefix, which a {type(backbone).__name__} does not "
            "return; use another decoder."
        )
    (router,) = routers
    return _program_or_more(
        backbone, prefix, request, router.programs, router(prefix.state).argmax(-1).cpu()
    )


@register_decoder(
    rf"skip(?P<layers>\d+(-\d+)*)p(?P<confidence>{_CONFIDENCE})",
    "skip<I-J-..>p<P>",
    "first forward without these layers; ends if it is confident",
    options=SkipOptions,
    relaxes=True,
    compiles=False,
    timed=True,
    needs=(RunsPrograms,),
)
@torch.no_grad()
def decode_skip(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Run one forward without some layers; confident rows end.

    Raises:
        ConfigError: The model lacks one of the layers, no layer is left, or tokens do not belong to
            steps; and as `decode_jacobi`.
    """
    options: SkipOptions = request.options
    layers = backbone.num_layers
    program = tuple(i for i in range(layers) if i not in options.layers)
    if len(program) != layers - len(options.layers):
        raise ConfigError(
            f"{request.config.method} skips layers {', '.join(map(str, options.layers))}; each "
            f"must be one of 0 to {layers - 1}, and occur once."
        )
    rows = torch.zeros(len(prefix.logits), dtype=torch.int64)
    return _program_or_more(backbone, prefix, request, [program], rows)


def _program_or_more(
    backbone: Backbone,
    prefix: Prefix,
    request: BlockRequest,
    programs: Sequence[Sequence[int]],
    chosen: Tensor,
) -> DecodeResult:
    """A forward by the `chosen` (B,) program of every row, then Jacobi decoding for the rows that
    are not confident.
    """
    request = request.begun()
    if request.tokens_per_step is None or not request.ordered or request.record_states:
        raise ConfigError(
            "route and skip need a fixed number of tokens, neighbouring tokens that stand for "
            "neighbouring actions, and record_states=False; use jacobi."
        )
    check_cap(request, 1)
    for program in programs:
        check_program(program, backbone.num_layers)
    runner: Any = require(backbone, RunsPrograms, request.config.method)
    tokens, frozen, watched = request.begin(backbone, prefix)  # (B, n)
    logits = torch.empty(0)
    for index in chosen.unique().tolist():
        found = runner.program_logits(prefix, tokens[:, :-1], programs[index])  # (B, n - 1, V)
        own = (chosen == index).to(found.device)[:, None, None]
        logits = torch.where(own, found, logits) if logits.numel() else found
    largest = torch.cat([prefix.logits.amax(-1, keepdim=True), logits.amax(-1)], dim=1)
    check_rows(row_sums(largest).cpu().numpy())
    mass = least_mass(prefix, logits, tokens, frozen, watched)
    done = (mass > request.options.confidence).cpu()  # (B,)
    state = next_state(tokens, logits, frozen)
    layers = torch.tensor([len(programs[index]) for index in chosen.tolist()])
    first = ended(state, layers, backbone.num_layers, REASON)
    first.exact_tokens.fill_(max(frozen, 1))
    if done.all():
        return first
    request = replace(request, guess=state, forwards_before=1, settled=done)
    full = decode_jacobi(backbone, prefix, request)
    full.layer_forwards = layers + full.iterations * backbone.num_layers
    full.forwards = full.forwards + 1
    full.iterations = full.iterations + 1
    return joined(first, full, done, backbone.num_layers)
