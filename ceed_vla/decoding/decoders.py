"""The two decoders that need no axis, by their names; their code is imported when it first runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ceed_vla.decoding.registry import register_decoder

if TYPE_CHECKING:
    from ceed_vla.backbones.base import Backbone, Prefix
    from ceed_vla.decoding.request import BlockRequest
    from ceed_vla.decoding.result import DecodeResult


@register_decoder("ar", "ar", "token by token")
def ar(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Run `decode_autoregressive`."""
    from ceed_vla.decoding.autoregressive import decode_autoregressive

    return decode_autoregressive(backbone, prefix, request)


@register_decoder("jacobi", "jacobi", "Jacobi decoding to the fixed point", timed=True)
def jacobi(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Run `decode_jacobi`."""
    from ceed_vla.decoding.jacobi import decode_jacobi

    return decode_jacobi(backbone, prefix, request)
