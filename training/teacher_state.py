"""State of a teacher's run besides weights: takeover rounds, and the sizes that a budget chose.

Both are read from a file, and checked before a run continues with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ceed_vla.data.files import is_whole
from ceed_vla.errors import CheckpointError
from ceed_vla.training.budget import Speeds


@dataclass(frozen=True)
class Sizes:
    """Sizes that a budget chose at the start of a run.

    Attributes:
        first: The first step on demonstrations.
        batch_size: Frames of a step on actions.
        speeds: Durations of its steps.
    """

    first: int
    batch_size: int
    speeds: Speeds

    def entry(self) -> dict[str, Any]:
        """The entry of ``progress.json``."""
        return {
            "first": self.first,
            "batch_size": self.batch_size,
            "speeds": [self.speeds.grounding, self.speeds.action],
        }


def read_sizes(entry: Any, output: Path, total: int) -> Sizes:
    """Read the sizes in an entry of ``progress.json``.

    Args:
        entry: The entry.
        output: The run's folder, for the message.
        total: Most steps of the run.

    Raises:
        CheckpointError: The entry is damaged.
    """
    try:
        first = entry["first"]
        batch_size = entry["batch_size"]
        grounding, action = (float(seconds) for seconds in entry["speeds"])
        fits = (
            is_whole(first, 0, total)
            and is_whole(batch_size, 1)
            and all(0 <= seconds < 1e6 for seconds in (grounding, action))
        )
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"{output} cannot be resumed with --max_minutes: its sizes are "
            f"{str(entry)[:200]}; they must be those that a run with --max_minutes chose. "
            "Set --steps instead, or start again."
        )
    return Sizes(first, batch_size, Speeds(grounding, action, batch_size))


def read_takeovers(entry: Any, output: Path, folder: Path, most: int) -> list[list[str]]:
    """Read the datasets of every takeover round in an entry of ``progress.json``.

    Args:
        entry: The entry.
        output: The run's folder, for the message.
        folder: Folder of takeovers; datasets elsewhere are refused.
        most: Most rounds.

    Raises:
        CheckpointError: The entry is damaged, or names other folders.
    """
    rounds: list[Any] = entry if isinstance(entry, list) and len(entry) <= most else [None]
    for roots in rounds:
        inside = isinstance(roots, list) and all(isinstance(root, str) for root in roots)
        if not inside or not all(Path(root).resolve().is_relative_to(folder) for root in roots):
            raise CheckpointError(
                f"{output} cannot be resumed: its takeovers are {str(entry)[:200]}; they must be "
                f"datasets in {folder}, of {most} rounds at most."
            )
    return rounds
