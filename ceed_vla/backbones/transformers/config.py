"""Settings that all families of published models share, and their architecture as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.fields import Checked, chosen
from ceed_vla.weights import check_sizes, sample_hash, weight_files

DTYPES = ("float32", "bfloat16", "float16")
# Copied into checkpoints, or referenced in the folder that they were read from.
WEIGHTS = (
    "copied",
    "reference",
)
# Names in the configurations of transformers; a model has one of `_LAYERS` and one of `_WIDTH`.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "depth")
_WIDTH = ("hidden_size", "n_embd", "d_model", "embed_dim")
_OTHERS = (
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "head_dim",
    "image_size",
    "patch_size",
)
_PARTS = ("text_config", "vision_config")


@dataclass
class TransformersConfig(BackboneConfig, Checked, prefix="backbone."):
    """Base of the settings of published models.

    Attributes:
        path: Local folder of the published model (config.json, *.safetensors, tokenizer, image
            processor).
        weights: "copied" (checkpoints contain all weights) or "reference" (checkpoints contain only
            trained weights, and read the others from `path`).
        architecture: The folder's configuration (JSON); set when a policy is created.
        weights_sample: Hash of a sample of weights by reference; set when a policy is created. A
            folder with other weights is then an error; empty: any weights of this size are read.
    """

    path: str = ""
    weights: str = chosen("copied", WEIGHTS)
    architecture: str = ""
    weights_sample: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path and self.weights == "reference":  # for every working directory
            self.path = str(Path(self.path).absolute())

    def describe(self, architecture: str) -> None:
        """Store the description of a new policy's model."""
        self.architecture = architecture
        if self.weights == "reference":
            self.weights_sample = sample_hash(weight_files(Path(self.path)))

    def weight_files(self) -> list[Path]:
        if self.weights != "reference":
            return []
        files = weight_files(Path(self.path))
        if self.weights_sample and self.weights_sample != sample_hash(files):
            raise CheckpointError(
                f"{self.path} has other weights than those that this checkpoint was trained with. "
                "Put the original model there; or, if you mean this one, set "
                'backbone.weights_sample to "" in config.json and run `ceed-vla seal`.'
            )
        return files

    def check_size(self, shape: PolicyShape) -> None:
        """Raise `CheckpointError` if `architecture` is larger than the folder's weights.

        This runs before the model is built, so that wrong settings cannot exhaust the memory.
        """
        check_sizes(weight_files(Path(self.path)), *self.least_sizes(shape))


def published_folder(path: str | Path, what: str) -> Path:
    """Validate the folder of a published model.

    Args:
        path: The folder.
        what: Name of `path` in the error message.

    Raises:
        CheckpointError: There is no such folder.
    """
    if not str(path) or not Path(path).is_dir():
        raise CheckpointError(
            f"{what} is {str(path)!r}; it must be the local folder of a model, with config.json "
            "and *.safetensors. Download a model of a hub first."
        )
    return Path(path)


def read_architecture(text: str) -> dict[str, Any]:
    """Parse ``backbone.architecture``.

    Raises:
        CheckpointError: It is not a JSON object, or refers to its own code (auto_map).
    """
    with raised_as(
        CheckpointError,
        "backbone.architecture does not describe a model",
        "copy config.json again.",
    ):
        values: dict[str, Any] = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError(f"it is a {type(values).__name__}")
        remote = _names_code(values)
    if remote:
        raise CheckpointError(
            "backbone.architecture refers to its own code (auto_map), which is never run. Use a "
            "model that needs none."
        )
    return values


def least_sizes(values: Mapping[str, Any]) -> tuple[int, int]:
    """Layers of a model of transformers, and a lower bound on its number of weights, over all
    parts.

    Raises:
        CheckpointError: A size is not a positive whole number.
    """
    parts = [part for part in map(values.get, _PARTS) if isinstance(part, dict)]
    if parts:
        found = [least_sizes(part) for part in parts]
        return sum(layers for layers, _ in found), sum(numbers for _, numbers in found)
    sizes = {}
    for name in (*_LAYERS, *_WIDTH, *_OTHERS):
        value = values.get(name)
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise CheckpointError(
                f"{name} of the model's configuration is {str(value)[:200]!r}; it must be a "
                "positive whole number."
            )
        sizes[name] = value or 0
    layers, width = (max(sizes[name] for name in names) for names in (_LAYERS, _WIDTH))
    inside = max(sizes["intermediate_size"], sizes["num_attention_heads"] * sizes["head_dim"])
    places = (sizes["image_size"] // sizes["patch_size"]) ** 2 if sizes["patch_size"] else 0
    return layers, width * (layers * inside + max(sizes["vocab_size"], places))


def _names_code(value: Any) -> bool:
    if isinstance(value, dict):
        return "auto_map" in value or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))
