"""What a language model is given for a prefix, taken from the family's own forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
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
