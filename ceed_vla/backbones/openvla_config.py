"""Settings of OpenVLA models (`ceed_vla.backbones.openvla`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ceed_vla.backbones.architecture import least_sizes, read_architecture
from ceed_vla.backbones.config import DTYPES, WEIGHTS, BackboneConfig
from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, chosen
from ceed_vla.templates import check_template
from ceed_vla.weights import Header, weight_files

if TYPE_CHECKING:
    from ceed_vla.backbones.base import TrainableBackbone
    from ceed_vla.backbones.openvla_folder import Architecture
    from ceed_vla.configuration_ceed_vla import CeedVLAConfig


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

    steps: ClassVar[tuple[str, ...]] = ("ceed_vla_openvla_inputs",)

    path: str = ""
    weights: str = chosen("copied", WEIGHTS)
    dtype: str = chosen("auto", ("auto", *DTYPES))
    quantization: str = chosen("none", ("none", "8bit", "4bit"))
    camera: str = ""
    prompt: str = ""
    architecture: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "backbone.")
        if self.prompt:
            check_template(self.prompt, "backbone.prompt")
        if self.quantization != "none" and self.weights != "reference":
            raise ConfigError(
                f"backbone.quantization is {self.quantization!r}: quantised weights cannot be copied; set "
                'backbone.weights to "reference".'
            )

    def build(self, policy: CeedVLAConfig) -> TrainableBackbone:
        from ceed_vla.backbones.openvla import OpenVLABackbone
        from ceed_vla.backbones.openvla_folder import describe_model
        from ceed_vla.backbones.openvla_weights import load_weights

        new = not self.architecture
        if new:
            self.architecture = json.dumps(describe_model(self.path))
        architecture = self._architecture()
        architecture.check_bins(policy.vocabulary_size)
        if new:
            files = weight_files(Path(self.path))
            Header.read(files).check(*self.least_sizes(policy), files[0])
        self.prompt = self.prompt or architecture.prompt
        if self.dtype == "auto":
            self.dtype = architecture.dtype
        model = OpenVLABackbone(architecture, policy.block_length, policy.vocabulary_size, self.dtype)
        if new or self.weights == "reference":
            names = load_weights(model, self.path)
            if self.weights == "reference":
                model.refer_to(names)
        if self.quantization != "none":
            from ceed_vla.backbones.openvla_quantization import quantize

            quantize(model.language_model.model, self.quantization, policy.device or "cpu")
        return model

    def least_sizes(self, policy: CeedVLAConfig) -> tuple[int, int]:
        text = self._architecture().text
        return least_sizes(text)

    def weight_files(self) -> list[Path]:
        return weight_files(Path(self.path)) if self.weights == "reference" else []

    def _architecture(self) -> Architecture:
        """What `architecture` says, checked as a published folder's is."""
        from ceed_vla.backbones.openvla_folder import Architecture, check_config

        return Architecture(check_config("backbone.architecture", read_architecture(self.architecture)))

    def processor_steps(self, policy: CeedVLAConfig, instructions: Sequence[str]) -> list[Any]:
        from ceed_vla.backbones.openvla_folder import Architecture, describe_model
        from ceed_vla.backbones.openvla_inputs import OpenVLAInputsStep

        camera = self.camera or policy.cameras[0]
        prompt = self.prompt or Architecture(describe_model(self.path)).prompt
        return [OpenVLAInputsStep(camera=camera, prompt=prompt).read_folder(self.path)]

    def validate_features(self, policy: CeedVLAConfig) -> None:
        known = ", ".join(policy.cameras)
        if self.camera and self.camera not in policy.cameras:
            raise ConfigError(f"backbone.camera is {self.camera!r}; the policy has {known}.")
        if not self.camera and len(policy.cameras) > 1:
            raise ConfigError(f"OpenVLA looks through one camera; set backbone.camera to one of {known}.")
