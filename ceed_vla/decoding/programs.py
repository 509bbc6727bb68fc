"""Programs: a first forward that skips or loops layers (CoLa, arXiv 2507.07996), whose tokens
Jacobi starts from.

program0-1-3_cap2   without layer 2, then a full forward; see `benchmarks.programs`
program0-1-1-2-3    layer 1 twice, then forwards to the fixed point: exact
"""

from __future__ import annotations

import torch

from ceed_vla.backbones.base import Backbone, Prefix, check_program
from ceed_vla.decoding.first import first_then_jacobi
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@register_decoder(r"program(?P<program>\d+(-\d+)*)", "program<I-J-..>", "these layers, then Jacobi")
@torch.no_grad()
def decode_program(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Jacobi decoding whose first forward runs a program of layers, counted from 0; a cap counts
    it.

    Raises as `decode_jacobi`, and `ConfigError` for no `check_program`, a cap below 2, or where
    none are run.
    """
    run = getattr(backbone, "program_logits", None)
    if run is None:
        raise ConfigError(
            f"A {type(backbone).__name__} runs no programs of layers; choose another decoder."
        )
    program = check_program(
        [int(i) for i in request.options["program"].split("-")], backbone.num_layers
    )
    return first_then_jacobi(
        backbone, prefix, request, [lambda t: run(prefix, t, program)], len(program)
    )
