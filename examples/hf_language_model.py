"""A language model of Hugging Face as a backbone, in one file.

`python examples/hf_language_model.py` checks it. Without `--policy.backbone.path` it is a small
Llama with random weights. With the folder of a causal language model (Llama, Qwen, Gemma, SmolLM:
one with `model.layers` and `model.norm`) it is that model, with the tokenizer in that folder. From
demonstrations to a teacher, with the environment of own_environment.py:

    export PYTHONPATH=examples
    ceed-vla record --root demos --mode perturb --env.type=point_reach \
        --discover_packages_path=own_environment
    ceed-vla train --roots demos --output_dir teacher --grounding_steps 0 --rounds 0 \
        --env.type=point_reach --policy.backbone.type=hf_lm \
        --discover_packages_path=own_environment,hf_language_model

`TransformersBackbone` provides cache, decoding, training and exits. This file defines the prefix
and builds the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ceed_vla import CeedVLAPolicy
from ceed_vla.backbones.base import TrainableBackbone
from ceed_vla.backbones.check import check_untrained
from ceed_vla.backbones.compact.words import make_instruction_step
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.backbones.features import check_features
from ceed_vla.backbones.pi0_fast.inputs import PromptTokensStep
from ceed_vla.backbones.transformers.backbone import TransformersBackbone
from ceed_vla.backbones.transformers.config import least_sizes, published_folder, read_architecture
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings
from ceed_vla.backbones.transformers.step_files import LOCAL
from ceed_vla.checkpoints import resolve_checkpoint
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.fields import Checked, ranged
from ceed_vla.word_ids import PAD_ID

# ---- the backbone --------------------------------------------------------------------------------

GRID = 8  # each camera has GRID ** 2 tokens in the prefix


class LanguageModelBackbone(TransformersBackbone):
    """A causal language model whose last `V` rows of the embedding are the action tokens."""

    def __init__(self, model: PreTrainedModel, shape: PolicyShape) -> None:
        rows, width = cast("nn.Embedding", model.get_input_embeddings()).weight.shape
        action_ids = torch.arange(rows - shape.vocabulary_size, rows)  # (V,)
        super().__init__(shape.block_length, shape.vocabulary_size, action_ids)
        self.language_model = model
        self.rows = rows
        self.state_dim = shape.state_dim
        self.augmented_images = tuple(shape.cameras)
        patches = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=4), nn.GELU(), nn.Conv2d(32, width, 3, padding=1)
        )
        self.eye = nn.Sequential(patches, nn.AdaptiveAvgPool2d(GRID), nn.Flatten(2))
        self.state = nn.Linear(self.state_dim, width)
        if shape.auxiliary_dim:
            # training regresses an auxiliary target with the actions
            self.auxiliary = nn.Linear(width, shape.auxiliary_dim)

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        cameras = dict.fromkeys(self.augmented_images, (3, None, None))
        wanted = {**cameras, OBS_STATE: (self.state_dim,), OBS_LANGUAGE_TOKENS: (None,)}
        return check_features(batch, wanted, [OBS_STATE], {OBS_LANGUAGE_TOKENS: self.rows})

    def embed_prefix(self, batch: dict[str, Tensor]) -> PrefixEmbeddings:
        ids = batch[OBS_LANGUAGE_TOKENS]
        images = [self.camera_tokens(camera, batch[camera]) for camera in self.augmented_images]
        embeds = self.join_prefix(ids, batch[OBS_STATE], images)
        real = batch.get(OBS_LANGUAGE_ATTENTION_MASK, ids != PAD_ID).bool()  # (B, L)
        real = F.pad(real, (0, embeds.shape[1] - ids.shape[1]), value=True)  # (B, P)
        return PrefixEmbeddings.in_order(embeds, real)

    # `ceed-vla export` needs the prefix in these two parts.

    def camera_tokens(self, camera: str, image: Tensor) -> Tensor:
        """Tokens (B, GRID ** 2, d) of a camera's images (B, 3, H, W)."""
        return cast("Tensor", self.eye(image).transpose(1, 2))

    def join_prefix(self, ids: Tensor, state: Tensor, cameras: Sequence[Tensor]) -> Tensor:
        """Embed words, cameras and the state, which is last: the prefix must not end in padding."""
        words = cast("nn.Embedding", self.pretrained.get_input_embeddings())(ids)  # (B, L, d)
        return torch.cat([words, *cameras, self.state(state).unsqueeze(1)], dim=1)


@BackboneConfig.register_subclass("hf_lm")
@dataclass
class LanguageModelConfig(BackboneConfig, Checked, prefix="backbone."):
    """A causal language model after a small image stem.

    Attributes:
        path: Local folder of a published model; empty for a small Llama with random weights.
        words: Rows of that Llama's word embedding.
        max_words: Longest instruction [words, or tokens of the folder's tokenizer].
        width: Hidden size of that Llama; it has `layers` and `heads`.
        architecture: The model's configuration (JSON); filled when a policy is new.
    """

    path: str = ""
    words: int = ranged(256, "[2, 1e6]")
    max_words: int = ranged(16, "[1, 4096]")
    width: int = ranged(128, "[8, 65536]")
    layers: int = ranged(2, "[1, 1024]")
    heads: int = ranged(4, "[1, 1024]")
    architecture: str = field(default="", repr=False)

    def build(self, shape: PolicyShape) -> TrainableBackbone:
        model: Any
        if self.architecture:  # from a checkpoint, which has the weights
            config = AutoConfig.for_model(**read_architecture(self.architecture))
            model = AutoModelForCausalLM.from_config(config)
        elif self.path:
            folder = published_folder(self.path, "backbone.path")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **LOCAL)
            rows = model.get_input_embeddings().num_embeddings + shape.vocabulary_size
            model.resize_token_embeddings(rows, mean_resizing=False)
        else:
            config = LlamaConfig(
                vocab_size=self.words + shape.vocabulary_size,
                hidden_size=self.width,
                intermediate_size=4 * self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
            )
            model = LlamaForCausalLM(config)
        self.architecture = model.config.to_json_string()
        return LanguageModelBackbone(model, shape)

    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        if self.path:
            return [PromptTokensStep(max_length=self.max_words).read_folder(self.path)]
        return [make_instruction_step(instructions, self.max_words, self.words)]

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        return least_sizes(read_architecture(self.architecture))


# ---- check ---------------------------------------------------------------------------------------


if __name__ == "__main__":
    config = CeedVLAConfig.read(resolve_checkpoint("student"))
    config.backbone = LanguageModelConfig()
    config.auxiliary_scale = []
    compared = check_untrained(CeedVLAPolicy(config).backbone, config, instruction_tokens=16)
    print(f"{compared} tokens by all routes: equal")
