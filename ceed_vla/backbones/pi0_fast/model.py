"""LeRobot's pi0-FAST (PaliGemma that writes FAST tokens) behind the `Backbone` protocol, with its
weights unchanged.

    [cameras | prompt, right-padded | BOS]  bidirectional        --> slot 0
    "Action: " <FAST ids> "|"               causal, variable length

With the full vocabulary a token is any id of the text vocabulary, as LeRobot's own decoder chooses
among all of them: greedy and strict Jacobi decoding give its tokens for any weights, while guesses,
and whatever a Jacobi iteration writes behind a token that is not proven yet, are restricted to the
ids that an action can hold. Restricted to actions, nothing else has a score at all. That reads 1 %
of the head, as distillation must; no action of LeRobot's differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import draccus
import torch
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy, PI0FastPytorch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor, nn
from transformers import PreTrainedModel

from ceed_vla.backbones.base import Prefix
from ceed_vla.backbones.features import check_features
from ceed_vla.backbones.pi0_fast.tokens import Pi0FastTokenizer
from ceed_vla.backbones.transformers.backbone import TransformersBackbone
from ceed_vla.backbones.transformers.config import read_architecture
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings
from ceed_vla.compiled.static_cache import StaticCache
from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.files import read_json
from ceed_vla.images import check_images

_RANGES = {
    "chunk_size": (1, 4096),
    "n_action_steps": (1, 4096),
    "tokenizer_max_length": (1, 65536),
    "max_decoding_steps": (2, 65536),
    "fast_skip_tokens": (0, 10**7),
    "image_resolution": (1, 4096),
    "empty_cameras": (0, 16),
}
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


class Pi0FastBackbone(TransformersBackbone):
    """LeRobot's pi0-FAST, whose own tokenizer is not used, as a causal model over one block of text
    tokens.
    """

    forbidden: Tensor | None
    # published checkpoints hold the matrix that both share once
    copies: Mapping[str, str] = {EMBEDDING: HEAD}

    def __init__(self, model: PI0FastPytorch, tokenizer: Pi0FastTokenizer) -> None:
        head = model.paligemma_with_expert.paligemma.lm_head
        words = int(head.out_features)
        ids = tokenizer.action_ids
        if (
            tokenizer.block_length < 2
            or tokenizer.scored not in (0, words)
            or int(ids.max()) >= words
        ):
            raise ConfigError(
                f"Blocks of {tokenizer.block_length} tokens, {tokenizer.scored or 'some'} of them "
                f"scored and with text ids up to {int(ids.max())}, do not fit a model of {words} "
                "text ids; do tokenizer and weights belong together?"
            )
        full = bool(tokenizer.scored)
        ids = ids.to(head.weight.device)
        super().__init__(tokenizer.block_length, tokenizer.vocabulary_size, None if full else ids)
        self.model = model
        self.config: PI0FastConfig = model.config
        self.augmented_images = tuple(
            k for k in self.config.image_features if ".empty_camera_" not in k
        )
        self._bos = tokenizer.settings.bos
        # (V,)
        forbidden = torch.ones(words, dtype=torch.bool, device=ids.device).index_fill_(
            0, ids, False
        )
        self.register_buffer("forbidden", forbidden if full else None, persistent=False)

    @property
    def pretrained(self) -> PreTrainedModel:
        return cast("PreTrainedModel", self.model.paligemma_with_expert.paligemma)

    @property
    def decoder(self) -> nn.Module:
        return cast("nn.Module", cast("Any", self.pretrained).model.language_model)

    def own_name(self, published: str) -> str:
        return published if published.startswith("model.") else f"model.{published}"

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        """Rows of a batch with cameras (B, 3, H, W) in [0, 1] and LeRobot's prompt tokens and mask
        (B, L).
        """
        wanted: dict[str, tuple[int | None, ...]] = dict.fromkeys(
            self.augmented_images, (3, None, None)
        )
        length = int(self.config.tokenizer_max_length)
        wanted |= {OBS_LANGUAGE_TOKENS: (length,), OBS_LANGUAGE_ATTENTION_MASK: (length,)}
        words = cast("nn.Linear", self.pretrained.get_output_embeddings()).out_features
        rows = check_features(batch, wanted, ids={OBS_LANGUAGE_TOKENS: words})
        check_images({camera: batch[camera] for camera in self.augmented_images})
        return rows

    def embed_prefix(self, batch: dict[str, Tensor]) -> PrefixEmbeddings:
        """Cameras, prompt and BOS as LeRobot's decoder embeds them; they see each other in both
        directions.
        """
        # LeRobot's own method; it reads the configuration and the device only.
        images, image_masks = PI0FastPolicy._preprocess_images(cast("Any", self), batch)
        tokens = batch[OBS_LANGUAGE_TOKENS]
        mask = batch[OBS_LANGUAGE_ATTENTION_MASK].bool()
        bos = torch.full_like(tokens[:, :1], self._bos)
        embeds, real, attention, _, _ = self.model.embed_prefix_fast(
            images,
            image_masks,
            torch.cat([tokens, bos], dim=1),
            torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
        )
        embeds = embeds.to(self._dtype)
        inputs = {
            "attention_mask": prepare_attention_masks_4d(attention, dtype=embeds.dtype),
            "position_ids": real.cumsum(1) - 1,  # padding repeats a position; nothing attends to it
        }
        return PrefixEmbeddings(embeds, real, real.sum(1), inputs)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return super().embed_tokens(tokens).to(self._dtype)

    def _run(self, embeds: Tensor, cache: Any, inputs: dict[str, Any]) -> Tensor:
        if isinstance(cache, StaticCache):  # LeRobot's model would count on the host
            inputs = {**inputs, "cache_position": cache.positions(embeds.shape[1])}
        return super()._run(embeds, cache, inputs)

    def distillation_parameters(self) -> list[str]:
        """The language model's layers. The head equals the embeddings, which make the prefix; a
        checkpoint has one.
        """
        return [name for name in super().distillation_parameters() if ".lm_head." not in name]

    @property
    def _dtype(self) -> torch.dtype:
        """What LeRobot runs the language model in."""
        layer: Any = cast("nn.ModuleList", self.decoder.layers)[0]
        return layer.self_attn.q_proj.weight.dtype  # type: ignore[no-any-return]

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """See `Backbone` and `_speculative`."""
        return self._speculative(super().block_logits(prefix, tokens), tokens)

    def shallow_logits(self, prefix: Prefix, tokens: Tensor, depth: int) -> Tensor:
        return self._speculative(super().shallow_logits(prefix, tokens, depth), tokens)

    def _speculative(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """`logits` (B, k, V) behind `tokens` (B, k), of which some may be guesses.

        With the full vocabulary, ids that no action holds score -inf behind a token that is not the
        greedy one, as that is speculation. Behind greedy tokens every id keeps its score, so a
        fixed point is greedy.
        """
        if self.forbidden is not None and tokens.shape[1] > 1:
            wrong = logits[:, :-1].argmax(-1) != tokens[:, 1:]  # (B, k - 1)
            speculative = wrong.cumsum(1).bool()  # outputs 1 .. k - 1
            logits[:, 1:].masked_fill_(speculative.unsqueeze(-1) & self.forbidden, -torch.inf)
        return logits


def describe_model(folder: str | Path) -> str:
    """LeRobot's configuration (JSON) in a checkpoint folder, for the CPU and without
    compilation.
    """
    values = read_json(Path(folder) / "config.json")
    kind = values.get("type")
    if kind != "pi0_fast":
        raise CheckpointError(
            f"{folder} holds a policy of type {kind!r}; this reads LeRobot's 'pi0_fast'."
        )
    return json.dumps(
        {**values, "device": "cpu", "compile_model": False, "gradient_checkpointing": False}
    )


def decode_architecture(architecture: str) -> PI0FastConfig:
    """LeRobot's configuration from its JSON; `CheckpointError` for values that LeRobot refuses, or
    without features.
    """
    values = read_architecture(architecture)
    values.pop("type", None)
    with raised_as(CheckpointError, "LeRobot's config.json cannot be used", "copy it again."):
        config = draccus.decode(PI0FastConfig, values)
        config.validate_features()
        for name, (low, high) in _RANGES.items():
            found = getattr(config, name)
            if not all(
                low <= value <= high
                for value in (found if isinstance(found, tuple | list) else [found])
            ):
                raise ValueError(f"{name} is {found}; it must lie in [{low}, {high}]")
    return config
