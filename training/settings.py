"""Shared by several commands: ranges and lists of settings, and errors of full disks."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ceed_vla.errors import CeedVLAError, ConfigError

SHARES = "[0, 1]"
BATCHES = "[1, 1e6]"
RATES, NONE_OR_RATES = "(0, 10]", "[0, 10]"
NONE_OR_COUNTS = "[0, 1e9]"
LARGEST = 1e9
_TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "No space left", "file write failed")


def split_list(text: str) -> list[str]:
    """The non-empty parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def number_list(text: str, name: str) -> list[float]:
    """Parse a comma-separated list of non-negative numbers.

    Raises:
        ConfigError: Another text; the message calls the setting `name`.
    """
    try:
        numbers = [float(part) for part in split_list(text)]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= LARGEST for number in numbers):
        raise ConfigError(
            f"{name} is {text!r}; it must be numbers in [0, {LARGEST:.0e}], separated by commas."
        )
    return numbers


@contextmanager
def full_disk(folder: Path, advice: str) -> Iterator[None]:
    """Re-raise errors of writing to `folder` in one line, with reason, remedy and `advice`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            words in str(error) for words in _TORCH_WRITES
        ):
            raise
        full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = (
            f"{'is the disk full? ' if full else ''}{(str(error).splitlines() or [''])[0][:200]}"
        )
        remedy = "Make room there" if full else "Make it writable"
        raise CeedVLAError(f"{folder} cannot be written ({reason}). {remedy}; {advice}.") from error
