"""Ids of the words of an instruction, without torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from ceed_vla.errors import ConfigError, InstructionError

logger = logging.getLogger(__name__)

PAD_ID = 0
UNKNOWN_ID = 1
FIRST_WORD_ID = 2
MOST_WARNINGS = 100  # about unknown words


def split_words(instruction: str) -> list[str]:
    """Lower-case words of an instruction, separated by spaces and punctuation."""
    return re.findall(r"[^\W_]+", instruction.lower())


class WordIds:
    """Ids of instructions: padding is 0, an unknown word is 1, then the vocabulary.

    Args:
        vocabulary: Distinct lower-case words, sorted.
        max_words: Longest instruction [words].

    Raises:
        ConfigError: The vocabulary is not such a list.
    """

    def __init__(self, vocabulary: Sequence[str], max_words: int) -> None:
        wrong = [word for word in vocabulary if split_words(word) != [word]]
        if wrong or sorted(set(vocabulary)) != list(vocabulary):
            shown = f"has {wrong[0][:50]!r}" if wrong else "repeats a word, or is not in order"
            raise ConfigError(
                f"vocabulary {shown}; it must list distinct lower-case words, sorted."
            )
        self.vocabulary = vocabulary
        self.max_words = max_words
        self._ids = {word: FIRST_WORD_ID + i for i, word in enumerate(vocabulary)}
        self._warned: set[str] = set()

    def encode(self, instruction: str) -> list[int]:
        """Ids of one instruction, padded to `max_words`.

        Raises:
            InstructionError: The instruction is empty or longer, or has no known word.
        """
        words = split_words(instruction)
        shown = repr(instruction[:200])
        if not words:
            raise InstructionError(
                f"The instruction {shown} has no word; say what to do: 'put the cube in the bin'."
            )
        if len(words) > self.max_words:
            raise InstructionError(
                f"The instruction has {len(words)} words, more than {self.max_words}: {shown}."
            )
        if self._ids and not any(word in self._ids for word in words):
            known = ", ".join(self.vocabulary)[:300]
            raise InstructionError(
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
