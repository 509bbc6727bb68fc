"""Settings of a causal language model behind camera stems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ceed_vla.backbones.base import TrainableBackbone
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.backbones.language.stems import StemConfig, stem_words
from ceed_vla.backbones.transformers.cache_check import check_causal
from ceed_vla.backbones.transformers.config import (
    TransformersConfig,
    least_sizes,
    published_folder,
    read_architecture,
)
from ceed_vla.backbones.transformers.prompt_tokens import PromptTokensStep
from ceed_vla.backbones.transformers.published import read_published
from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.fields import ranged

_NO_MODEL = "backbone.architecture does not describe a model"
_COPY = "copy config.json again."


@BackboneConfig.register_subclass("language")
@dataclass
class LanguageConfig(TransformersConfig):
    """A causal language model (Llama, SmolLM2, Qwen, Gemma, Mistral) behind the camera stems of a
    compact policy.

    Attributes:
        layers: First layers of the model that are used; 0 for all.
        stems: The camera stems.
        max_prompt_tokens: Longest instruction [tokens]; longer ones are cut.
    """

    steps: ClassVar[tuple[str, ...]] = ("ceed_vla_pi0_fast_prompt", "ceed_vla_stem_words")

    layers: int = ranged(0, "[0, 1024]")
    stems: StemConfig = field(default_factory=StemConfig)
    max_prompt_tokens: int = ranged(32, "[1, 4096]")

    def build(self, shape: PolicyShape) -> TrainableBackbone:
        from ceed_vla.backbones.language.model import LanguageBackbone

        new = not self.architecture
        own = self.stems.take() if new else None
        model = self._read() if new or self.weights == "reference" else self._described()
        backbone = LanguageBackbone(model, shape, self.stems)
        if own is not None:
            check_causal(model)
            backbone.begin()
            backbone.stems.fill(own)
            self.describe(model.config.to_json_string(use_diff=True))
            self._config()  # a checkpoint must be readable
        if self.weights == "reference":
            backbone.refer()
        return backbone

    def _read(self) -> PreTrainedModel:
        """The model in the folder `path`, cut to its first `layers`."""
        folder = published_folder(self.path, "backbone.path")

        def cut(config: Any) -> None:
            all_layers = int(config.num_hidden_layers)
            if self.layers > all_layers:
                raise ConfigError(
                    f"backbone.layers is {self.layers}; {folder} has {all_layers} layers."
                )
            if self.layers:
                config.num_hidden_layers = self.layers
                if getattr(config, "layer_types", None):
                    config.layer_types = config.layer_types[: self.layers]

        return read_published(AutoModel, folder, cut=cut, dtype=torch.float32)

    def _described(self) -> PreTrainedModel:
        """The model that `architecture` describes; its weights must still be read."""
        config = self._config()
        with raised_as(CheckpointError, _NO_MODEL, _COPY):
            model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        return cast("PreTrainedModel", model.eval())

    def _config(self) -> Any:
        """The configuration in `architecture`."""
        values = read_architecture(self.architecture)
        with raised_as(CheckpointError, _NO_MODEL, _COPY):
            return AutoConfig.for_model(values.pop("model_type"), **values)

    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        prompt = PromptTokensStep(
            max_length=self.max_prompt_tokens, padding="longest", padding_side="right"
        )
        return [prompt.read_folder(Path(self.path)), stem_words(self.stems, instructions)]

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        layers, numbers = least_sizes(read_architecture(self.architecture))
        if self.weights == "reference":  # compared with the folder of the language model
            return layers, numbers
        return layers, numbers + self.stems.least_numbers(len(shape.cameras))

    def validate_features(self, shape: PolicyShape) -> None:
        if not shape.state_dim:
            raise ConfigError(
                "The data have no observation.state; the language backbone needs a state vector."
            )
