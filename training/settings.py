"""What the settings of several commands share: lists in a text, and disks that are full."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.fields import COUNTS, SEEDS, Checked, ranged

SHARES = "[0, 1]"
BATCHES = "[1, 1e6]"
RATES, NONE_OR_RATES = "(0, 10]", "[0, 10]"
NONE_OR_COUNTS = "[0, 1e9]"
LARGEST = 1e9
_TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "No space left", "file write failed")


@dataclass
class BesideConfig(Checked):
    """What the commands share that train something beside a frozen policy.

    Attributes:
        policy_path: The policy, whose weights stay.
        roots: Comma-separated data sets, whose observations it sees.
        output_dir: A new folder for a copy of its checkpoint with what was trained.
        eval_frames: Held-out frames that the report is about.
    """

    policy_path: str = ""
    roots: str = ""
    output_dir: str = ""
    steps: int = ranged(300, COUNTS)
    batch_size: int = ranged(16, BATCHES)
    lr: float = ranged(2e-3, RATES)
    eval_frames: int = ranged(64, BATCHES)
    seed: int = ranged(0, SEEDS)


def split_list(text: str) -> list[str]:
    """The non-empty parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def number_list(text: str, name: str) -> list[float]:
    """The numbers of a comma-separated list, none of them negative; else a `ConfigError` names the
    setting.
    """
    try:
        numbers = [float(part) for part in split_list(text)]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= LARGEST for number in numbers):
        raise ConfigError(
            f"{name} is {text!r}; it must be numbers in [0, {LARGEST:.0e}], with commas."
        )
    return numbers


@contextmanager
def full_disk(folder: Path, kept: str) -> Iterator[None]:
    """Say in one line why `folder` cannot be written, what helps, and what is `kept`."""
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
        raise CeedVLAError(f"{folder} cannot be written ({reason}). {remedy}; {kept}.") from error
