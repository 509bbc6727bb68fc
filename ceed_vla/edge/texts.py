"""Ids of instructions, as the graphs of an export read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ceed_vla.edge.feature_settings import TOKENIZER, TextSettings
from ceed_vla.edge.settings import ExportSettings, read_part
from ceed_vla.errors import CheckpointError, InstructionError, raised_as
from ceed_vla.extras import require_module
from ceed_vla.fields import short
from ceed_vla.instructions import PLACE
from ceed_vla.limited.tokenizers import MOST_BYTES, check_tokenizer_text
from ceed_vla.word_ids import PAD_ID, WordIds


class Texts(Protocol):
    """Instructions to ids."""

    def encode(self, instruction: str) -> np.ndarray:
        """Ids (1, L) int64 of an instruction; raises `InstructionError`."""

    def encode_for_stems(self, instruction: str) -> np.ndarray | None:
        """Ids (1, W) int64 that the camera stems read; None if they read no instruction."""


def open_texts(folder: Path, settings: ExportSettings) -> Texts:
    """What encodes the instructions of an export.

    Raises:
        CheckpointError: Its tokenizer is missing, damaged or unsafe.
        ConfigError: The library tokenizers, which it needs, is not installed.
    """
    text = settings.text
    if text.kind == "words":
        return _Words(text)
    content = read_part(folder, TOKENIZER, settings.files[TOKENIZER], MOST_BYTES)
    return _Prompts(text, content, str(folder / TOKENIZER))


class _Words:
    def __init__(self, settings: TextSettings) -> None:
        self._words = WordIds(settings.vocabulary or [], settings.longest)
        self._padded = settings.padded

    def encode(self, instruction: str) -> np.ndarray:
        ids = self._words.encode(_checked(instruction))
        if not self._padded:
            ids = [i for i in ids if i != PAD_ID]
        return np.array([ids], dtype=np.int64)

    def encode_for_stems(self, instruction: str) -> np.ndarray | None:
        return self.encode(instruction) if self._padded else None


class _Prompts:
    def __init__(self, settings: TextSettings, content: bytes, what: str) -> None:
        require_module("the prompt of this export", "tokenizers")
        from tokenizers import Tokenizer

        with raised_as(CheckpointError, f"{what} is not text", "copy the whole folder again."):
            text = content.decode("utf-8")
        check_tokenizer_text(text, what, CheckpointError, [settings.template])
        with raised_as(CheckpointError, f"{what} cannot be read", "copy the whole folder again."):
            self._tokenizer: Any = Tokenizer.from_str(text)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if settings.cut:
            self._tokenizer.enable_truncation(settings.longest, direction=settings.cut)
        self._settings = settings
        known = settings.stem_vocabulary
        self._stem_words = WordIds(known, settings.stem_words) if known else None

    def encode_for_stems(self, instruction: str) -> np.ndarray | None:
        if self._stem_words is None:
            return None
        return np.array([self._stem_words.encode(_checked(instruction))], dtype=np.int64)

    def encode(self, instruction: str) -> np.ndarray:
        settings = self._settings
        instruction = _checked(instruction)
        refused = [text for text in settings.refused or () if text in instruction]
        if refused:
            raise InstructionError(
                f"The instruction {short(instruction)} contains {refused[0]}, which stands for an "
                "image; leave it out."
            )
        prompt = settings.template.replace(PLACE, instruction)
        shown = f"The tokenizer cannot read the instruction {short(instruction)}"
        with raised_as(InstructionError, shown, "use plain text."):
            encoded = self._tokenizer.encode(prompt, add_special_tokens=settings.special_tokens)
        ids = list(encoded.ids)
        if len(ids) > settings.longest:
            raise InstructionError(
                f"The prompt has {len(ids)} tokens, more than {settings.longest}; shorten the "
                f"instruction {short(instruction)}."
            )
        return np.array([[*ids, *settings.behind]], dtype=np.int64)


def _checked(instruction: str) -> str:
    if not isinstance(instruction, str) or not instruction.strip():
        raise InstructionError(f"The instruction is {short(instruction)}; it must be one text.")
    return instruction
