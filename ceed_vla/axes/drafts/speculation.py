"""Self-speculation: the policy's first layers draft the next tokens, and all layers verify them.

    spec2x4   drafts of 4 tokens from the exit behind 2 layers (LayerSkip)
    spec2x4r3 the same, but a drafted token within 3 bins is accepted, except of grippers; not exact
              (Spec-VLA)
    del       depth and length by expected tokens per layer call (DEL, arXiv 2504.05598)

Drafted tokens are not committed, so each draft forward reads the earlier ones of its draft again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ceed_vla.axes.drafts.verification import Drafter, check_drafts, decode_drafts
from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import ComparesDepths, HasExits, ReadsDepths, require
from ceed_vla.decoding.registry import Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.decoding.rows import Rows
from ceed_vla.errors import ConfigError

LONGEST = 12  # longest draft that `del` considers [tokens]
PRIOR = (3.0, 4.0)  # initial counts: accepted drafted tokens, all drafted tokens


class _Layers(Drafter):
    """Drafts with the first `depth` layers and their exit, one token per forward."""

    def __init__(self, depth: int, length: int) -> None:
        self.depth, self.length = depth, length

    def draft(
        self, backbone: Backbone, prefix: Prefix, tokens: Tensor, rows: Rows, exact: int, end: int
    ) -> int:
        reader = require(backbone, ReadsDepths, "A draft of layers")
        start = prefix.cache.committed
        for slot in range(exact, end - 1):
            logits = reader.shallow_logits(prefix, tokens[:, start:slot], self.depth)
            drafted = logits[:, -1].argmax(-1)  # (B,)
            unproven = torch.from_numpy(rows.running & (rows.exact <= slot)).to(drafted.device)
            tokens[:, slot] = torch.where(unproven, drafted, tokens[:, slot])
        return (end - 1 - exact) * self.depth


class _Online(_Layers):
    """DEL's choice of depth K and length L.

    With acceptance rate p, a draft of L tokens is expected to yield (1 - p^(L + 1)) / (1 - p)
    tokens, at the cost of L * K layers plus all layers.
    """

    def __init__(self, depths: Sequence[int], layers: int) -> None:
        self.depths = sorted(depths)
        self.layers = layers
        self.counts = {depth: list(PRIOR) for depth in depths}
        self._choose()

    def update(self, depth: int, right: int, total: int) -> None:
        self.counts[depth][0] += right
        self.counts[depth][1] += total
        self._choose()

    def _choose(self) -> None:
        def rate(pair: tuple[int, int]) -> float:
            depth, length = pair
            right, total = self.counts[depth]
            expected = sum((right / total) ** i for i in range(length + 1))
            return expected / (length * depth + self.layers)

        pairs = ((depth, length) for depth in self.depths for length in range(1, LONGEST + 1))
        self.depth, self.length = max(pairs, key=rate)


@dataclass(frozen=True)
class SpecOptions(Options):
    """Layers that draft, length of a draft [tokens], and distance of accepted tokens [bins]."""

    depth: int
    length: int
    near: int = 0


@register_decoder(
    r"spec(?P<depth>\d+)x(?P<length>\d+)(r(?P<near>\d+))?",
    "spec<K>x<L>",
    "drafts of L tokens from K layers; r<R>: accepted within R bins",
    ("spec{exit}x4", "spec{exit}x4r2"),
    options=SpecOptions,
    relaxes=lambda options: bool(options.near),
    needs=(ReadsDepths,),
)
def decode_spec(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode greedy tokens with drafts of ``L`` tokens from ``K`` layers and their exit.

    The result is exact without ``r<R>``.

    Raises:
        ConfigError: The backbone has fewer layers, or the draft length is 0; and as
            `decode_drafts`.
    """
    options: SpecOptions = request.options
    if not (1 <= options.depth < backbone.num_layers and options.length >= 1):
        raise ConfigError(
            f"spec{options.depth}x{options.length} drafts {options.length} tokens with "
            f"{options.depth} layers; a draft needs at least 1 token, from 1 to "
            f"{backbone.num_layers - 1} layers."
        )
    drafter = _Layers(options.depth, options.length)
    return decode_drafts(backbone, prefix, request, drafter, options.near)


@register_decoder(
    "del",
    "del",
    "as spec, with K and L chosen online",
    ("del",),
    needs=(ReadsDepths, ComparesDepths),
)
def decode_del(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode greedy tokens; every draft has the depth and length with most expected tokens per
    layer call.

    Acceptance rates are estimated online: next to each verifying forward, the exits predict the
    same tokens, which shows what each would have drafted.

    Raises:
        ConfigError: The backbone has no exits to choose from; and as `decode_drafts`.
    """
    check_drafts(request)
    exits = require(backbone, HasExits, "del").exits
    depths = [depth for depth, own in exits.items() if own.layer is None]
    if not depths:
        raise ConfigError(
            "This policy has no linear exits, which del chooses from; train them with `ceed-vla "
            "exits`."
        )
    return decode_drafts(backbone, prefix, request, _Online(depths, backbone.num_layers))
