"""Settings of transformers' image-text-to-text models (`ceed_vla.backbones.vlm`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ceed_vla.backbones.config import BackboneConfig
from ceed_vla.errors import ConfigError

if TYPE_CHECKING:
    from ceed_vla.backbones.base import TrainableBackbone
    from ceed_vla.configuration_ceed_vla import CeedVLAConfig

CHOICES = {
    "cameras": ("separate", "stacked"),
    "proprio": ("text", "projected", "none"),
    "action_ids": ("last", "last_reversed", "added"),
    "weights": ("copied", "reference"),
    "dtype": ("float32", "bfloat16", "float16"),
    "attention": ("sdpa", "eager", "flash_attention_2"),
}


@BackboneConfig.register_subclass("vlm")
@dataclass
class VLMConfig(BackboneConfig):
    """A transformers image-text-to-text model: LLaVA, LLaVA-OneVision, Qwen2.5-VL, SmolVLM, PaliGemma and relatives.

    Attributes:
        path: Local folder of the base model (config.json, *.safetensors, tokenizer, image processor).
        weights: Checkpoints hold all weights ("copied"; `path` is read once, when a policy is new), or leave those
            that were not trained in `path` ("reference").
        prompt: Text around ``{instruction}``, put into the model's chat format where it has one.
        cameras: "separate" images, or all cameras "stacked" from top to bottom into one (fewer tokens).
        proprio: The state as "text", one action token a value at the end of the prompt (LLaVA-VLA), "projected" to
            one token there, or "none".
        action_ids: Bins are the "last" ordinary ids of the tokenizer, the same downwards ("last_reversed", as OpenVLA
            and LLaVA-VLA), or "added" behind the tokenizer's.
        dtype: Type of the weights.
        attention: Implementation of attention in transformers.
        architecture: The base model's configuration (JSON); filled when a policy is new.
        action_token_ids: Vocabulary id of every bin; filled when a policy is new.
    """

    path: str = ""
    weights: str = "copied"
    prompt: str = "What action should the robot take to {instruction}?"
    cameras: str = "separate"
    proprio: str = "text"
    action_ids: str = "last"
    dtype: str = "float32"
    attention: str = "sdpa"
    architecture: str = ""
    action_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"backbone.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}."
                )
        if self.prompt.count("{") != 1 or "{instruction}" not in self.prompt:
            raise ConfigError(
                f"backbone.prompt is {self.prompt!r}; it must hold {{instruction}}, and no other field."
            )

    def build(self, policy: CeedVLAConfig) -> TrainableBackbone:
        import torch

        from ceed_vla.backbones import vlm_loading as loading
        from ceed_vla.backbones.vlm import VLMBackbone

        dtype, new = getattr(torch, self.dtype), not self.architecture
        if new or self.weights == "reference":
            if not self.path:
                raise ConfigError(
                    "backbone.path is empty; give the local folder of an image-text-to-text model."
                )
            model = loading.load_model(self.path, dtype, self.attention)
            processor = loading.load_processor(self.path)
            ids = loading.choose_action_ids(model, processor, self.action_ids, policy.num_bins)
            self.action_token_ids = self.action_token_ids or ids
        else:
            model = loading.build_model(self.architecture, dtype, self.attention)
        if len(self.action_token_ids) != policy.num_bins:
            raise ConfigError(
                f"backbone.action_token_ids has {len(self.action_token_ids)} ids for {policy.num_bins} bins; "
                "the configuration was edited by hand."
            )
        backbone = VLMBackbone(
            model,
            self.action_token_ids,
            policy.block_length,
            state_dim=0 if self.proprio == "none" else _state_dim(policy),
            project_state=self.proprio == "projected",
            auxiliary_dim=len(policy.auxiliary_scale),
            elsewhere=self.weights == "reference",
        )
        if new:
            loading.check_decoding(backbone)
            self.architecture = loading.architecture(model)
        return backbone

    def processor_steps(self, policy: CeedVLAConfig, instructions: Sequence[str]) -> list[Any]:
        from ceed_vla.backbones.vlm_inputs import VLMInputsStep
        from ceed_vla.backbones.vlm_loading import load_processor

        places = {"text": _state_dim(policy), "projected": 1, "none": 0}[self.proprio]
        sizes = {camera: list(policy.image_features[camera].shape[1:]) for camera in policy.cameras}
        step = VLMInputsStep(sizes=sizes, layout=self.cameras, prompt=self.prompt, state_places=places)
        return [step.set_processor(load_processor(self.path))]

    def validate_features(self, policy: CeedVLAConfig) -> None:
        if self.proprio != "none" and policy.robot_state_feature is None:
            raise ConfigError(
                f"The data have no observation.state, and backbone.proprio is {self.proprio!r}; "
                "set --policy.backbone.proprio=none."
            )
        shapes = {camera: tuple(policy.image_features[camera].shape) for camera in policy.cameras}
        if self.cameras == "stacked" and len({shape[2] for shape in shapes.values()}) > 1:
            raise ConfigError(f"Cameras of different widths cannot be stacked: {shapes}.")


def _state_dim(policy: CeedVLAConfig) -> int:
    state = policy.robot_state_feature
    return int(state.shape[0]) if state else 0
