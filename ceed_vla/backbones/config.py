"""Which model a policy runs: one dataclass a family, chosen by ``--policy.backbone.type``.

A family is a dataclass that registers itself (see `CompactConfig`) and says how to build its model and what
pre-processing turns an observation into the model's inputs. `ceed_vla.configuration_ceed_vla` imports all families.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import draccus

from ceed_vla.choices import Choice
from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, ranged

if TYPE_CHECKING:
    from ceed_vla.backbones.base import TrainableBackbone
    from ceed_vla.configuration_ceed_vla import CeedVLAConfig


DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("copied", "reference")  # into checkpoints, or by reference to the folder they were read from


class BackboneConfig(Choice, draccus.ChoiceRegistry, abc.ABC):
    """Base of all families of models.

    Attributes:
        steps: Registered names of the steps that `processor_steps` returns, without which no checkpoint is complete.
    """

    setting: ClassVar[str] = "backbone"
    usual: ClassVar[str] = "compact"
    steps: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def build(self, policy: CeedVLAConfig) -> TrainableBackbone:
        """The model, for a block of ``policy.block_length`` tokens of ``policy.vocabulary_size`` values.

        Raises:
            ConfigError: Settings that contradict the policy's.
            CheckpointError: Weights that cannot be read.
        """

    @abc.abstractmethod
    def processor_steps(self, policy: CeedVLAConfig, instructions: Sequence[str]) -> list[Any]:
        """LeRobot processor steps that make the model's inputs; `instructions` are those of the data set.

        Raises:
            ConfigError: Instructions that do not fit the model.
        """

    def finished(self) -> Self:
        """These settings for a model whose training is over: without heads that only training uses."""
        return self

    def least_sizes(self, policy: CeedVLAConfig) -> tuple[int, int]:
        """Layers that these settings describe, and the fewest numbers that their weights have.

        Compared with a checkpoint's weights before a model is built, so that no setting can ask for more than there is.
        """
        return 0, 0

    def weight_files(self) -> list[Path]:
        """The files of weights that a checkpoint leaves where they are; empty if it has its own."""
        return []

    def validate_features(self, policy: CeedVLAConfig) -> None:
        """Raise `ConfigError` if the policy's features cannot be served; cameras and action are checked before."""


@BackboneConfig.register_subclass("compact")
@dataclass
class CompactConfig(BackboneConfig):
    """A small model that is trained from scratch (`ceed_vla.backbones.compact`).

    Attributes:
        image_size: Side of the square images that the stems see [px]; other sizes are resized.
        image_grid: A camera gives ``image_grid ** 2`` prefix tokens.
        keypoints: Places that the stem of a camera finds (spatial softmax), as one more prefix token; 0 for none.
        stem_channels: Channels of the four convolutions of a camera stem.
        max_instruction_words: Longest instruction [words].
        vocabulary_size: Rows of the word embedding (padding and unknown included).
        known_words: Words of the instructions that were trained on; written with the vocabulary, 0 where nobody did.
        width: Model width ``d``.
        layers: Decoder layers.
        heads: Attention heads.
        mlp_width: Hidden width of the gated MLP.
        early_readout: Numbers of a prefix token that the grounding target is regressed from before the trunk too, in
            training; 0 for none.
    """

    steps: ClassVar[tuple[str, ...]] = ("ceed_vla_instruction_words",)

    image_size: int = ranged(96, "[8, 4096]")
    image_grid: int = ranged(4, "[1, 256]")
    keypoints: int = ranged(32, "[0, 4096]")
    stem_channels: list[int] = ranged([32, 64, 96, 128], "[4, 16384]")
    max_instruction_words: int = ranged(12, "[1, 4096]")
    vocabulary_size: int = ranged(256, "[2, 1e7]")
    known_words: int = ranged(0, "[0, 1e7]")
    width: int = ranged(192, "[1, 65536]")
    layers: int = ranged(4, "[1, 1024]")
    heads: int = ranged(6, "[1, 1024]")
    mlp_width: int = ranged(512, "[1, 1048576]")
    early_readout: int = ranged(32, "[0, 65536]")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}.")
        if len(self.stem_channels) != 4 or any(channels % 4 for channels in self.stem_channels):
            raise ConfigError(
                f"stem_channels is {self.stem_channels}; a stem has exactly 4 convolutions, of multiples of 4."
            )
        if self.image_size % (8 * self.image_grid):
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of 8 * image_grid = {8 * self.image_grid}; "
                "the stem halves the image three times and then cuts it into the grid."
            )

    def build(self, policy: CeedVLAConfig) -> TrainableBackbone:
        from ceed_vla.backbones.compact import CompactBackbone

        state = policy.robot_state_feature
        return CompactBackbone(
            cameras=policy.cameras,
            state_dim=int(state.shape[0]) if state else 0,
            block_length=policy.block_length,
            vocabulary_size=policy.vocabulary_size,
            words=self.vocabulary_size,
            max_words=self.max_instruction_words,
            image_size=self.image_size,
            image_grid=self.image_grid,
            keypoints=self.keypoints,
            stem_channels=self.stem_channels,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            mlp_width=self.mlp_width,
            auxiliary_dim=len(policy.auxiliary_scale),
            early_readout=self.early_readout,
        )

    def processor_steps(self, policy: CeedVLAConfig, instructions: Sequence[str]) -> list[Any]:
        from ceed_vla.processor_ceed_vla import make_instruction_step

        return [make_instruction_step(self, instructions)]

    def least_sizes(self, policy: CeedVLAConfig) -> tuple[int, int]:
        d, cell = self.width, self.image_size // (8 * self.image_grid)
        prefix = self.max_instruction_words + len(policy.cameras) * self.image_grid**2
        rows = self.vocabulary_size + prefix + 2 * policy.vocabulary_size + policy.block_length
        stem = self.stem_channels[3] * cell**2 * d + 9 * sum(a * b for a, b in pairwise(self.stem_channels))
        return self.layers, (
            self.layers * (4 * d * d + 3 * d * self.mlp_width) + rows * d + len(policy.cameras) * stem
        )

    def finished(self) -> Self:
        return replace(self, early_readout=0)

    def validate_features(self, policy: CeedVLAConfig) -> None:
        if policy.robot_state_feature is None:
            raise ConfigError(
                "The data have no observation.state; the compact backbone reads one state vector."
            )
