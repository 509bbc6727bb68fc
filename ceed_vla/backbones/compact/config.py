"""Settings of the compact model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ceed_vla.backbones.base import TrainableBackbone
from ceed_vla.backbones.compact.model import CompactBackbone
from ceed_vla.backbones.compact.stem import check_stem, stem_numbers
from ceed_vla.backbones.compact.words import make_instruction_step
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, ranged


@BackboneConfig.register_subclass("compact")
@dataclass
class CompactConfig(BackboneConfig):
    """Settings of a small model that is trained from scratch (`ceed_vla.backbones.compact.model`).

    Attributes:
        image_size: Side of the square images that the camera stems read [px]; other sizes are
            resized.
        image_grid: Side of the grid of patches of a camera, which makes ``image_grid ** 2`` prefix
            tokens.
        keypoints: Keypoints of a camera stem (spatial softmax), which make one more prefix token; 0
            for none.
        stem_channels: Channels of the four convolutions of a camera stem.
        max_instruction_words: Maximum length of an instruction [words].
        words: Rows of the word embedding, including padding and the unknown word.
        known_words: Number of words in the training instructions; set with the vocabulary, 0 if
            unknown.
        width: Model width ``d``.
        layers: Decoder layers.
        heads: Attention heads.
        mlp_width: Hidden width of the gated MLP.
        kept_tokens: Ascending indices of the prefix tokens that run in addition to the state, as
            `ceed-vla distill --kept` sets them; empty for all. The order is words, then each
            camera's patches and keypoints.
        early_readout: Width to which training reduces each prefix token for an additional
            grounding regression from the prefix; 0 for none.
    """

    steps: ClassVar[tuple[str, ...]] = ("ceed_vla_instruction_words",)

    image_size: int = ranged(96, "[8, 4096]")
    image_grid: int = ranged(4, "[1, 256]")
    keypoints: int = ranged(32, "[0, 4096]")
    stem_channels: list[int] = ranged([32, 64, 96, 128], "[4, 16384]")
    max_instruction_words: int = ranged(12, "[1, 4096]")
    words: int = ranged(256, "[2, 1e7]")
    known_words: int = ranged(0, "[0, 1e7]")
    width: int = ranged(192, "[1, 65536]")
    layers: int = ranged(4, "[1, 1024]")
    heads: int = ranged(6, "[1, 1024]")
    mlp_width: int = ranged(512, "[1, 1048576]")
    kept_tokens: list[int] = ranged([], "[0, 1e6]")
    early_readout: int = ranged(32, "[0, 65536]")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}.")
        check_stem(self)

    def build(self, shape: PolicyShape) -> TrainableBackbone:
        return CompactBackbone(shape, self)

    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        step = make_instruction_step(instructions, self.max_instruction_words, self.words)
        self.known_words = len(step.vocabulary)
        return [step]

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        d = self.width
        prefix = self.max_instruction_words + len(shape.cameras) * self.image_grid**2
        rows = self.words + prefix + 2 * shape.vocabulary_size + shape.block_length
        return self.layers, (
            self.layers * (4 * d * d + 3 * d * self.mlp_width)
            + rows * d
            + len(shape.cameras) * stem_numbers(self)
        )

    def finished(self) -> Self:
        return replace(self, early_readout=0)

    def validate_features(self, shape: PolicyShape) -> None:
        if not shape.state_dim:
            raise ConfigError(
                "The data have no observation.state; the compact backbone needs a state vector."
            )
