"""Decoding of action blocks: greedy autoregressive, and Jacobi with early exit.

    prefix = backbone.prefill(observation)
    result = decode_block(
        backbone, prefix, tokens, "cap2", previous=last.tokens, shift_steps=4, executed_steps=4
    )

Reading order: `config` (how to decode), `names` (decoder names), `request` (one block), `loop` (the
iteration), `exits` (rules that end it early), `jacobi` and `autoregressive` (with torch), `result`.
The axes of early exit register their decoders in `ceed_vla.axes`; this package imports none of
them. Importing it does not import torch; names below that need it are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# These register the decoders and exit rules of this package.
from ceed_vla.decoding import decoders as decoders
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.exits import ExitRule, Seen
from ceed_vla.decoding.names import named_config
from ceed_vla.decoding.registry import (
    Decoder,
    Numbers,
    Options,
    decoder_ladders,
    exit_ladders,
    find_decoder,
    register_decoder,
    register_exit,
)
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult

if TYPE_CHECKING:
    from ceed_vla.decoding.autoregressive import decode_autoregressive as decode_autoregressive
    from ceed_vla.decoding.block import decode_block as decode_block
    from ceed_vla.decoding.block import prefill as prefill
    from ceed_vla.decoding.jacobi import decode_jacobi as decode_jacobi

_WITH_TORCH = {
    "decode_autoregressive": "ceed_vla.decoding.autoregressive",
    "decode_block": "ceed_vla.decoding.block",
    "decode_jacobi": "ceed_vla.decoding.jacobi",
    "prefill": "ceed_vla.decoding.block",
}
__all__ = [
    "BlockRequest",
    "DecodeResult",
    "Decoder",
    "DecodingConfig",
    "ExitRule",
    "Numbers",
    "Options",
    "Seen",
    "decode_autoregressive",
    "decode_block",
    "decode_jacobi",
    "decoder_ladders",
    "exit_ladders",
    "find_decoder",
    "named_config",
    "prefill",
    "register_decoder",
    "register_exit",
]


def __getattr__(name: str) -> Any:
    """Import the parts that need torch when they are first used."""
    if name not in _WITH_TORCH:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_WITH_TORCH[name]), name)


def __dir__() -> list[str]:
    """All names, also of parts that are not imported yet, so that shells can complete them."""
    return sorted({*globals(), *__all__})
