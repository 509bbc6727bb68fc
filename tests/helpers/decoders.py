"""The decoders with their requests spelled as keyword arguments, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    return decode_autoregressive(backbone, prefix, BlockRequest(config, **request))


def jacobi(
    backbone: Any, prefix: Any, guess: Tensor, config: DecodingConfig = STRICT, **request: Any
) -> DecodeResult:
    """Jacobi decoding; with `executed_steps` only these must be right."""
    if request.get("executed_steps") is not None:
        config = replace(config, watch="executed")
    return decode_jacobi(backbone, prefix, BlockRequest(config, guess, **request))
