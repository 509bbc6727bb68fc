"""A test on a few tokens that a language model is causal and that its cache can be cut."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ceed_vla.cache import TransformersCache
from ceed_vla.errors import ConfigError, raised_as

NEEDED = "Jacobi decoding needs a causal language model with attention in every layer."


@torch.no_grad()
def check_causal(decoder: Any) -> None:
    """Raise `ConfigError` unless a language model can continue a cache that was cut back."""
    name = type(decoder).__name__
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise ConfigError(
            f"{name} has no `layers` and `norm`; use a Llama, Qwen, Gemma, Mistral or a similar "
            "model."
        )
    words = decoder.get_input_embeddings().weight
    embeds = words[: min(4, len(words))][None]
    what = f"{name} cannot continue a key/value cache that was cut back"
    with raised_as(ConfigError, what, NEEDED):
        same = close(*with_and_without_cache(decoder, embeds))
    if not same:
        raise ConfigError(
            f"{name} returns other values with a key/value cache than without. {NEEDED}"
        )


def with_and_without_cache(decoder: Any, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden vectors of embeddings (1, t, d), computed without a cache, and with the first
    token in a cache.
    """
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    afresh = decoder(
        inputs_embeds=embeds, position_ids=positions, use_cache=False
    ).last_hidden_state
    cache = TransformersCache()

    def run(part: Tensor, places: Tensor) -> Tensor:
        past = cache.begin(part.shape[1])
        output = decoder(
            inputs_embeds=part, position_ids=places, past_key_values=past, use_cache=True
        )
        return cast("Tensor", output.last_hidden_state)

    run(embeds[:, :1], positions[:, :1])
    cache.seal_prefix(1)
    run(embeds[:, 1:].flip(1), positions[:, 1:])  # overwritten by the next call
    return afresh[:, 1:], run(embeds[:, 1:], positions[:, 1:])


def close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-3 if a.dtype == torch.float32 else 5e-2
    return bool(torch.isfinite(a).all()) and torch.allclose(
        a.float(), b.float(), rtol=tolerance, atol=tolerance * max(1.0, float(a.abs().max()))
    )
