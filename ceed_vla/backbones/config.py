"""Which model a policy runs: one dataclass a family, chosen by ``--policy.backbone.type``.

A family is a dataclass that registers itself and says how to build its model, and what
pre-processing turns an observation into the model's inputs. `ceed_vla.configuration_ceed_vla`
imports those of this package.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import draccus
from lerobot.processor import ObservationProcessorStep

from ceed_vla.backbones.base import TrainableBackbone
from ceed_vla.choices import Choice

if TYPE_CHECKING:
    from ceed_vla.tokens.base import ActionTokensConfig


@dataclass(frozen=True)
class PolicyShape:
    """Inputs and outputs of a policy."""

    # feature -> (3, height, width) [px], in the order of the prefix
    cameras: Mapping[str, tuple[int, int, int]]
    state_dim: int  # length of ``observation.state``; 0 without one
    action_dim: int  # action dimensions ``A``
    chunk_size: int  # steps ``m`` of a chunk
    action_tokens: ActionTokensConfig  # how actions become tokens
    auxiliary_dim: int = 0  # outputs of the grounding regression; 0 for none
    device: str = "cpu"  # where the policy is going to run

    # Computed when they are asked for: tokens that are fitted on the data have neither before.

    @property
    def block_length(self) -> int:
        """Tokens ``n`` of a block."""
        return self.action_tokens.block_length(self.chunk_size, self.action_dim)

    @property
    def vocabulary_size(self) -> int:
        """Values ``V`` of a token."""
        return self.action_tokens.vocabulary_size


class InputsStep(ObservationProcessorStep):
    """Base of the steps that make a model's inputs: dataclasses, whose fields are their settings in
    a checkpoint.
    """

    def get_config(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(cast("Any", self))}

    def transform_features(self, features: Any) -> Any:
        return features  # LeRobot asks the pipelines of robots only


class BackboneConfig(Choice, draccus.ChoiceRegistry, abc.ABC):
    """Base of all families of models."""

    setting: ClassVar[str] = "backbone"
    usual: ClassVar[str] = "compact"
    # Registered names of the steps that `processor_steps` returns, without which no checkpoint is
    # complete.
    steps: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def build(self, shape: PolicyShape) -> TrainableBackbone:
        """The model; `ConfigError` if settings contradict the policy's, `CheckpointError` if
        weights cannot be read.
        """

    @abc.abstractmethod
    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        """LeRobot processor steps that make the model's inputs; `instructions` are those of the
        data set.
        """

    def finished(self) -> Self:
        """These settings for a model whose training is over: without heads that only training
        uses.
        """
        return self

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        """Layers that these settings describe, and the fewest numbers that their weights have.

        Compared with a checkpoint's weights before a model is built, so that no setting can ask for
        more than there is.
        """
        return 0, 0

    def weight_files(self) -> list[Path]:
        """The files of weights that a checkpoint leaves where they are; empty if it has its own."""
        return []

    def validate_features(self, shape: PolicyShape) -> None:
        """Raise `ConfigError` if the policy's features cannot be served; cameras and action are
        checked before.
        """
