"""Context: Jacobi decoding behind the prefix tokens that score best: ``keep24_conf0.2_cap2``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ceed_vla.axes.context.scorer import CONTEXT, keep_scored
from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import ChoosesPrefix
from ceed_vla.decoding.jacobi import decode_jacobi
from ceed_vla.decoding.registry import Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@dataclass(frozen=True)
class KeepOptions(Options):
    """Number of prefix tokens that are kept, of those that can be dropped."""

    kept: int


def prefill_kept(backbone: Any, batch: dict[str, Tensor], options: KeepOptions) -> Prefix:
    """Run the prefix tokens that score best, if there are more than are to be kept.

    Raises:
        ConfigError: The policy has no scorer for this number of tokens.
    """
    embeddings = backbone.embed_prefix(batch)
    x, may_go, stays = backbone.prefix_tokens(embeddings)
    dropped = max(int(may_go[0].sum()) - options.kept, 0)
    if dropped and [len(scorer.place) for scorer in backbone.context] != [options.kept + dropped]:
        raise ConfigError(
            f"Keeping {options.kept} of {options.kept + dropped} prefix tokens needs a checkpoint "
            f"whose {CONTEXT} scores {options.kept + dropped}; train one with ceed-vla context."
        )
    if dropped:
        scores = backbone.context[0](x, may_go, stays)  # (B, N)
        embeddings = keep_scored(backbone, embeddings, scores, options.kept)
    prefix: Prefix = backbone.prefill_embeddings(embeddings)
    prefix.dropped = dropped
    return prefix


@register_decoder(
    r"keep(?P<kept>[1-9]\d{0,4})",
    "keep<K>",
    "runs only the K best prefix tokens",
    ("keep32", "keep24", "keep16"),
    options=KeepOptions,
    relaxes=True,
    prefill=prefill_kept,
    timed=True,
    needs=(ChoosesPrefix,),
)
@torch.no_grad()
def decode_kept(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Run `decode_jacobi`; with dropped prefix tokens, the result proves nothing about the whole
    prefix (arXiv 2412.12559).
    """
    result = decode_jacobi(backbone, prefix, request)
    if prefix.dropped:
        frozen = request.frozen_tokens(backbone.block_length)
        result.exact_tokens = torch.full_like(result.exact_tokens, frozen)
        result.exact = torch.zeros_like(result.exact)
    return result
