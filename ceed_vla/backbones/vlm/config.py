"""Settings of transformers' image-text-to-text models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ceed_vla.backbones.base import TrainableBackbone
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.backbones.transformers.config import (
    DTYPES,
    TransformersConfig,
    least_sizes,
    read_architecture,
)
from ceed_vla.backbones.vlm.inputs import CAMERAS, VLMInputsStep
from ceed_vla.backbones.vlm.processor import load_processor
from ceed_vla.errors import ConfigError
from ceed_vla.fields import chosen, ranged
from ceed_vla.instructions import check_template


@BackboneConfig.register_subclass("vlm")
@dataclass
class VLMConfig(TransformersConfig):
    """A transformers image-text-to-text model: LLaVA, LLaVA-OneVision, Qwen2.5-VL, SmolVLM,
    PaliGemma and relatives.

    Attributes:
        prompt: Text around ``{instruction}``; it is put into the model's chat format, if any.
        cameras: One image per camera ("separate"), or one image with all cameras from top to
            bottom, which takes fewer tokens ("stacked").
        proprio: Input of the state: "text" (action tokens behind the prompt, as LLaVA-VLA), one
            "projected" token, or "none".
        action_ids: Vocabulary ids of the bins: the "last" ordinary ids of the tokenizer, the same
            in descending order ("last_reversed", as OpenVLA and LLaVA-VLA), or new ids behind the
            tokenizer's ("added").
        dtype: Data type of the weights.
        attention: Implementation of attention in transformers.
        action_token_ids: Vocabulary id of every bin; set when a policy is created.
    """

    steps: ClassVar[tuple[str, ...]] = ("ceed_vla_vlm_inputs",)

    prompt: str = "What action should the robot take to {instruction}?"
    cameras: str = chosen("separate", CAMERAS)
    proprio: str = chosen("text", ("text", "projected", "none"))
    action_ids: str = chosen("last", ("last", "last_reversed", "added"))
    dtype: str = chosen("float32", DTYPES)
    attention: str = chosen("sdpa", ("sdpa", "eager", "flash_attention_2"))
    action_token_ids: list[int] = ranged([], "[0, 1e8]")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.prompt, "backbone.prompt")

    def build(self, shape: PolicyShape) -> TrainableBackbone:
        from ceed_vla.backbones.vlm import loading
        from ceed_vla.backbones.vlm.model import VLMBackbone

        dtype = getattr(torch, self.dtype)
        new = not self.architecture
        bins = shape.vocabulary_size
        if new or self.weights == "reference":
            if not self.path:
                raise ConfigError(
                    "backbone.path is empty; set the local folder of an image-text-to-text model."
                )
            model = loading.load_model(self.path, dtype, self.attention)
            processor = load_processor(self.path)
            ids = loading.choose_action_ids(model, processor, self.action_ids, bins)
            self.action_token_ids = self.action_token_ids or ids
        else:
            model = loading.build_model(self.architecture, dtype, self.attention)
        if len(self.action_token_ids) != bins:
            raise ConfigError(
                f"backbone.action_token_ids has {len(self.action_token_ids)} ids; it must have one "
                f"for each of the {bins} bins. Copy the configuration again."
            )
        backbone = VLMBackbone(
            model,
            self.action_token_ids,
            shape.block_length,
            state_dim=0 if self.proprio == "none" else shape.state_dim,
            project_state=self.proprio == "projected",
            auxiliary_dim=shape.auxiliary_dim,
        )
        if self.weights == "reference":
            backbone.refer(new_rows=self.action_ids == "added")
        if new:
            loading.check_decoding(backbone)
            self.describe(loading.architecture(model))
        return backbone

    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        return [
            VLMInputsStep(**self.input_settings(shape)).set_processor(load_processor(self.path))
        ]

    def input_settings(self, shape: PolicyShape) -> dict[str, Any]:
        places = {"text": shape.state_dim, "projected": 1, "none": 0}[self.proprio]
        sizes = {camera: list(size[1:]) for camera, size in shape.cameras.items()}
        return {
            "sizes": sizes,
            "layout": self.cameras,
            "prompt": self.prompt,
            "state_places": places,
        }

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        return least_sizes(read_architecture(self.architecture))

    def validate_features(self, shape: PolicyShape) -> None:
        if self.proprio != "none" and not shape.state_dim:
            raise ConfigError(
                f"The data have no observation.state, and backbone.proprio is {self.proprio!r}; "
                "set --policy.backbone.proprio=none."
            )
        if self.cameras == "stacked" and len({size[2] for size in shape.cameras.values()}) > 1:
            raise ConfigError(
                f"backbone.cameras is 'stacked', but the cameras differ in width: "
                f"{dict(shape.cameras)}. Set --policy.backbone.cameras=separate."
            )
