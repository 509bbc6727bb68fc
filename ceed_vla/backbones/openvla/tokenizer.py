"""Tokenizers of OpenVLA folders, read from the files directly, because later versions of
transformers rebuild Llama's by other rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ceed_vla.errors import CheckpointError, ObservationError, raised_as
from ceed_vla.extras import require_module
from ceed_vla.files import read_json
from ceed_vla.limited.tokenizers import check_tokenizers

FAST, SLOW = "tokenizer.json", "tokenizer.model"
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


def read_tokenizer(folder: Path) -> _Fast | _SentencePiece:
    """Read the tokenizer of a folder: tokenizer.json, or the older tokenizer.model.

    It maps a text to ids below its `size`, including the tokens that mark begin and end of a text.
    """
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    check_tokenizers(folder)
    for name, kind in ((FAST, _Fast), (SLOW, _SentencePiece)):
        if (folder / name).is_file():
            with raised_as(CheckpointError, f"{folder / name} cannot be read", "copy it again."):
                return kind(folder / name, settings)
    raise CheckpointError(f"{folder} lacks {FAST} and {SLOW}; copy one of them too.")


class _Fast:
    """The tokenizer in tokenizer.json."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        from tokenizers import Tokenizer
        from tokenizers.processors import TemplateProcessing

        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = max(self._tokenizer.get_vocab().values()) + 1
        if settings.get("tokenizer_class") not in LLAMA:
            return  # the template in the file applies
        first, last = _marks(settings)
        special = [(token, self._tokenizer.token_to_id(token)) for token in (first, last) if token]
        missing = [token for token, number in special if number is None]
        if missing:
            raise CheckpointError(
                f"{file.name} lacks {missing[0]!r}, which tokenizer_config.json adds to every "
                "text; take both from the same model."
            )
        self._tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A {last}".strip(), special_tokens=special
        )

    def __call__(self, text: str) -> list[int]:
        with raised_as(
            ObservationError, "The tokenizer fails on the prompt", "use the model's own."
        ):
            return list(self._tokenizer.encode(text).ids)


class _SentencePiece:
    """The tokenizer in tokenizer.model."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        require_module(SLOW, "sentencepiece")
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(file))
        self.size = int(self._model.vocab_size())
        first, last = _marks(settings)
        self._first = [self._model.bos_id()] if first else []
        self._last = [self._model.eos_id()] if last else []

    def __call__(self, text: str) -> list[int]:
        return [*self._first, *self._model.encode(text), *self._last]


def _marks(settings: dict[str, Any]) -> tuple[str, str]:
    """Tokens in front of and behind every text; empty for none."""
    first = _token(settings.get("bos_token"), "<s>") if settings.get("add_bos_token", True) else ""
    last = _token(settings.get("eos_token"), "</s>") if settings.get("add_eos_token", False) else ""
    return first, last


def _token(value: Any, usual: str) -> str:
    return str(value.get("content", usual) if isinstance(value, dict) else value or usual)
