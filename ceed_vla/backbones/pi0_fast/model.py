"""LeRobot's pi0-FAST (PaliGemma that writes FAST tokens) with the `Backbone` protocol and unchanged
weights.

    [cameras | prompt, right-padded | BOS]  bidirectional        --> slot 0
    "Action: " <FAST ids> "|"               causal, variable length

With the full vocabulary, a token can be any id of the text vocabulary, as in LeRobot's own decoder:
greedy and strict Jacobi decoding return its tokens for any weights. Guesses, and tokens that a
Jacobi iteration writes behind an unproven token, are restricted to the ids of actions. With tokens
restricted to actions, only these ids have logits. That reads 1 % of the head, as distillation
requires; no action differs from LeRobot's.
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
    """LeRobot's pi0-FAST as a causal model over one block of text tokens.

    `Pi0FastTokenizer` replaces LeRobot's own tokenizer.
    """

    forbidden: Tensor | None
    # Head and embedding share one matrix, which published checkpoints store once.
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
                f"The action tokens have blocks of {tokenizer.block_length} tokens, "
                f"scored={tokenizer.scored} and text ids up to {int(ids.max())}; a block must have "
                f"at least 2 tokens, and the model has {words} text ids. Take tokenizer and "
                "weights from the same checkpoint."
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
        """Validate a batch with cameras (B, 3, H, W) in [0, 1] and LeRobot's prompt tokens and mask
        (B, L); return its rows.
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
        """Embed cameras, prompt and BOS as LeRobot's decoder does, with bidirectional attention."""
        # LeRobot's own method reads only the configuration and the device.
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
        if isinstance(cache, StaticCache):  # otherwise LeRobot's model counts on the host
            inputs = {**inputs, "cache_position": cache.positions(embeds.shape[1])}
        return super()._run(embeds, cache, inputs)

    def distillation_parameters(self) -> list[str]:
        """The language model's layers, without the head, which equals the embeddings."""
        return [name for name in super().distillation_parameters() if ".lm_head." not in name]

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype in which LeRobot runs the language model."""
        layer: Any = cast("nn.ModuleList", self.decoder.layers)[0]
        return layer.self_attn.q_proj.weight.dtype  # type: ignore[no-any-return]

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """See `Backbone` and `_speculative`."""
        return self._speculative(super().block_logits(prefix, tokens), tokens)

    def shallow_logits(self, prefix: Prefix, tokens: Tensor, depth: int) -> Tensor:
        return self._speculative(super().shallow_logits(prefix, tokens, depth), tokens)

    def _speculative(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Restrict the `logits` (B, k, V) behind guessed `tokens` (B, k) to the ids of actions.

        With the full vocabulary, all other ids get -inf behind a token that is not the greedy one,
        because the output there is speculative. Behind greedy tokens the logits are unchanged, so a
        fixed point is greedy.
        """
        if self.forbidden is not None and tokens.shape[1] > 1:
            wrong = logits[:, :-1].argmax(-1) != tokens[:, 1:]  # (B, k - 1)
            speculative = wrong.cumsum(1).bool()  # outputs 1 .. k - 1
            logits[:, 1:].masked_fill_(speculative.unsqueeze(-1) & self.forbidden, -torch.inf)
        return logits


def describe_model(folder: str | Path) -> str:
    """Read LeRobot's configuration (JSON) from a checkpoint folder, set to the CPU and without
    compilation.
    """
    values = read_json(Path(folder) / "config.json")
    kind = values.get("type")
    if kind != "pi0_fast":
        raise CheckpointError(
            f"{folder} has a policy of type {kind!r}; it must be LeRobot's 'pi0_fast'."
        )
    return json.dumps(
        {**values, "device": "cpu", "compile_model": False, "gradient_checkpointing": False}
    )


def decode_architecture(architecture: str) -> PI0FastConfig:
    """Parse LeRobot's configuration from its JSON.

    Raises:
        CheckpointError: LeRobot rejects a value, or features are missing.
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
                raise ValueError(f"{name} is {found}; it must be in [{low}, {high}]")
    return config
