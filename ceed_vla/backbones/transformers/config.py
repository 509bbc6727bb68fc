"""Settings that the families of published models share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ceed_vla.backbones.config import BackboneConfig
from ceed_vla.backbones.shape import PolicyShape
from ceed_vla.fields import check_fields, chosen
from ceed_vla.weights import check_sizes, weight_files

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("copied", "reference")  # into checkpoints, or by reference to the folder they were read from


@dataclass
class TransformersConfig(BackboneConfig):
    """Base of families whose weights somebody else published.

    Attributes:
        path: Local folder of the model as it was published (config.json, *.safetensors, tokenizer, image processor).
        weights: "copied" into checkpoints, which then need nothing else, or by "reference": checkpoints hold only
            what was trained, and read the rest from `path`.
        architecture: The folder's configuration (JSON); filled when a policy is new.
    """

    path: str = ""
    weights: str = chosen("copied", WEIGHTS)
    architecture: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "backbone.")

    def weight_files(self) -> list[Path]:
        return weight_files(Path(self.path)) if self.weights == "reference" else []

    def check_size(self, shape: PolicyShape) -> None:
        """Refuse an `architecture` that describes more than the folder's weights, before a model is built of it."""
        check_sizes(weight_files(Path(self.path)), *self.least_sizes(shape))
