"""Instruction words to ids, as a LeRobot processor step with the vocabulary."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.lerobot_types import RobotObservation, TransitionKey
from lerobot.processor import ProcessorStepRegistry
from lerobot.utils.constants import OBS_LANGUAGE_TOKENS, OBS_STATE

from ceed_vla.backbones.config import InputsStep, PolicyShape
from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.fields import check_fields, ranged
from ceed_vla.instructions import batch_instructions

logger = logging.getLogger(__name__)

PAD_ID = 0
UNKNOWN_ID = 1
FIRST_WORD_ID = 2
MOST_WARNINGS = 100  # about unknown words


def split_words(instruction: str) -> list[str]:
    """Lower-case words of an instruction, separated by spaces and punctuation."""
    return re.findall(r"[^\W_]+", instruction.lower())


def build_vocabulary(instructions: Iterable[str]) -> list[str]:
    """The sorted words of all `instructions`."""
    return sorted({word for instruction in instructions for word in split_words(instruction)})


@ProcessorStepRegistry.register(name="ceed_vla_instruction_words")
@dataclass
class InstructionWordsStep(InputsStep):
    """Turn ``task`` strings into ``observation.language.tokens`` (B, L) int64.

    Padding is 0, an unknown word is 1. The pipeline stores the whole vocabulary, so that a
    checkpoint loads without a network.
    """

    vocabulary: list[str] = field(default_factory=list)
    max_words: int = ranged(12, "[1, 4096]")

    def __post_init__(self) -> None:
        check_fields(self)
        wrong = [word for word in self.vocabulary if split_words(word) != [word]]
        if wrong or sorted(set(self.vocabulary)) != self.vocabulary:
            shown = f"has {wrong[0][:50]!r}" if wrong else "repeats a word, or is not in order"
            raise ConfigError(
                f"vocabulary {shown}; it must list distinct lower-case words, sorted."
            )
        self._ids = {word: FIRST_WORD_ID + i for i, word in enumerate(self.vocabulary)}
        self._warned: set[str] = set()

    def check_policy(self, backbone: Any, shape: PolicyShape) -> None:
        """Raise `ConfigError` unless the settings match the backbone's configuration."""
        words = len(self.vocabulary)
        if not words:
            raise ConfigError("vocabulary is empty; it must have at least one word.")
        most = getattr(backbone, "max_instruction_words", self.max_words)
        room = getattr(backbone, "words", words + FIRST_WORD_ID) - FIRST_WORD_ID
        if self.max_words != most or words > room:
            raise ConfigError(
                f"max_words is {self.max_words} with {words} words; the backbone's configuration "
                f"has {most} and room for {room}. Copy the checkpoint again."
            )
        known = getattr(backbone, "known_words", 0)
        if known not in (0, words):
            raise ConfigError(
                f"vocabulary has {words} words; the model was trained with {known}. Copy the "
                "checkpoint again."
            )

    def encode(self, instruction: str) -> list[int]:
        """Ids of one instruction, padded to `max_words`.

        Raises:
            ObservationError: The instruction is empty or longer, or has no known word.
        """
        words = split_words(instruction)
        shown = repr(instruction[:200])
        if not words:
            raise ObservationError(
                f"The instruction {shown} has no word; say what to do: 'put the cube in the bin'."
            )
        if len(words) > self.max_words:
            raise ObservationError(
                f"The instruction has {len(words)} words, more than {self.max_words}: {shown}."
            )
        if self._ids and not any(word in self._ids for word in words):
            known = ", ".join(self.vocabulary)[:300]
            raise ObservationError(
                f"The instruction {shown} has no word of the policy's vocabulary: {known}."
            )
        for word in words:
            if (
                word not in self._ids
                and word not in self._warned
                and len(self._warned) < MOST_WARNINGS
            ):
                self._warned.add(word)
                logger.warning(
                    "The word %r is not in the policy's vocabulary; it is read as unknown.",
                    word[:50],
                )
        ids = [self._ids.get(word, UNKNOWN_ID) for word in words]
        return ids + [PAD_ID] * (self.max_words - len(ids))

    def observation(self, observation: RobotObservation) -> RobotObservation:
        tasks = batch_instructions(self.transition.get(TransitionKey.COMPLEMENTARY_DATA))
        ids = torch.tensor([self.encode(t) for t in tasks], dtype=torch.long)  # (B, L)
        state = observation.get(OBS_STATE)
        if len(tasks) == 1 and state is not None:
            ids = ids.expand(len(state), -1)  # one instruction for the whole batch
        return {**observation, OBS_LANGUAGE_TOKENS: ids}


def make_instruction_step(
    instructions: Iterable[str], max_words: int, rows: int
) -> InstructionWordsStep:
    """Make the step for the instructions of a dataset.

    Args:
        instructions: The instructions.
        max_words: Maximum length of an instruction [words].
        rows: Rows of the word embedding.

    Raises:
        ConfigError: There are no instructions, or they do not fit `max_words` or `rows`.
    """
    instructions = list(instructions)
    vocabulary = build_vocabulary(instructions)
    if not vocabulary or (wordless := [text for text in instructions if not split_words(text)]):
        shown = (
            f"The instruction {wordless[0]!r} has no word"
            if vocabulary
            else "There is no instruction"
        )
        raise ConfigError(f"{shown} to take the vocabulary from; pass the metadata.")
    longest, text = max((len(split_words(text)), text) for text in instructions)
    if longest > max_words:
        raise ConfigError(
            f"max_instruction_words is {max_words}, but an instruction has {longest} words: "
            f"{text!r}. Raise it."
        )
    words = len(vocabulary)
    room = rows - FIRST_WORD_ID
    if words > room:
        raise ConfigError(
            f"The instructions use {words} words; backbone.words = {rows} holds {room}. Raise it."
        )
    return InstructionWordsStep(vocabulary=vocabulary, max_words=max_words)
