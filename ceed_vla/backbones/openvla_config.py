"""Settings of OpenVLA models (`ceed_vla.backbones.openvla`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ceed_vla.backbones.config import BackboneConfig
from ceed_vla.errors import ConfigError

if TYPE_CHECKING:
    from ceed_vla.backbones.base import TrainableBackbone
    from ceed_vla.configuration_ceed_vla import CeedVLAConfig

CHOICES = {
    "weights": ("copied", "reference"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": ("none", "8bit", "4bit"),
}


@BackboneConfig.register_subclass("openvla")
@dataclass
class OpenVLAConfig(BackboneConfig):
    """An OpenVLA model: one or two vision towers, a projector and a Llama that writes one of 256 ids a number.

    Attributes:
        path: Local folder of the model as it was published (config.json, *.safetensors, preprocessor, tokenizer).
        weights: "copied" into checkpoints, which then need nothing else, or by "reference": checkpoints hold only
            what was trained, and read the rest from `path`.
        dtype: Type of the weights; "auto" takes the folder's.
        quantization: "8bit" or "4bit" language model through bitsandbytes, on a GPU; needs weights by reference.
        camera: Feature of the camera it looks through; not needed where the policy has one camera.
        prompt: Text around ``{instruction}``, which is lower-cased; the one of the model's language model if empty.
        architecture: The folder's configuration (JSON); filled when a policy is new.
    """

    path: str = ""
    weights: str = "copied"
    dtype: str = "auto"
    quantization: str = "none"
    camera: str = ""
    prompt: str = ""
    architecture: str = ""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"backbone.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}."
                )
        if self.prompt and (self.prompt.count("{") != 1 or "{instruction}" not in self.prompt):
            raise ConfigError(
                f"backbone.prompt is {self.prompt!r}; it must hold {{instruction}}, and no other field."
            )
        if self.quantization != "none" and self.weights != "reference":
            raise ConfigError(
                f"backbone.quantization is {self.quantization!r}: quantised weights cannot be copied; set "
                'backbone.weights to "reference".'
            )

    def build(self, policy: CeedVLAConfig) -> TrainableBackbone:
        from ceed_vla.backbones.openvla import OpenVLABackbone
        from ceed_vla.backbones.openvla_folder import Architecture, read_architecture
        from ceed_vla.backbones.openvla_weights import load_weights

        new = not self.architecture
        if new:
            self.architecture = json.dumps(read_architecture(self.path))
        architecture = Architecture(json.loads(self.architecture))
        architecture.check_bins(policy.num_bins)
        self.prompt = self.prompt or architecture.prompt
        if self.dtype == "auto":
            self.dtype = architecture.dtype
        model = OpenVLABackbone(architecture, policy.block_length, policy.num_bins, self.dtype)
        if new or self.weights == "reference":
            names = load_weights(model, self.path)
            if self.weights == "reference":
                model.refer_to(names)
        if self.quantization != "none":
            from ceed_vla.backbones.openvla_quantization import quantize

            quantize(model.language_model.model, self.quantization, policy.device or "cpu")
        return model

    def processor_steps(self, policy: CeedVLAConfig, instructions: Sequence[str]) -> list[Any]:
        from ceed_vla.backbones.openvla_folder import Architecture, read_architecture
        from ceed_vla.backbones.openvla_inputs import OpenVLAInputsStep

        camera = self.camera or policy.cameras[0]
        prompt = self.prompt or Architecture(read_architecture(self.path)).prompt
        return [OpenVLAInputsStep(camera=camera, prompt=prompt).read_folder(self.path)]

    def validate_features(self, policy: CeedVLAConfig) -> None:
        known = ", ".join(policy.cameras)
        if self.camera and self.camera not in policy.cameras:
            raise ConfigError(f"backbone.camera is {self.camera!r}; the policy has {known}.")
        if not self.camera and len(policy.cameras) > 1:
            raise ConfigError(f"OpenVLA looks through one camera; set backbone.camera to one of {known}.")
