"""Self-speculation: the policy's first layers draft the next tokens. The result is exact.

    spec2x4   drafts of 4 tokens from the exit behind 2 layers (LayerSkip)
    spec2x4r3 the same, and a drafted token counts as right within 3 bins, but for grippers: not
              exact (Spec-VLA)
    del       depth and length by expected tokens a layer call (DEL, arXiv 2504.05598)

Drafts of layers are not committed, so each reads those before it again.
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

LONGEST = 12  # tokens of a draft that `del` considers
PRIOR = (3.0, 4.0)  # right of all drafted tokens, before any was seen


class _Layers(Drafter):
    """The first `depth` layers and their exit, a token a forward."""

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
            mine = torch.from_numpy(rows.running & (rows.exact <= slot)).to(drafted.device)
            tokens[:, slot] = torch.where(mine, drafted, tokens[:, slot])
        return (end - 1 - exact) * self.depth


class _Online(_Layers):
    """DEL's choice: with acceptance p, a draft of L tokens gives (1 - p^(L + 1)) / (1 - p) for L *
    K + all layers.
    """

    def __init__(self, depths: Sequence[int], layers: int) -> None:
        self.depths = sorted(depths)
        self.layers = layers
        self.counts = {depth: list(PRIOR) for depth in depths}
        self._choose()

    def saw(self, depth: int, right: int, total: int) -> None:
        self.counts[depth][0] += right
        self.counts[depth][1] += total
        self._choose()

    def _choose(self) -> None:
        def rate(pair: tuple[int, int]) -> float:
            depth, length = pair
            right, total = self.counts[depth]
            return sum((right / total) ** i for i in range(length + 1)) / (
                length * depth + self.layers
            )

        pairs = ((depth, length) for depth in self.depths for length in range(1, LONGEST + 1))
        self.depth, self.length = max(pairs, key=rate)


@dataclass(frozen=True)
class SpecOptions(Options):
    """Layers that draft, tokens of a draft, and bins within which a drafted token stays."""

    depth: int
    length: int
    near: int = 0


@register_decoder(
    r"spec(?P<depth>\d+)x(?P<length>\d+)(r(?P<near>\d+))?",
    "spec<K>x<L>",
    "drafts of K layers; r<R>: within R bins",
    ("spec{exit}x4", "spec{exit}x4r2"),
    options=SpecOptions,
    relaxes=lambda options: bool(options.near),
    needs=(ReadsDepths,),
)
def decode_spec(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Greedy tokens, drafted ``L`` at a time by ``K`` layers and their exit; with ``r<R>`` not
    exact.

    Raises:
        ConfigError: A backbone of fewer layers, or drafts of no tokens; and as `decode_drafts`.
    """
    options: SpecOptions = request.options
    if not (1 <= options.depth < backbone.num_layers and options.length >= 1):
        raise ConfigError(
            f"spec{options.depth}x{options.length}: a token or more, by some of "
            f"{backbone.num_layers} layers."
        )
    drafter = _Layers(options.depth, options.length)
    return decode_drafts(backbone, prefix, request, drafter, options.near)


@register_decoder(
    "del", "del", "as spec, K and L chosen online", ("del",), needs=(ReadsDepths, ComparesDepths)
)
def decode_del(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Greedy tokens; depth and length of every draft are those that promise most tokens a layer
    call.

    A verifying forward shows, beside its own tokens, what every exit would have drafted in its
    place.

    Raises:
        ConfigError: A backbone without exits to choose from; and as `decode_drafts`.
    """
    check_drafts(request)
    exits = require(backbone, HasExits, "del").exits
    depths = [depth for depth, own in exits.items() if own.layer is None]
    if not depths:
        raise ConfigError(
            "del chooses among linear exits, and this policy has none; train them with `ceed-vla "
            "exits`."
        )
    return decode_drafts(backbone, prefix, request, _Online(depths, backbone.num_layers))
