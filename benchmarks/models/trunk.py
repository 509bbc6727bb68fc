"""Trunks of published sizes with random weights, as `Backbone`s, for timing.

They have no images and no words: the prefix is ``{"embeds": (B, P, d)}``. They need neither lerobot
nor a checkpoint.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ceed_vla.backbones.base import Prefix
from ceed_vla.backbones.compact.model import CompactBackbone
from ceed_vla.backbones.transformers.backbone import TransformersBackbone
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings

BINS, ACTION_DIM = 256, 7


def _llama(width: int, mlp_width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32064,
    }


def _gemma(
    width: int, mlp_width: int, layers: int, heads: int, kv_heads: int = 1
) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "vocab_size": 257152,
    }


# OpenVLA is the 7B Llama and scores 256 action ids; pi0-FAST is Gemma 2B, attends to its prefix
# bidirectionally, and scores every id. The others are smaller and larger models of these families.
SHAPES = {
    "openvla-0.3b": _llama(1024, 2816, 24, 16),
    "openvla-1b": _llama(2048, 5632, 22, 32),
    "openvla-7b": _llama(4096, 11008, 32, 32),
    "pi0fast-0.3b": _gemma(1024, 4096, 18, 8),
    "pi0fast-2b": _gemma(2048, 16384, 18, 8),
    "pi0fast-7b": _gemma(3072, 24576, 28, 16, 16),
}


class Trunk(TransformersBackbone):
    """A language model with random weights; `settings` are those of its configuration."""

    def __init__(
        self, settings: dict[str, Any], block_length: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        settings = dict(settings)
        self.sees_all = settings["model_type"] == "gemma"
        words = settings["vocab_size"] - 64  # padding
        ids = (
            None if self.sees_all else torch.arange(words - 1, words - 1 - BINS, -1, device=device)
        )
        super().__init__(block_length, settings["vocab_size"] if ids is None else BINS, ids)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with no_init_weights(), torch.device(device):
            self.language_model = cast(
                "PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=dtype)
            )
        self.language_model.tie_weights()
        generator = torch.Generator(device).manual_seed(0)
        for parameter in self.language_model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.data.fill_(1)
        self.eval()

    @property
    def width(self) -> int:
        """Width ``d`` of the embeddings."""
        return int(self.language_model.config.hidden_size)

    def embed_prefix(self, batch: dict[str, Tensor]) -> PrefixEmbeddings:
        embeds = batch["embeds"]
        rows, length = embeds.shape[:2]
        made = PrefixEmbeddings.in_order(
            embeds, torch.ones(rows, length, dtype=torch.bool, device=embeds.device)
        )
        if self.sees_all:
            made.inputs["attention_mask"] = embeds.new_zeros(rows, 1, length, length)
        return made

    def check_observation(self, batch: Any) -> int:
        return len(batch["embeds"])


class CompactTrunk(CompactBackbone):
    """The compact backbone without its stems; default sizes are those of shipped checkpoints."""

    def __init__(
        self, block_length: int, layers: int = 4, width: int = 192, device: str = "cpu"
    ) -> None:
        shape: Any = SimpleNamespace(
            cameras={}, state_dim=1, block_length=block_length, vocabulary_size=255, auxiliary_dim=0
        )
        sizes: Any = SimpleNamespace(
            image_size=96,
            image_grid=4,
            keypoints=0,
            stem_channels=(32,),
            early_readout=0,
            kept_tokens=(),
            max_instruction_words=1,
            words=8,
            width=width,
            layers=layers,
            heads=6,
            mlp_width=512,
        )
        super().__init__(shape, sizes)
        self.width = width
        self.to(device).eval()

    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        return self.prefill_embeddings(observation["embeds"])
