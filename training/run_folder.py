"""The output folder of a training run: its log, and its progress, which names the last state."""

from __future__ import annotations

import json
import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import draccus

from ceed_vla import invocation
from ceed_vla.data.files import is_whole
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.files import parse_json, read_bytes, read_json, strange, write_text
from ceed_vla.outputs import named_folder
from ceed_vla.texts import short
from ceed_vla.training.settings import full_disk

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
# written alternately, so that the last complete one survives an interrupt
STATES = (
    "state_a",
    "state_b",
)
MOST_LOG = 2**28  # [bytes]
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
TRACKER = "tensorboard"
TAKEOVER = "takeover"
_WHERE = ("output_dir", "resume")  # settings that a resumed run may change


class RunFolder:
    """The folder that a run writes to, checked before the run.

    Args:
        name: The setting `output_dir`.
        resume: Whether a run in it is continued.

    Raises:
        ConfigError: There is no folder, or it holds another run, or files that this one would
            replace.
        CheckpointError: There is no run to resume, or a link leads out of the folder.
    """

    def __init__(self, name: str, resume: bool) -> None:
        self.path = named_folder("output_dir", name)
        self.resume = resume
        self._logged: set[str] = set()  # lines of the step that is resumed from
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
            raise CheckpointError(f"{folder} has no {PROGRESS}; there is no run to resume in it.")
        names = [] if started else [PROGRESS, LOG, CHECKPOINTS, TRACKER, TAKEOVER, *STATES]
        foreign = next((name for name in names if os.path.lexists(self.path / name)), None)
        if foreign:
            raise ConfigError(
                f"{folder} holds {foreign}, which a run would replace, but no {PROGRESS}: it is of "
                "another program, or of a run that ended before its first state. Name a new or "
                "empty folder."
            )
        if elsewhere := next(strange(self.path), None) if started else None:
            raise CheckpointError(
                f"{elsewhere} is a link, a pipe or a device; a run reads and writes only regular "
                "files in its folder. Replace it by the file itself."
            )

    def writing(self) -> AbstractContextManager[None]:
        """Re-raise errors of writing with the remedy; see `full_disk`."""
        if self.started:
            advice = "continue from the last complete state with --resume=true"
        else:
            advice = "no state is complete yet; start again in a new folder"
        return full_disk(self.path, advice)

    # ---- log -------------------------------------------------------------------------------------

    def append_log(self, step: int, values: dict[str, float]) -> bool:
        """Add a line to ``log.jsonl``, unless the run that is resumed has measured this already;
        return whether it was new.
        """
        line = json.dumps({"step": step, **values})
        if line in self._logged:
            return False
        with (self.path / LOG).open("a") as file:
            file.write(f"{line}\n")
        return True

    def trim_log(self, step: int) -> None:
        """Drop log lines of steps after `step`, which are taken again."""
        file = self.path / LOG
        if file.is_file():
            content = read_bytes(file, most=MOST_LOG) if self.resume else b""
            lines = content.decode(errors="replace").splitlines()
            before = [line for line in lines if is_whole(_step_of(line), 0, step)]
            write_text(file, "".join(f"{line}\n" for line in before))
            last = [parse_json(line) for line in before if _step_of(line) == step]
            self._logged = {json.dumps(values) for values in last}

    # ---- progress --------------------------------------------------------------------------------

    def next_state(self, total: int) -> str:
        """The name of the next state: the one of `STATES` that the progress does not name."""
        if not (self.path / PROGRESS).is_file():
            return STATES[0]
        return STATES[0] if self.read_progress(total)["state"] == STATES[1] else STATES[1]

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Write ``progress.json``, after which a run resumes from the state that it names."""
        values = {**progress, "command": invocation.command()}
        write_text(self.path / PROGRESS, json.dumps(values))

    def read_progress(self, total: int) -> dict[str, Any]:
        """Read the result of `write_progress`; older runs stored neither processes nor `total`.

        Raises:
            CheckpointError: The file is damaged, or its step is beyond `total`, the run's steps.
        """
        file = self.path / PROGRESS
        progress: dict[str, Any] = {"processes": 1, "total": total, **read_json(file)}
        fits = is_whole(progress.get("step"), 0, total) and is_whole(progress["processes"], 1)
        fits = fits and is_whole(progress["total"], 0)
        if not fits or progress.get("state") not in STATES:
            raise CheckpointError(
                f"{file} holds {str(progress)[:200]}; it must name a step up to {total}, the "
                f"present number of steps, and a state, {' or '.join(STATES)}. Repeat the settings "
                "that the run was started with, or start again."
            )
        return progress


def check_origin(
    progress: dict[str, Any], now: dict[str, Any], folder: Path, instead: str = ""
) -> None:
    """Raise `CheckpointError` if a run in `folder` was started from other data or checkpoints than
    `now`; the message ends with what can be done `instead`.

    Older runs did not store all of them.
    """
    before = progress.get("origin", now)
    changed = [
        name
        for name in now
        if not isinstance(before, dict) or before.get(name, now[name]) != now[name]
    ]
    if changed:
        raise CheckpointError(
            f"The run in {folder} cannot be resumed: {' and '.join(changed)} differ from those "
            "that it was started with. Name the same datasets and checkpoints, unchanged, with the "
            f"same settings, or start a new run in another folder{instead}."
        )


def described_settings(config: object) -> dict[str, Any]:
    """Settings by dotted name, as JSON types."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else str(key), inner)
        else:
            found[name] = value

    add("", json.loads(json.dumps(draccus.encode(config), default=str)))
    return found


def warn_of_other_settings(progress: dict[str, Any], now: dict[str, Any]) -> None:
    """Log which settings of a resumed run differ from `now`; older runs did not store them."""
    before = progress.get("settings")
    if not isinstance(before, dict):
        return
    changed = [
        f"{name} ({short(value)} before)"
        for name, value in before.items()
        if name not in _WHERE and now.get(name, value) != value
    ]
    if changed:
        logger.warning(
            "The run goes on with other settings than it had: %s. What was learnt until now stays.",
            ", ".join(changed),
        )


def _step_of(line: str) -> object:
    """The step in a line of ``log.jsonl``; None for a damaged line."""
    try:
        return parse_json(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
