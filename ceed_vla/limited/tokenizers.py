"""Check tokenizers of checkpoints in a limited child, before this process opens them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ceed_vla.errors import CeedVLAError, CheckpointError
from ceed_vla.files import parse_json, read_bytes, read_text
from ceed_vla.limited.process import LimitError, run_limited

MOST_BYTES = 2**26  # of a tokenizer's file; the largest that are published have about half
FAST = "tokenizer.json"
# Further files that a loader in this process reads if they exist.
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
)
_LONGEST_TOKEN, _MOST_TOKENS = 200, 1000  # of the texts in these files that are tried
_checked: set[str] = set()  # hashes of content and texts that passed the check


def check_tokenizers(folder: Path, texts: Iterable[str] = ()) -> None:
    """Refuse a folder whose tokenizer crashes, hangs or fills the memory when opened or used.

    Args:
        folder: Folder of tokenizer.json, or of files of SentencePiece (``*.model``).
        texts: Texts that it will be used on, besides instructions.

    Raises:
        CheckpointError: The tokenizer fails the check, or a file cannot be read.
    """
    beside = [file for name in _BESIDE if (file := folder / name).exists()]
    tokens = dict.fromkeys(token for file in beside for token in _tokens(file))
    tried = [*texts, *list(tokens)[:_MOST_TOKENS]]
    for file in sorted(found for pattern in (FAST, "*.model") for found in folder.glob(pattern)):
        content = read_bytes(file, CheckpointError, most=MOST_BYTES)
        _check(content, file.suffix, str(file), tried, CheckpointError)


def check_tokenizer_text(
    text: str, what: str, error: type[CeedVLAError], texts: Iterable[str] = ()
) -> None:
    """As `check_tokenizers`, for the content of a tokenizer.json; raises `error`.

    Messages call the content `what`.
    """
    _check(text.encode("utf-8", "surrogatepass"), ".json", what, [*texts], error)


def _check(
    content: bytes, suffix: str, what: str, texts: list[str], error: type[CeedVLAError]
) -> None:
    digest = hashlib.sha256(content)
    for text in texts:
        digest.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    key = suffix + digest.hexdigest()
    if key in _checked:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, f"tokenizer{suffix}")
            copy.write_bytes(content)
            run_limited("tokenizer", {"files": [str(copy)], "texts": texts})
    except LimitError as problem:
        raise error(
            f"{what} cannot be read ({problem}), according to a check in a separate process; copy "
            "it again."
        ) from problem
    _checked.add(key)


def _tokens(file: Path) -> Iterator[str]:
    """Short strings in a file of settings; `CheckpointError` if it is not JSON."""
    try:
        waiting: list[Any] = [parse_json(read_text(file))]
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({str(error)[:200]}); copy it again.") from error
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting.extend([*value, *value.values()] if isinstance(value, dict) else value)
        elif isinstance(value, str) and 0 < len(value) <= _LONGEST_TOKEN:
            yield value
