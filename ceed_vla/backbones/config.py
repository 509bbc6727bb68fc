"""Which model a policy runs: one dataclass a family, chosen by ``--policy.backbone.type``.

A family is a dataclass that registers itself and says how to build its model, and what pre-processing turns an
observation into the model's inputs. `ceed_vla.backbones.families` imports those of this package.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import draccus

from ceed_vla.backbones.base import TrainableBackbone
from ceed_vla.backbones.shape import PolicyShape
from ceed_vla.choices import Choice


class BackboneConfig(Choice, draccus.ChoiceRegistry, abc.ABC):
    """Base of all families of models.

    Attributes:
        steps: Registered names of the steps that `processor_steps` returns, without which no checkpoint is complete.
    """

    setting: ClassVar[str] = "backbone"
    usual: ClassVar[str] = "compact"
    steps: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def build(self, shape: PolicyShape) -> TrainableBackbone:
        """The model; `ConfigError` if settings contradict the policy's, `CheckpointError` if weights cannot be read."""

    @abc.abstractmethod
    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        """LeRobot processor steps that make the model's inputs; `instructions` are those of the data set."""

    def finished(self) -> Self:
        """These settings for a model whose training is over: without heads that only training uses."""
        return self

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        """Layers that these settings describe, and the fewest numbers that their weights have.

        Compared with a checkpoint's weights before a model is built, so that no setting can ask for more than there is.
        """
        return 0, 0

    def weight_files(self) -> list[Path]:
        """The files of weights that a checkpoint leaves where they are; empty if it has its own."""
        return []

    def validate_features(self, shape: PolicyShape) -> None:
        """Raise `ConfigError` if the policy's features cannot be served; cameras and action are checked before."""
