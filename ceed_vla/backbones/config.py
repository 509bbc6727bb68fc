"""Model families: one settings dataclass each, chosen by ``--policy.backbone.type``.

The dataclass registers itself, builds the model, and lists the preprocessor steps that turn an
observation into the model's inputs. `ceed_vla.configuration_ceed_vla` imports the families of this
package.
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
    device: str = "cpu"  # device that the policy will run on

    # Computed on access: tokens that are fitted to the data have neither value before.

    @property
    def block_length(self) -> int:
        """Tokens ``n`` of a block."""
        return self.action_tokens.block_length(self.chunk_size, self.action_dim)

    @property
    def vocabulary_size(self) -> int:
        """Values ``V`` of a token."""
        return self.action_tokens.vocabulary_size


class InputsStep(ObservationProcessorStep):
    """Base of the processor steps that make a model's inputs.

    A subclass is a dataclass; a checkpoint stores its fields.
    """

    def get_config(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(cast("Any", self))}

    def transform_features(self, features: Any) -> Any:
        return features  # LeRobot calls this for the pipelines of robots only


class BackboneConfig(Choice, draccus.ChoiceRegistry, abc.ABC):
    """Base of the settings of all model families."""

    setting: ClassVar[str] = "backbone"
    usual: ClassVar[str] = "compact"
    # Registered names of the steps that `processor_steps` returns; every checkpoint must have them.
    steps: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def build(self, shape: PolicyShape) -> TrainableBackbone:
        """Build the model.

        Raises:
            ConfigError: The settings contradict the policy's.
            CheckpointError: The weights cannot be read.
        """

    @abc.abstractmethod
    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        """Make the LeRobot processor steps for the model's inputs.

        Args:
            shape: Inputs and outputs of the policy.
            instructions: The instructions of the dataset.
        """

    def finished(self) -> Self:
        """These settings without the heads that only training uses."""
        return self

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        """The number of layers, and a lower bound on the number of weights.

        They are compared with a checkpoint's weights before the model is built, so that wrong
        settings cannot allocate more memory than the weights need.
        """
        return 0, 0

    def weight_files(self) -> list[Path]:
        """The weight files that a checkpoint reads from another folder; empty if it has its own."""
        return []

    def validate_features(self, shape: PolicyShape) -> None:
        """Raise `ConfigError` if the model does not support the policy's features.

        Cameras and action are validated before.
        """
