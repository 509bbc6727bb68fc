"""Context: Jacobi decoding behind the tokens that matter most of the prefix:
``keep24_conf0.2_cap2``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.context import CONTEXT, keep_scored
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@register_decoder(
    r"keep(?P<kept>[1-9]\d{0,4})", "keep<K>", "K best prefix tokens", ("keep32", "keep24", "keep16")
)
@torch.no_grad()
def decode_part(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """`decode_jacobi`; where tokens were left out, nothing is proven about the whole prefix (arXiv
    2412.12559).
    """
    result = decode_jacobi(backbone, prefix, request)
    if prefix.dropped:
        result.exact_tokens = torch.full_like(
            result.exact_tokens, request.frozen_tokens(backbone, len(prefix.logits))
        )
        result.exact = torch.zeros_like(result.exact)
    return result


def _prefix(backbone: Any, batch: dict[str, Tensor], options: dict[str, str]) -> Prefix:
    """The prefix of the best tokens, if more may go; `ConfigError` without a scorer of so many."""
    embeddings = backbone.embed_prefix(batch)
    kept = int(options["kept"])
    x, may_go, stays = backbone.prefix_tokens(embeddings)
    dropped = max(int(may_go[0].sum()) - kept, 0)
    if dropped and [len(scorer.place) for scorer in backbone.context] != [kept + dropped]:
        raise ConfigError(
            f"Keeping {kept} of {kept + dropped} prefix tokens needs a checkpoint whose {CONTEXT} "
            "scores so many: ceed-vla context."
        )
    if dropped:
        embeddings = keep_scored(backbone, embeddings, backbone.context[0](x, may_go, stays), kept)
    prefix = cast("Prefix", backbone.prefill_embeddings(embeddings))
    prefix.dropped = dropped
    return prefix


decode_part.prefill = _prefix  # type: ignore[attr-defined]
decode_part.relaxes = lambda _: True  # type: ignore[attr-defined]
