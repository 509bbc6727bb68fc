"""Pre- and post-processing: instruction words to ids, state normalisation, batching. Loads offline."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import RobotObservation, TransitionKey
from lerobot.processor import (
    ObservationProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import OBS_LANGUAGE_TOKENS, OBS_STATE

import ceed_vla.backbones.openvla_inputs  # these register their steps
import ceed_vla.backbones.vlm_inputs  # noqa: F401
from ceed_vla.backbones.config import CompactConfig
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.fields import check_fields, ranged
from ceed_vla.instructions import batch_instructions
from ceed_vla.pipelines import checked

logger = logging.getLogger(__name__)

PAD_ID, UNKNOWN_ID, FIRST_WORD_ID = 0, 1, 2
MOST_WARNINGS = 100  # about words that a policy has never seen
LEAST_DEVIATION = 1e-3  # of a state's dimension, in its own units


def split_words(instruction: str) -> list[str]:
    """Lower-case words of an instruction; punctuation separates."""
    return re.findall(r"[a-z0-9]+", instruction.lower())


def build_vocabulary(instructions: Iterable[str]) -> list[str]:
    """The sorted words of all `instructions`."""
    return sorted({word for instruction in instructions for word in split_words(instruction)})


@ProcessorStepRegistry.register(name="ceed_vla_instruction_words")
@dataclass
class InstructionWordsStep(ObservationProcessorStep):
    """Turn ``task`` strings into ``observation.language.tokens`` (B, L) int64, padded with 0; unknown words are 1.

    The whole vocabulary is saved with the pipeline, so that a checkpoint loads without a network.
    """

    vocabulary: list[str] = field(default_factory=list)
    max_words: int = ranged(12, "[1, 4096]")

    def __post_init__(self) -> None:
        check_fields(self)
        wrong = [word for word in self.vocabulary if split_words(word) != [word]]
        if wrong or sorted(set(self.vocabulary)) != self.vocabulary:
            shown = f"has {wrong[0][:50]!r}" if wrong else "repeats a word, or is not in order"
            raise ConfigError(f"vocabulary {shown}; it must hold different lower-case words, sorted.")
        self._ids = {word: FIRST_WORD_ID + i for i, word in enumerate(self.vocabulary)}
        self._warned: set[str] = set()

    def check_policy(self, policy: CeedVLAConfig) -> None:
        """Raise `ConfigError` unless these are the settings that the policy's configuration has."""
        sizes = (
            getattr(policy.backbone, "max_instruction_words", self.max_words),
            getattr(policy.backbone, "vocabulary_size", len(self.vocabulary) + FIRST_WORD_ID),
        )
        if not self.vocabulary:
            raise ConfigError("vocabulary is empty; every word would be an unknown one.")
        if self.max_words != sizes[0] or len(self.vocabulary) + FIRST_WORD_ID > sizes[1]:
            raise ConfigError(
                f"max_words {self.max_words} and {len(self.vocabulary)} words; the backbone has {sizes[0]} and room "
                f"for {sizes[1] - FIRST_WORD_ID}."
            )
        known = getattr(policy.backbone, "known_words", 0)
        if known not in (0, len(self.vocabulary)):
            raise ConfigError(
                f"vocabulary has {len(self.vocabulary)} words; {known} were trained. Copy it again."
            )

    def encode(self, instruction: str) -> list[int]:
        """Ids of one instruction, padded to `max_words`.

        Raises:
            ObservationError: The instruction is empty or longer than `max_words`.
        """
        words = split_words(instruction)
        if not words:
            raise ObservationError(
                f"The instruction {instruction[:200]!r} has no word; say what to do: 'put the red cube in the bin'."
            )
        if len(words) > self.max_words:
            raise ObservationError(
                f"The instruction has {len(words)} words, this policy reads at most {self.max_words}: "
                f"{instruction[:200]!r}."
            )
        if self._ids and not any(word in self._ids for word in words):
            raise ObservationError(
                f"The policy knows no word of the instruction {instruction[:200]!r}; it knows "
                f"{', '.join(self.vocabulary)[:300]}."
            )
        for word in words:
            if word not in self._ids and word not in self._warned and len(self._warned) < MOST_WARNINGS:
                self._warned.add(word)
                logger.warning("The policy has never seen the word %r; it is read as unknown.", word[:50])
        ids = [self._ids.get(word, UNKNOWN_ID) for word in words]
        return ids + [PAD_ID] * (self.max_words - len(ids))

    def observation(self, observation: RobotObservation) -> RobotObservation:
        tasks = batch_instructions(self.transition.get(TransitionKey.COMPLEMENTARY_DATA))
        ids = torch.tensor([self.encode(t) for t in tasks], dtype=torch.long)  # (B, L)
        state = observation.get(OBS_STATE)
        if len(tasks) == 1 and state is not None:
            ids = ids.expand(len(state), -1)  # one instruction for the whole batch
        return {**observation, OBS_LANGUAGE_TOKENS: ids}

    def get_config(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary, "max_words": self.max_words}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        features[PipelineFeatureType.OBSERVATION][OBS_LANGUAGE_TOKENS] = PolicyFeature(
            type=FeatureType.LANGUAGE, shape=(self.max_words,)
        )
        return features


