"""The command line that runs, for reports: they name the command that repeats them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_words: list[str] = []


@contextmanager
def invoked(words: Sequence[str]) -> Iterator[None]:
    """Let `words` be the command line that runs in the block."""
    _words[:] = words
    try:
        yield
    finally:
        _words.clear()


def command() -> str:
    """The command line that runs, quoted for a shell; empty outside commands."""
    return shlex.join(_words)
