"""Self-speculation: the policy's first layers draft the next tokens, and all layers verify them.

    spec2x4   drafts of 4 tokens from the exit behind 2 layers (LayerSkip)
    spec2x4r3 the same, but a drafted token within 3 bins is accepted, except of grippers; not exact
              (Spec-VLA)
    del       depth and length by expected tokens per layer call (DEL, arXiv 2504.05598)

A verifying forward continues behind the layers that drafted, so no layer runs twice on a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ceed_vla.axes.drafts.verification import Drafter, check_drafts, decode_drafts
from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import HasExits, ResumesLayers, require
from ceed_vla.decoding.registry import Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.decoding.rows import Rows
from ceed_vla.errors import ConfigError

LONGEST = 12  # longest draft that `del` considers [tokens]
PRIOR = (3.0, 4.0)  # initial counts: accepted drafted tokens, all drafted tokens
KEPT = 0.97  # share of the counts that remains after a forward, so that estimates follow the scene


class _Layers(Drafter):
    """Drafts with the first `depth` layers and their exit, one token per forward."""

    def __init__(self, depth: int, length: int) -> None:
        self.depth, self.length = depth, length

    def draft(
        self, backbone: Backbone, prefix: Prefix, tokens: Tensor, rows: Rows, exact: int, end: int
    ) -> int:
        reader = require(backbone, ResumesLayers, "A draft of layers")
        self._resumed = _Resumed(backbone, reader, self.depth, self.depths)
        for slot in range(exact, end - 1):
            logits = self._resumed.read(prefix, tokens[:, prefix.cache.committed : slot])
            drafted = logits[:, -1].argmax(-1)  # (B,)
            unproven = torch.from_numpy(rows.running & (rows.exact <= slot)).to(drafted.device)
            tokens[:, slot] = torch.where(unproven, drafted, tokens[:, slot])
        return (end - 1 - exact) * self.depth

    def verifier(self, backbone: Backbone) -> Backbone:
        return self._resumed

    def predictions(self) -> list[Tensor]:
        return [torch.cat(self._resumed.predicted[depth], dim=1) for depth in self.depths]


class _Resumed:
    """A backbone whose next forward continues behind the layers that drafted.

    Args:
        backbone: The backbone.
        reader: The same one.
        depth: Layers that draft.
        depths: Exits whose predictions are kept.

    Attributes:
        predicted: Depth -> the tokens (B, k) that its exit predicted, of every part of the block.
    """

    def __init__(
        self, backbone: Backbone, reader: ResumesLayers, depth: int, depths: Sequence[int]
    ) -> None:
        self.block_length = backbone.block_length
        self.vocabulary_size = backbone.vocabulary_size
        self.num_layers = backbone.num_layers
        self._backbone, self._reader, self._depth = backbone, reader, depth
        self._first = sorted({*(d for d in depths if d <= depth), depth})
        self._later = sorted(d for d in depths if d > depth)
        self.predicted: dict[int, list[Tensor]] = {d: [] for d in (*self._first, *self._later)}
        self._hidden: list[Tensor] = []  # (B, k, d) each, behind `depth` layers
        self._read = 0  # tokens whose first layers have run

    def read(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """Run the first layers on those of the next `tokens` (B, k) that have not run yet; returns
        their logits (B, j, V).
        """
        with prefix.cache.behind(self._read):
            hidden, logits = self._reader.first_layers(
                prefix, tokens[:, self._read :], self._depth, self._first
            )
        self._read = tokens.shape[1]
        self._hidden.append(hidden)
        self._keep(self._first, logits)
        return logits[-1]

    def _keep(self, depths: Sequence[int], logits: Sequence[Tensor]) -> None:
        for depth, scores in zip(depths, logits, strict=True):
            self.predicted[depth].append(scores.argmax(-1))

    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        return self._backbone.prefill(observation)

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        if self._read < tokens.shape[1]:
            self.read(prefix, tokens)
        hidden = torch.cat(self._hidden, dim=1)
        logits, later = self._reader.last_layers(prefix, hidden, self._depth, self._later)
        self._keep(self._later, later)
        return logits


class _Online(_Layers):
    """DEL's choice of depth K and length L.

    With acceptance rate p, a draft of L tokens is expected to yield (1 - p^(L + 1)) / (1 - p)
    tokens, at the cost of L * K layers plus all layers. The rates are estimated from the
    predictions of all exits on verified tokens, whose hidden vectors the draft and its verification
    compute anyway.

    Args:
        depths: Depths of the exits.
        layers: Layers of the model.
        counts: Depth -> right and all predictions so far; changed in place.
    """

    def __init__(
        self, depths: Sequence[int], layers: int, counts: dict[int, list[float]] | None = None
    ) -> None:
        self.depths = sorted(depths)
        self.layers = layers
        self.counts = {} if counts is None else counts
        for depth in self.depths:
            self.counts.setdefault(depth, list(PRIOR))
        self._choose()

    def update(self, depth: int, right: int, total: int) -> None:
        kept = self.counts[depth]
        kept[0] = KEPT * kept[0] + right
        kept[1] = KEPT * kept[1] + total
        self._choose()

    def _choose(self) -> None:
        def rate(pair: tuple[int, int]) -> float:
            depth, length = pair
            right, total = self.counts[depth]
            share = right / total if total else PRIOR[0] / PRIOR[1]
            expected = sum(share**i for i in range(length + 1))
            return expected / (length * depth + self.layers)

        pairs = ((depth, length) for depth in self.depths for length in range(1, LONGEST + 1))
        self.depth, self.length = max(pairs, key=rate)


# Counts of `del` by exit. They last from chunk to chunk, so the layers that a chunk runs depend on
# those before it; its tokens do not.
_COUNTS: WeakKeyDictionary[Any, list[float]] = WeakKeyDictionary()


def _forget(backbone: Backbone) -> None:
    """Let `del` start from its prior again."""
    for own in require(backbone, HasExits, "del").exits.values():
        _COUNTS.pop(own, None)


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
    rows_wait=True,
    needs=(ResumesLayers,),
)
def decode_spec(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode greedy tokens with drafts of ``L`` tokens from ``K`` layers and their exit.

    The result is exact without ``r<R>``. With it, a row's tokens depend on the other rows of the
    batch, because the slowest one places the drafts.

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
    rows_wait=True,
    forget=_forget,
    needs=(HasExits, ResumesLayers),
)
def decode_del(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode greedy tokens; every draft has the depth and length with most expected tokens per
    layer call.

    Acceptance rates are estimated online, and last from chunk to chunk.

    Raises:
        ConfigError: The backbone has no exits to choose from; and as `decode_drafts`.
    """
    check_drafts(request)
    exits = require(backbone, HasExits, "del").exits
    depths = [depth for depth, own in exits.items() if own.kind == "linear"]
    if not depths:
        raise ConfigError(
            "This policy has no linear exits, which del chooses from; train them with `ceed-vla "
            "exits`."
        )
    counts = {depth: _COUNTS.setdefault(exits[depth], list(PRIOR)) for depth in depths}
    drafter = _Online(depths, backbone.num_layers, counts)
    return decode_drafts(backbone, prefix, request, drafter)
