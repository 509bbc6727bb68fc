"""Open tokenizer files and use them on texts that reveal their cost, in a limited child.

The texts are ordinary ones, and long runs of characters that the file's own patterns and
replacements match: on such runs, patterns backtrack without end and replacements grow
exponentially.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ORDINARY = (
    "What action should the robot take to put the red cube in the bin?\n",
    "Task: pick up 12 cups, State: 128 5 0 255 17;\nAction: ",
    "Größe 3.5 cm\t\t  déjà vu \u4e2d\u6587 \U0001f916 \u202eabc\x00\ufffd",
    "".join(map(chr, range(300))),
)
LONG = 2000  # characters of a run
MOST_MARKS = 64  # different characters that runs are made of
_STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MOST_IDS = 65_536  # of a text, padding included
_MOST_TEXT = 2**24  # characters that ids are decoded to


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Use each file of the job (tokenizer.json or SentencePiece's) on ordinary and on its texts."""
    for name in job["files"]:
        texts = [*ORDINARY, *job["texts"]]
        if name.endswith(".json"):
            _use_json(Path(name), texts)
        else:
            _use_sentencepiece(name, [*texts, *runs("a 0.")])
    return {}


def runs(marks: str) -> Iterator[str]:
    """Texts that repeat one mark and end in another one, which makes patterns backtrack."""
    for mark in marks:
        yield mark * LONG + ("!" if mark != "!" else "?")
    yield marks * (LONG // max(len(marks), 1)) + "!"


def marks_of(values: Any) -> str:
    """Characters in the patterns and replacements of a tokenizer.json, without its vocabulary."""
    found: dict[str, None] = dict.fromkeys("a 0.\n")
    waiting = [values.get(stage) for stage in _STAGES]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, str) and len(value) <= LONG:
            found |= dict.fromkeys(value)
    return "".join(found)[:MOST_MARKS]


def _use_json(file: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer

    values = json.loads(file.read_text(encoding="utf-8"))
    marks = marks_of(values)
    del values  # otherwise the vocabulary is in memory twice
    tokenizer = Tokenizer.from_file(str(file))
    for text in [*texts, *runs(marks)]:
        ids = tokenizer.encode(text).ids
        if len(ids) > _MOST_IDS:
            raise ValueError(f"a text of {len(text)} characters becomes {len(ids)} ids")
        _check_text(tokenizer.decode(ids, skip_special_tokens=False))
    some = range(min(256, tokenizer.get_vocab_size()))
    _check_text(tokenizer.decode(list(some), skip_special_tokens=False))


def _use_sentencepiece(file: str, texts: list[str]) -> None:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=file)
    for text in texts:
        _check_text(model.decode(model.encode(text)))


def _check_text(text: str) -> None:
    if len(text) > _MOST_TEXT:
        raise ValueError(f"ids become a text of {len(text)} characters")
