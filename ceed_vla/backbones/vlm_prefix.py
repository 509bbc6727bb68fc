"""What a language model is given for a prefix, taken from the family's own forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceed_vla.backbones.base import Prefix
from ceed_vla.cache import TransformersCache
from ceed_vla.errors import ConfigError

_NOT_KEPT = ("input_ids", "past_key_values", "use_cache", "cache_position")


@dataclass
class PrefixEmbeddings:
    """What the language model is called with for a prefix.

    Attributes:
        embeds: (B, P, d).
        real: (B, P) bool, False on the padding, which is on the left.
        next_position: (B,) position of the first block token.
        inputs: The other arguments, as the family made them (`position_ids`, `attention_mask`, ...).
    """

    embeds: Tensor
    real: Tensor
    next_position: Tensor
    inputs: dict[str, Any]

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Tensor) -> PrefixEmbeddings:
        """The given rows.

        Raises:
            ConfigError: The language model reads something that is not arranged by rows.
        """
        inputs = {name: self._rows(name, value, rows) for name, value in self.inputs.items()}
        return PrefixEmbeddings(self.embeds[rows], self.real[rows], self.next_position[rows], inputs)

    def _rows(self, name: str, value: Any, rows: Tensor) -> Any:
        if isinstance(value, dict):  # masks of several kinds of layers
            return {key: self._rows(key, part, rows) for key, part in value.items()}
        if not isinstance(value, Tensor | list | tuple):
            return value
        if name == "deepstack_visual_embeds":  # Qwen3-VL: features of the image tokens, all rows in one list
            counts = self.inputs["visual_pos_masks"].sum(1).tolist()
            return [torch.cat([layer.split(counts)[row] for row in rows.tolist()]) for layer in value]
        if isinstance(value, Tensor) and name == "position_ids" and value.ndim == 3:  # (axes, B, P)
            return value[:, rows]
        if isinstance(value, Tensor) and value.shape[0] == len(self):
            return value[rows]
        if isinstance(value, Tensor) and value.shape[0] == 1:  # one for all rows
            return value
        raise ConfigError(
            f"Rows cannot be taken of {name!r}, which this model's language model reads; distil it with "
            "--states=stored."
        )

    def joined(self, block: Tensor) -> dict[str, Any]:
        """What the language model is called with for the prefix and `block` (B, k, d) in one sequence, without cache.

        Raises:
            ConfigError: Layers with masks of several kinds.
        """
        known, length, k = self.inputs["position_ids"], self.embeds.shape[1], block.shape[1]
        offsets = torch.arange(k, device=block.device)
        positions = (self.next_position.unsqueeze(1) + offsets).expand(*known.shape[:-1], -1)
        mask = self.inputs.get("attention_mask")
        if isinstance(mask, dict):
            raise ConfigError(
                f"Layers with masks of several kinds ({', '.join(mask)}) cannot be recomputed; "
                "train without gradient checkpointing."
            )
        marks = {  # of image tokens, such as Qwen3-VL's: none on the block
            name: F.pad(value, (0, k)) if _one_each(value, length) else value
            for name, value in self.inputs.items()
        }
        return {
            **marks,
            "inputs_embeds": torch.cat([self.embeds, block], dim=1),
            "position_ids": torch.cat([known, positions], dim=-1),
            "attention_mask": F.pad(self.real.long(), (0, k), value=1)
            if mask is None or mask.ndim == 2
            else _causal_behind(mask, self.real, k),
        }


def _one_each(value: Any, length: int) -> bool:
    """Whether `value` has one entry a token (B, P)."""
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length


def _causal_behind(mask: Tensor, real: Tensor, k: int) -> Tensor:
    """The mask (B, 1, P + k, P + k) of a prefix with `mask` (B, 1, P, P) and a causal block of `k` tokens behind it."""
    allowed = mask if mask.dtype == torch.bool else mask == 0
    rows, _, length, _ = mask.shape
    seen = real[:, None, None].expand(rows, 1, k, length)
    block = torch.ones(k, k, dtype=torch.bool, device=mask.device).tril().expand(rows, 1, k, k)
    whole = torch.cat([F.pad(allowed, (0, k)), torch.cat([seen, block], dim=-1)], dim=2)
    if mask.dtype == torch.bool:
        return whole
    return torch.zeros_like(whole, dtype=mask.dtype).masked_fill(~whole, torch.finfo(mask.dtype).min)


@dataclass
class VLMPrefix(Prefix[TransformersCache]):
    """A prefix in the cache.

    Attributes:
        hidden: (B, d), the last hidden vector, which predicts slot 0.
        real: (B, P) bool, or None without padding.
        next_position: (B,) position of the first block token.
    """

    hidden: Tensor
    real: Tensor | None
    next_position: Tensor


class _Arrived(Exception):  # noqa: N818  (a message, not a mistake)
    """The forward pass has reached the language model, with these arguments."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    raise _Arrived({**kwargs, **({"input_ids": args[0]} if args else {})})


def language_model_arguments(
    trunk: nn.Module, decoder: nn.Module, inputs: dict[str, Tensor]
) -> dict[str, Any]:
    """Run `trunk` on `inputs` up to its language model `decoder`; what that would be called with, but for the cache."""
    handle = decoder.register_forward_pre_hook(_stop, with_kwargs=True)
    try:
        trunk(**inputs, use_cache=False)
    except _Arrived as arrived:
        return {k: v for k, v in arrived.arguments.items() if v is not None and k not in _NOT_KEPT}
    finally:
        handle.remove()
    raise ConfigError(f"{type(trunk).__name__} did not call its language model {type(decoder).__name__}.")
