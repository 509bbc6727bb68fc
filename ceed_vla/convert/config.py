"""Settings of `ceed-vla convert`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ceed_vla.backbones.transformers.config import DTYPES, WEIGHTS
from ceed_vla.devices import check_device_name
from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, chosen, ranged
from ceed_vla.files import plain_name

# Kind -> the settings that apply to this kind only.
OWN = {
    "openvla": "dtype quantization unnorm_key chunk_size n_action_steps prompt camera camera_size",
    "pi0_fast": "fast_tokenizer text_tokenizer vocabulary",
}


@dataclass
class ConvertConfig:
    """Make a checkpoint for all other commands from a published model.

    Attributes:
        path: Folder of the published model.
        from_: Kind of the published model.
        output_dir: Folder of the checkpoint.
        weights: "copied" into the checkpoint, or "reference": the checkpoint reads them from
            `path`.
        dtype: openvla: Type of the weights: "auto" (as published), "float32", "bfloat16" or
            "float16".
        quantization: openvla: "8bit" or "4bit" language model on a GPU (bitsandbytes), with weights
            by reference.
        unnorm_key: openvla: Dataset whose statistics un-normalise the actions; required if the
            model has several.
        chunk_size: openvla: Steps of one action chunk that the model was trained to write.
        n_action_steps: openvla: Steps executed before the next replan; all of them if 0.
        prompt: openvla: Text around ``{instruction}``; the default of the folder's language model
            if empty.
        camera: openvla: Name of the camera: the policy reads ``observation.images.<camera>``.
        camera_size: openvla: HEIGHTxWIDTH of the camera's images, such as 480x640, which the
            model's own transform scales as in training; the model's input size if empty.
        fast_tokenizer: pi0_fast: Folder of the FAST tokenizer; the one that the checkpoint names if
            empty.
        text_tokenizer: pi0_fast: Folder of PaliGemma's tokenizer; the one that the checkpoint names
            if empty.
        vocabulary: pi0_fast: "full" (the same tokens as the published model, for any weights) or
            "actions" (only tokens that can occur in an action).
        device: Default device of the checkpoint.
    """

    path: str
    output_dir: str = ""
    from_: str = chosen("openvla", tuple(OWN))
    weights: str = chosen("copied", WEIGHTS)
    dtype: str = chosen("auto", ("auto", *DTYPES))
    quantization: str = chosen("none", ("none", "8bit", "4bit"))
    unnorm_key: str = ""
    chunk_size: int = ranged(1, "[1, 4096]")
    n_action_steps: int = ranged(0, "[0, 4096]")
    prompt: str = ""
    camera: str = "front"
    camera_size: str = ""
    fast_tokenizer: str = ""
    text_tokenizer: str = ""
    vocabulary: str = chosen("full", ("full", "actions"))
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.quantization != "none" and self.weights != "reference":
            raise ConfigError(
                f"--quantization is {self.quantization}, but quantised weights cannot be copied; "
                "set --weights reference."
            )
        check_device_name(self.device)
        plain_name(self.camera, "camera", ConfigError)
        others = [
            name for kind, names in OWN.items() if kind != self.from_ for name in names.split()
        ]
        defaults = {item.name: item.default for item in fields(self)}
        ignored = [f"--{name}" for name in others if getattr(self, name) != defaults[name]]
        if ignored:
            raise ConfigError(
                f"{', '.join(ignored)} has no effect with --from {self.from_}; leave it out."
            )
