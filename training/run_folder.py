"""The output folder of a training run: its log, and the progress that says which state is whole."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from typing import Any

from ceed_vla.data.files import is_whole
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.files import parse_json, read_bytes, read_json, strange, write_text
from ceed_vla.outputs import named_folder
from ceed_vla.training.settings import full_disk

PROGRESS = "progress.json"
# written in turns, so that the last complete one survives an interrupt
STATES = (
    "state_a",
    "state_b",
)
MOST_LOG = 2**28  # [bytes]
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
TRACKER = "tensorboard"
TAKEOVER = "takeover"


class RunFolder:
    """The folder that a run writes to, after a check that it may.

    Args:
        name: As the settings give it.
        resume: Whether a run in it is continued.

    Raises:
        ConfigError: No folder, one that holds another run, or files that this one would replace.
        CheckpointError: Nothing to resume, or links through which the run would write elsewhere.
    """

    def __init__(self, name: str, resume: bool) -> None:
        self.path = named_folder("output_dir", name)
        self.resume = resume
        self._check(name)

    @property
    def started(self) -> bool:
        """Whether a run has saved its first state here."""
        return (self.path / PROGRESS).exists()

    def _check(self, folder: str) -> None:
        started = self.started
        if started and not self.resume:
            raise ConfigError(
                f"{folder} already holds a run; continue it with --resume=true or choose another "
                "folder."
            )
        if self.resume and not started:
            raise CheckpointError(f"{folder} has no {PROGRESS}; there is nothing to resume there.")
        names = [] if started else [PROGRESS, LOG, CHECKPOINTS, TRACKER, TAKEOVER, *STATES]
        foreign = next((name for name in names if os.path.lexists(self.path / name)), None)
        if foreign:
            raise ConfigError(
                f"{folder} holds {foreign}, which a run would replace, but no {PROGRESS}: another "
                "program's, or of a run that ended before its first state. Name a new or empty "
                "folder."
            )
        if elsewhere := next(strange(self.path), None) if started else None:
            raise CheckpointError(
                f"{elsewhere} is a link, a pipe or a device; a run reads and writes only files of "
                "its own folder. Put the file itself there."
            )

    def writing(self) -> AbstractContextManager[None]:
        """Errors of writing inside say what is kept."""
        kept = "the last complete state is kept; go on with --resume=true"
        return full_disk(
            self.path,
            kept if self.started else "no state is complete yet; start again in a new folder",
        )

    # ---- log -------------------------------------------------------------------------------------

    def append_log(self, step: int, values: dict[str, float]) -> None:
        """Add a line to ``log.jsonl``."""
        with (self.path / LOG).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def trim_log(self, step: int) -> None:
        """Drop log lines of steps after `step`, which will be taken (again)."""
        file = self.path / LOG
        if file.is_file():
            content = read_bytes(file, most=MOST_LOG) if self.resume else b""
            lines = content.decode(errors="replace").splitlines()
            kept = [line for line in lines if is_whole(_step_of(line), 0, step)]
            write_text(file, "".join(f"{line}\n" for line in kept))

    # ---- progress --------------------------------------------------------------------------------

    def next_state(self, total: int) -> str:
        """The name of the state to write: the one that the progress does not name."""
        if not (self.path / PROGRESS).is_file():
            return STATES[0]
        return STATES[0] if self.read_progress(total)["state"] == STATES[1] else STATES[1]

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Write ``progress.json``: from here on the state that it names is the one to resume."""
        write_text(self.path / PROGRESS, json.dumps(progress))

    def read_progress(self, total: int) -> dict[str, Any]:
        """What `write_progress` wrote; older runs named neither processes nor `total`.

        `CheckpointError` for another file's contents, or a step beyond `total`, the run's steps.
        """
        file = self.path / PROGRESS
        progress: dict[str, Any] = {"processes": 1, "total": total, **read_json(file)}
        fits = is_whole(progress.get("step"), 0, total) and is_whole(progress["processes"], 1)
        fits = fits and is_whole(progress["total"], 0)
        if not fits or progress.get("state") not in STATES:
            raise CheckpointError(
                f"{file} holds {str(progress)[:200]}; it must name a step up to {total}, the "
                f"run's steps now, and a state, {' or '.join(STATES)}. Repeat the settings the run "
                "was started with, or start again."
            )
        return progress


def _step_of(line: str) -> object:
    """The step of a line of ``log.jsonl``; None of a damaged one."""
    try:
        return parse_json(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
