"""Settings of OpenVLA models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ceed_vla.backbones.base import TrainableBackbone
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.backbones.openvla.folder import check_config, describe_model, usual_prompt
from ceed_vla.backbones.openvla.inputs import OpenVLAInputsStep
from ceed_vla.backbones.transformers.config import (
    DTYPES,
    TransformersConfig,
    least_sizes,
    read_architecture,
)
from ceed_vla.errors import ConfigError
from ceed_vla.fields import chosen
from ceed_vla.instructions import check_template


@BackboneConfig.register_subclass("openvla")
@dataclass
class OpenVLAConfig(TransformersConfig):
    """An OpenVLA model: one or two vision towers, a projector and a Llama that writes one of 256
    ids per action dimension.

    Attributes:
        dtype: Data type of the weights; "auto" is the folder's.
        quantization: Quantisation of the language model with bitsandbytes, "8bit" or "4bit", on a
            GPU; needs weights by reference.
        camera: Feature of the camera that the model reads; may be empty if the policy has only one.
        prompt: Text around ``{instruction}``, which is lower-cased; empty for the prompt of the
            model's training.
    """

    steps: ClassVar[tuple[str, ...]] = ("ceed_vla_openvla_inputs",)

    dtype: str = chosen("auto", ("auto", *DTYPES))
    quantization: str = chosen("none", ("none", "8bit", "4bit"))
    camera: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt:
            check_template(self.prompt, "backbone.prompt")
        if self.quantization != "none" and self.weights != "reference":
            raise ConfigError(
                f"backbone.quantization is {self.quantization!r}, but quantised weights cannot be "
                'copied; set backbone.weights to "reference".'
            )

    def build(self, shape: PolicyShape) -> TrainableBackbone:
        from ceed_vla.backbones.openvla.model import OpenVLABackbone, quantize

        new = not self.architecture
        if new:
            self.describe(json.dumps(describe_model(self.path)))
        architecture = self._architecture()
        bins = architecture["n_action_bins"]
        if shape.vocabulary_size != bins:
            raise ConfigError(
                f"The action tokens have {shape.vocabulary_size} values, but the model has {bins} "
                f"action ids; set --policy.action_tokens.type=openvla with n_action_bins={bins}."
            )
        if new:
            self.check_size(shape)
        self.prompt = self.prompt or usual_prompt(architecture)
        if self.dtype == "auto":
            self.dtype = architecture["torch_dtype"]
        model = OpenVLABackbone(architecture, shape.block_length, shape.vocabulary_size, self.dtype)
        model.fill(Path(self.path), new=new, reference=self.weights == "reference")
        if self.quantization != "none":
            quantize(model.decoder, self.quantization, shape.device)
        return model

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        return least_sizes(self._architecture()["text_config"])

    def _architecture(self) -> dict[str, Any]:
        return check_config("backbone.architecture", read_architecture(self.architecture))

    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        prompt = self.prompt or usual_prompt(describe_model(self.path))
        camera = self.camera or next(iter(shape.cameras))
        return [OpenVLAInputsStep(camera=camera, prompt=prompt).read_folder(self.path)]

    def validate_features(self, shape: PolicyShape) -> None:
        known = ", ".join(shape.cameras)
        if self.camera and self.camera not in shape.cameras:
            raise ConfigError(f"backbone.camera is {self.camera!r}; choose one of {known}.")
        if not self.camera and len(shape.cameras) > 1:
            raise ConfigError(
                f"OpenVLA reads one camera, the policy has {len(shape.cameras)}; set "
                f"backbone.camera to one of {known}."
            )
