"""Instruction words to ids, as a LeRobot processor step with the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lerobot.lerobot_types import RobotObservation, TransitionKey
from lerobot.processor import ProcessorStepRegistry
from lerobot.utils.constants import OBS_LANGUAGE_TOKENS, OBS_STATE

from ceed_vla.backbones.config import InputsStep, PolicyShape
from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, ranged
from ceed_vla.instructions import batch_instructions
from ceed_vla.word_ids import FIRST_WORD_ID, WordIds
from ceed_vla.word_ids import PAD_ID as PAD_ID
from ceed_vla.word_ids import UNKNOWN_ID as UNKNOWN_ID
from ceed_vla.word_ids import split_words as split_words


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
    key: ClassVar[str] = OBS_LANGUAGE_TOKENS

    def __post_init__(self) -> None:
        check_fields(self)
        self._ids = WordIds(self.vocabulary, self.max_words)

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
        """See `WordIds.encode`."""
        return self._ids.encode(instruction)

    def observation(self, observation: RobotObservation) -> RobotObservation:
        tasks = batch_instructions(self.transition.get(TransitionKey.COMPLEMENTARY_DATA))
        ids = torch.tensor([self.encode(t) for t in tasks], dtype=torch.long)  # (B, L)
        state = observation.get(OBS_STATE)
        if len(tasks) == 1 and state is not None:
            ids = ids.expand(len(state), -1)  # one instruction for the whole batch
        return {**observation, self.key: ids}


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
