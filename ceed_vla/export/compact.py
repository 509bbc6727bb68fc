"""The graphs of a compact backbone: what torch computes for one row, as modules that ``torch.onnx``
can export.

    stem      image (1, 3, S, S), words (1, L)                 -> tokens (1, T, d) of a camera
    trunk     words (1, L), state (1, D), tokens of cameras    -> slot 0; keys and values
    block     keys and values of P positions, tokens (1, k)    -> k slots; their keys and values

The layers compute what `ceed_vla.backbones.compact.layer.Layer` computes, with operations that
onnxruntime runs faster on a CPU: one product for each of queries, keys and values instead of a
split, scores of the cache and of the new tokens side by side instead of joined keys, and a mask
only among the new tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceed_vla.backbones.compact.layer import Layer
from ceed_vla.edge.settings import CacheSettings
from ceed_vla.export.onnx_files import write_graph
from ceed_vla.export.slots import CACHE, SLOT, read_slots


class ExportedLayer(nn.Module):
    """A `Layer`, with separate weights for every product."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = layer.attention_norm, layer.mlp_norm
        self.heads = layer.heads
        self.out, self.down = layer.out, layer.down
        self.query, self.key, self.value = (_linear(w) for w in layer.qkv.weight.chunk(3))
        self.gate, self.up = (_linear(w) for w in layer.gate_up.weight.chunk(2))

    def forward(
        self,
        x: Tensor,
        cached: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        first: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            x: (1, k, d).
            cached: Keys and values (heads, P, width) in front; None without.
            mask: (k, k) added to the scores among the k tokens; None allows all.
            first: The first token whose output is needed; negative counts from the end.

        Returns:
            (1, k, d) without the tokens before `first`; keys and values (heads, k, width) of all.
        """
        normal = self.attention_norm(x)
        keys, values = (self._by_head(product(normal)) for product in (self.key, self.value))
        query = self._by_head(self.query(normal[:, first:]))
        x = x[:, first:]
        scale = 1 / math.sqrt(query.shape[-1])
        scores = (query @ keys.transpose(1, 2)) * scale  # (heads, k, k)
        if mask is not None:
            scores = scores + mask
        if cached is None:
            attended = scores.softmax(-1) @ values
        else:
            before = (query @ cached[0].transpose(1, 2)) * scale  # (heads, k, P)
            weights = torch.cat([before, scores], dim=-1).softmax(-1)
            length = cached[0].shape[1]
            attended = weights[..., :length] @ cached[1] + weights[..., length:] @ values
        x = x + self.out(attended.transpose(0, 1).reshape(x.shape))
        normal = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normal)) * self.up(normal)), keys, values

    def _by_head(self, x: Tensor) -> Tensor:
        """(1, k, d) as (heads, k, width)."""
        return x.view(x.shape[1], self.heads, -1).transpose(0, 1)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear


class CompactStem(nn.Module):
    """The stem of one camera of the compact backbone."""

    def __init__(self, backbone: Any, camera: int) -> None:
        super().__init__()
        self.codes = backbone.word_codes
        self.stem = backbone.stems[camera]

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        tokens: Tensor = self.stem(image * 2 - 1, self.codes(words).flatten(1))
        return tokens


class CompactTrunk(nn.Module):
    """The prefix of the compact backbone behind its stems."""

    def __init__(self, backbone: Any, ordered: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.layers = nn.ModuleList(ExportedLayer(layer) for layer in backbone.trunk)
        self.ordered = ordered

    def forward(self, words: Tensor, state: Tensor, *cameras: Tensor) -> tuple[Tensor, ...]:
        model = self.backbone
        tokens = [model.words(words), *cameras, model.state(state.clamp(-5, 5)).unsqueeze(1)]
        x = torch.cat(tokens, dim=1) + model.prefix_positions
        if model.kept:
            x = x[:, torch.tensor(model.kept)]
        found = []
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x, *own = layer(x, first=-1 if index == last else 0)  # the state predicts slot 0
            found.append(own)
        slots = read_slots(model._scores(x), self.ordered)
        return (*slots, *(torch.stack(tensors) for tensors in zip(*found, strict=True)))


class CompactBlock(nn.Module):
    """Block tokens of the compact backbone behind a cache."""

    def __init__(self, backbone: Any, ordered: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.layers = nn.ModuleList(ExportedLayer(layer) for layer in backbone.trunk)
        self.ordered = ordered

    def forward(
        self, keys: Tensor, values: Tensor, committed: Tensor, tokens: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the slots behind `tokens`.

        Args:
            keys: (layers, heads, P, width) of all positions in front.
            values: As `keys`.
            committed: (1,) int64, block tokens among these positions.
            tokens: (1, k) int64.
        """
        model = self.backbone
        k = tokens.shape[1]
        places = torch.arange(k)
        x = model.action_tokens(tokens) + model.slots[committed + places]
        later = places > places[:, None]  # (k, k)
        mask = torch.zeros(k, k).masked_fill(later, -torch.inf)
        found = []
        for index, layer in enumerate(self.layers):
            x, *own = layer(x, (keys[index], values[index]), mask)
            found.append(own)
        slots = read_slots(model._scores(x), self.ordered)
        return (*slots, *(torch.stack(tensors) for tensors in zip(*found, strict=True)))


@torch.no_grad()
def write_compact(folder: Path, model: Any, ordered: bool) -> CacheSettings:
    """Write the graphs of a compact backbone; returns the sizes of their cache.

    Args:
        folder: Where the graphs are written.
        model: The backbone.
        ordered: Whether neighbouring tokens stand for neighbouring actions.
    """
    side = model.image_size
    image = torch.rand(1, 3, side, side)
    words = torch.ones(1, model.max_words, dtype=torch.int64)
    state = torch.zeros(1, model.state_dim)
    cameras = []
    for index in range(len(model.cameras)):
        stem = CompactStem(model, index)
        cameras.append(stem(image, words))
        write_graph(folder / f"stem_{index}.onnx", stem, {"image": image, "words": words}, ["out"])
    trunk = CompactTrunk(model, ordered)
    features = {f"camera_{index}": tokens for index, tokens in enumerate(cameras)}
    *_, keys, _ = trunk(words, state, *cameras)  # (layers, heads, P, width)
    inputs = {"words": words, "state": state, **features}
    write_graph(folder / "trunk.onnx", trunk, inputs, [*SLOT, *CACHE])
    layers, heads, length, width = keys.shape
    cache = torch.zeros(layers, heads, length, width)
    tokens = torch.zeros(1, model.block_length - 1, dtype=torch.int64)
    inputs = {
        "keys": cache,
        "values": cache.clone(),
        "committed": torch.tensor([0]),
        "read": tokens,
    }
    positions = torch.export.Dim("P", min=1, max=length + model.block_length)
    read = torch.export.Dim("k", min=1, max=model.block_length)
    write_graph(
        folder / "block.onnx",
        CompactBlock(model, ordered),
        inputs,
        [*SLOT, "new_keys", "new_values"],
        {"keys": {2: positions}, "values": {2: positions}, "read": {1: read}},
    )
    return CacheSettings(layers, heads, width, length)
