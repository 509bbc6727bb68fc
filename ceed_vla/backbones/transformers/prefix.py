"""Inputs of a language model of transformers for a prefix, and the prefilled prefix."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ceed_vla.backbones.base import Prefix
from ceed_vla.backbones.capabilities import CutPrefix
from ceed_vla.cache import TransformersCache
from ceed_vla.compiled.static_cache import StaticCache
from ceed_vla.errors import ConfigError


@dataclass
class PrefixEmbeddings:
    """Arguments of the language model for a prefix."""

    embeds: Tensor  # (B, P, d)
    real: Tensor  # (B, P) bool, False for padding
    next_position: Tensor  # (B,) position of the first block token
    # Other arguments of the model family: ``position_ids``, and ``attention_mask`` if needed.
    inputs: dict[str, Any] = field(default_factory=dict)
    # (B, P) bool, image patches that can be dropped, equally many per row; None if none can.
    # Requires `in_order`.
    patches: Tensor | None = None

    @classmethod
    def in_order(cls, embeds: Tensor, real: Tensor) -> PrefixEmbeddings:
        """Embeddings with positions that count from 0 in every row, and masked padding."""
        inputs = {"position_ids": (real.cumsum(1) - 1).clamp(min=0)}
        if not bool(real.all()):
            inputs["attention_mask"] = real.long()
        return cls(embeds, real, real.sum(1), inputs)

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Any) -> PrefixEmbeddings:
        """Select rows.

        Raises:
            ConfigError: An argument of the language model is not arranged by rows.
        """
        inputs = {name: self._rows(name, value, rows) for name, value in self.inputs.items()}
        patches = None if self.patches is None else self.patches[rows]
        return PrefixEmbeddings(
            self.embeds[rows], self.real[rows], self.next_position[rows], inputs, patches
        )

    def _rows(self, name: str, value: Any, rows: Any) -> Any:
        if isinstance(value, dict):  # masks of several kinds of layers
            return {key: self._rows(key, part, rows) for key, part in value.items()}
        if not isinstance(value, Tensor | list | tuple):
            return value
        # Qwen3-VL: features of the image tokens, all rows in one list
        if name == "deepstack_visual_embeds":
            counts = self.inputs["visual_pos_masks"].sum(1).tolist()
            return [
                torch.cat([layer.split(counts)[row] for row in rows.tolist()]) for layer in value
            ]
        if isinstance(value, Tensor) and name == "position_ids" and value.ndim == 3:  # (axes, B, P)
            return value[:, rows]
        if isinstance(value, Tensor) and value.shape[0] == len(self):
            return value[rows]
        if isinstance(value, Tensor) and value.shape[0] == 1:  # one for all rows
            return value
        raise ConfigError(
            f"Rows cannot be selected from {name!r}, an argument of the language model; use "
            "--states=stored."
        )

    def joined(self, block: Tensor) -> dict[str, Any]:
        """Arguments of the language model for prefix and `block` (B, k, d) in one sequence, without
        a cache.
        """
        known = self.inputs["position_ids"]
        length = self.embeds.shape[1]
        k = block.shape[1]
        offsets = torch.arange(k, device=block.device)
        positions = (self.next_position.unsqueeze(1) + offsets).expand(*known.shape[:-1], -1)
        mask = self.inputs.get("attention_mask")
        if isinstance(mask, dict):
            raise ConfigError(
                f"The model has several attention masks ({', '.join(mask)}), which gradient "
                "checkpointing does not support; leave out --gradient_checkpointing."
            )
        marks = {  # masks of image tokens, for example Qwen3-VL's (B, P): False on the block
            name: F.pad(value, (0, k)) if getattr(value, "shape", ())[1:] == (length,) else value
            for name, value in self.inputs.items()
        }
        return {
            **marks,
            "inputs_embeds": torch.cat([self.embeds, block], dim=1),
            "position_ids": torch.cat([known, positions], dim=-1),
            "attention_mask": (
                F.pad(self.real.long(), (0, k), value=1)
                if mask is None or mask.ndim == 2
                else _causal_behind(mask, self.real, k)
            ),
        }


def _causal_behind(mask: Tensor, real: Tensor, k: int) -> Tensor:
    """The mask (B, 1, P + k, P + k) of a prefix with `mask` (B, 1, P, P) and a causal block of `k`
    tokens behind it.
    """
    allowed = mask if mask.dtype == torch.bool else mask == 0
    rows, _, length, _ = mask.shape
    seen = real[:, None, None].expand(rows, 1, k, length)
    block = torch.ones(k, k, dtype=torch.bool, device=mask.device).tril().expand(rows, 1, k, k)
    whole = torch.cat([F.pad(allowed, (0, k)), torch.cat([seen, block], dim=-1)], dim=2)
    if mask.dtype == torch.bool:
        return whole
    return torch.zeros_like(whole, dtype=mask.dtype).masked_fill(
        ~whole, torch.finfo(mask.dtype).min
    )


@dataclass
class TransformersPrefix(Prefix[TransformersCache]):
    """A prefilled prefix."""

    real: Tensor | None  # (B, P) bool, False for padding; None without padding
    next_position: Tensor  # (B,) position of the first block token

    def moved(self, cache: StaticCache) -> TransformersPrefix:
        """The same prefix in another cache, with a mask of constant shape for compiled code."""
        real = (
            self.logits.new_ones(len(self.logits), cache.length) if self.real is None else self.real
        )
        real = F.pad(real.long(), (0, cache.capacity - cache.length), value=1)  # (B, T)
        return replace(self, cache=cast("Any", cache), real=real)


@dataclass
class TransformersCutPrefix(TransformersPrefix, CutPrefix):
    """A prefix that ran through the first layers only."""

    inputs: dict[str, Any]  # arguments of the language model, for the remaining layers