def make_instruction_step(config: CompactConfig, instructions: Iterable[str]) -> InstructionWordsStep:
    """The instruction step for a data set's instructions.

    Raises:
        ConfigError: No instruction, one that is too long, or words that do not fit the embedding.
    """
    instructions = list(instructions)
    vocabulary = build_vocabulary(instructions)
    if not vocabulary:
        raise ConfigError("There is no instruction to take the vocabulary from; pass the metadata.")
    longest = max(instructions, key=lambda text: len(split_words(text)), default="")
    if len(split_words(longest)) > config.max_instruction_words:
        raise ConfigError(
            f"The longest instruction has {len(split_words(longest))} words, max_instruction_words is "
            f"{config.max_instruction_words}; raise it: {longest!r}."
        )
    if len(vocabulary) + FIRST_WORD_ID > config.vocabulary_size:
        raise ConfigError(
            f"The instructions use {len(vocabulary)} words; vocabulary_size {config.vocabulary_size} holds "
            f"{config.vocabulary_size - FIRST_WORD_ID}. Raise vocabulary_size."
        )
    config.known_words = len(vocabulary)
    return InstructionWordsStep(vocabulary=vocabulary, max_words=config.max_instruction_words)


def make_ceed_vla_pre_post_processors(
    config: CeedVLAConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
    dataset_meta: Any | None = None,
    instructions: Iterable[str] | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pre- and post-processor of a policy that is new.

    Args:
        config: The policy's configuration.
        dataset_stats: LeRobot statistics; the state is normalised with its mean and standard deviation.
        dataset_meta: LeRobot metadata; gives the instructions (the compact backbone takes its vocabulary from them).
        instructions: The instructions, where there is no `dataset_meta`.

    Returns:
        LeRobot pipelines (pre-processor, post-processor).

    Raises:
        ConfigError: Instructions that do not fit the configuration.
    """
    if instructions is None:
        meta = dataset_meta or getattr(config, "_runtime_dataset_meta", None)  # where lerobot-train leaves it
        instructions = [] if meta is None else [str(task) for task in meta.tasks.index]
    steps = make_default_policy_processor_steps(config, _with_width(dataset_stats))
    inputs = config.backbone.processor_steps(config, list(instructions))
    pre, post = make_policy_processor_pipelines(
        [steps.rename_observations, steps.add_batch_dim, *inputs, steps.to_device, steps.normalize],
        [steps.unnormalize, steps.to_cpu],
    )
    return checked(pre), checked(post)


def _with_width(
    stats: dict[str, dict[str, torch.Tensor]] | None,
) -> dict[str, dict[str, torch.Tensor]] | None:
    """Statistics in which dimensions that never move have a small deviation: nothing is divided by zero."""
    if stats is None:
        return None
    return {
        key: {**values, "std": torch.as_tensor(values["std"]).clamp(min=LEAST_DEVIATION)}
        if "std" in values
        else values
        for key, values in stats.items()
    }
