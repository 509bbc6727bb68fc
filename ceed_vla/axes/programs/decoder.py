"""A first forward that skips or repeats layers; Jacobi decoding continues from its tokens.

program0-1-3_cap2   without layer 2, then a full forward; see `benchmarks.programs`
program0-1-1-2-3    layer 1 twice, then forwards to the fixed point: exact
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ceed_vla.axes.first_forwards import first_then_jacobi
from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import RunsPrograms, require
from ceed_vla.decoding.registry import Numbers, Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError
from ceed_vla.fields import short


@dataclass(frozen=True)
class ProgramOptions(Options):
    """Layers of the first forward, counted from 0, in the order in which they run."""

    program: Numbers


@register_decoder(
    r"program(?P<program>\d+(-\d+)*)",
    "program<I-J-..>",
    "first forward through these layers",
    options=ProgramOptions,
    timed=True,
    needs=(RunsPrograms,),
)
@torch.no_grad()
def decode_program(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Jacobi decoding whose first forward runs a program of layers; a cap counts this forward.

    Raises:
        ConfigError: The program cannot run, or the cap is below 2; and as `decode_jacobi`.
    """
    program = check_program(request.options.program, backbone.num_layers)
    runner = require(backbone, RunsPrograms, request.config.method)

    def forward(tokens: Tensor) -> Tensor:
        return runner.program_logits(prefix, tokens, program)

    return first_then_jacobi(backbone, prefix, request, [forward], len(program))


def check_program(program: Sequence[int], layers: int) -> Sequence[int]:
    """Validate and return `program`.

    Raises:
        ConfigError: It does not list 1 to 2 * `layers` layers, each in [0, layers - 1].
    """
    if not 1 <= len(program) <= 2 * layers or not all(0 <= i < layers for i in program):
        allowed = f"1 to {2 * layers} layers, of 0 to {layers - 1}"
        raise ConfigError(f"The program is {short(list(program))}; it must list {allowed}.")
    return program
