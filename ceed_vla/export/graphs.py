"""The graphs of an export: what torch computes for one row, as modules that ``torch.onnx`` can
export.

    stem      image (1, 3, S, S), words (1, L)                     -> tokens (1, T, d) of a camera
    trunk     words (1, L), state (1, D), tokens of every camera   -> slot 0; keys and values
    block     keys, values, positions in use, tokens (1, k)        -> k slots; their keys and values

A graph returns little: for every slot its token, the log-sum of its logits, and what exit rules
measure. onnxruntime's maximum may skip NaN; the log-sum is finite only if no logit is NaN or +inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ceed_vla.decoding.measures import lead, mass_near

SLOT = ("tokens", "total", "mass", "lead")  # outputs (1, k) for k slots
CACHE = ("keys", "values")  # (layers, heads, positions, width)


def read_slots(logits: Tensor, ordered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the host reads of logits (1, k, V); see `SLOT`.

    The mass near the token has a meaning only in `ordered` vocabularies; in others it is 0.
    """
    tokens = logits.argmax(-1)
    total = logits.logsumexp(-1)
    mass = mass_near(logits, tokens) if ordered else torch.zeros_like(total)
    return tokens, total, mass, lead(logits)


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
        self.ordered = ordered

    def forward(self, words: Tensor, state: Tensor, *cameras: Tensor) -> tuple[Tensor, ...]:
        model = self.backbone
        tokens = [model.words(words), *cameras, model.state(state.clamp(-5, 5)).unsqueeze(1)]
        x = torch.cat(tokens, dim=1) + model.prefix_positions
        if model.kept:
            x = x[:, torch.tensor(model.kept)]
        keys, values = [], []
        for layer in model.trunk:
            q, k, v = layer.project(x)
            x = layer.finish(x, q, k, v, None)
            keys.append(k[0])
            values.append(v[0])
        slots = read_slots(model._scores(x[:, -1:]), self.ordered)
        return (*slots, torch.stack(keys), torch.stack(values))


class CompactBlock(nn.Module):
    """Block tokens of the compact backbone behind a cache of constant capacity."""

    def __init__(self, backbone: Any, ordered: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.ordered = ordered

    def forward(
        self, keys: Tensor, values: Tensor, used: Tensor, committed: Tensor, tokens: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the slots behind `tokens`.

        Args:
            keys: (layers, heads, T, width) the cache.
            values: As `keys`.
            used: (1,) int64, positions of the cache in use.
            committed: (1,) int64, block tokens among them.
            tokens: (1, k) int64.
        """
        model = self.backbone
        k = tokens.shape[1]
        places = torch.arange(k)
        x = model.action_tokens(tokens) + model.slots[committed + places]
        cached = (torch.arange(keys.shape[2]) < used).expand(k, -1)  # (k, T)
        mask = torch.cat([cached, places <= places[:, None]], dim=1)  # (k, T + k)
        new_keys, new_values = [], []
        for index, layer in enumerate(model.trunk):
            query, key, value = layer.project(x)
            new_keys.append(key[0])
            new_values.append(value[0])
            key = torch.cat([keys[index : index + 1], key], dim=2)
            value = torch.cat([values[index : index + 1], value], dim=2)
            x = layer.finish(x, query, key, value, mask)
        slots = read_slots(model._scores(x), self.ordered)
        return (*slots, torch.stack(new_keys), torch.stack(new_values))
