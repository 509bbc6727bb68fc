"""Settings of transformers' image-text-to-text models (`ceed_vla.backbones.vlm`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ceed_vla.backbones.architecture import least_sizes, read_architecture
from ceed_vla.backbones.config import DTYPES, WEIGHTS, BackboneConfig
from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, chosen, ranged
from ceed_vla.templates import check_template

if TYPE_CHECKING:
    from ceed_vla.backbones.base import TrainableBackbone
    from ceed_vla.configuration_ceed_vla import CeedVLAConfig

CAMERAS = ("separate", "stacked")


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

    steps: ClassVar[tuple[str, ...]] = ("ceed_vla_vlm_inputs",)

    path: str = ""
    weights: str = chosen("copied", WEIGHTS)
    prompt: str = "What action should the robot take to {instruction}?"
    cameras: str = chosen("separate", CAMERAS)
    proprio: str = chosen("text", ("text", "projected", "none"))
    action_ids: str = chosen("last", ("last", "last_reversed", "added"))
    dtype: str = chosen("float32", DTYPES)
    attention: str = chosen("sdpa", ("sdpa", "eager", "flash_attention_2"))
    architecture: str = ""
    action_token_ids: list[int] = ranged([], "[0, 1e8]")

    def __post_init__(self) -> None:
        check_fields(self, "backbone.")
        check_template(self.prompt, "backbone.prompt")

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
            ids = loading.choose_action_ids(model, processor, self.action_ids, policy.vocabulary_size)
            self.action_token_ids = self.action_token_ids or ids
        else:
            model = loading.build_model(self.architecture, dtype, self.attention)
        ids, rows = self.action_token_ids, int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        if len(set(ids)) != policy.vocabulary_size or len(ids) != policy.vocabulary_size or max(ids) >= rows:
            raise ConfigError(
                f"backbone.action_token_ids has {len(set(ids))} different ids up to {max(ids, default=-1)} for "
                f"{policy.vocabulary_size} bins of a model of {rows} ids; the configuration was edited by hand."
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

        return [VLMInputsStep(**self.input_settings(policy)).set_processor(load_processor(self.path))]

    def input_settings(self, policy: CeedVLAConfig) -> dict[str, Any]:
        """Settings of the step that makes the model's inputs."""
        places = {"text": _state_dim(policy), "projected": 1, "none": 0}[self.proprio]
        sizes = {camera: list(policy.image_features[camera].shape[1:]) for camera in policy.cameras}
        return {"sizes": sizes, "layout": self.cameras, "prompt": self.prompt, "state_places": places}

    def least_sizes(self, policy: CeedVLAConfig) -> tuple[int, int]:
        return least_sizes(read_architecture(self.architecture))

    def weight_files(self) -> list[Path]:
        from ceed_vla.weights import weight_files

        return weight_files(Path(self.path)) if self.weights == "reference" else []

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
