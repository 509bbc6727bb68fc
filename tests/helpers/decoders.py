"""The decoders with their requests spelled as keyword arguments, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ceed_vla.decoding import (
    BlockRequest,
    DecodeResult,
    DecodingConfig,
    decode_autoregressive,
    decode_jacobi,
)

STRICT = DecodingConfig()
GREEDY = DecodingConfig(method="ar")


def greedy(
    backbone: Any, prefix: Any, config: DecodingConfig = GREEDY, **request: Any
) -> DecodeResult:
    """Greedy decoding, token by token."""
    return decode_autoregressive(backbone, prefix, behind(backbone, BlockRequest(config), request))


def jacobi(
    backbone: Any, prefix: Any, guess: Tensor, config: DecodingConfig = STRICT, **request: Any
) -> DecodeResult:
    """Jacobi decoding; with `executed_steps`, only these steps must converge."""
    if request.get("executed_steps") is not None:
        config = replace(config, watch="executed")
    return decode_jacobi(backbone, prefix, behind(backbone, BlockRequest(config, guess), request))


def behind(backbone: Any, request: BlockRequest, settings: dict[str, Any]) -> BlockRequest:
    """`request` with `settings`; "frozen" are tokens (B, k * A) at the start of its guess."""
    frozen = settings.get("frozen")
    request = replace(request, **{name: settings[name] for name in settings if name != "frozen"})
    if frozen is None:
        return request
    guess = request.guess
    if guess is None:
        guess = torch.zeros(len(frozen), backbone.block_length, dtype=torch.int64)
    assert request.tokens_per_step is not None
    guess = torch.cat([frozen, guess[:, frozen.shape[1] :]], dim=1)
    return replace(request, guess=guess, frozen_steps=frozen.shape[1] // request.tokens_per_step)
