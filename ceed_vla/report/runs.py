"""What kind of run a folder holds, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ceed_vla.errors import ConfigError
from ceed_vla.files import parse_json, read_bytes, read_json

# The file that shows the kind of a run; of several, the one that was written last.
KINDS = {
    "bench.json": "bench",
    "report.json": "eval",
    "calibration.json": "calibrate",
    "audit.json": "calibrate",
    "plans.json": "tune",
    "ros.json": "ros-demo",
    "log.jsonl": "train or distill",
}
MOST_LOG = 2**28  # [bytes]


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: Its name on the page, unique among the runs of a page.
        folder: Its folder.
        kind: The command that wrote it.
        values: Contents of its main file.
    """

    name: str
    folder: Path
    kind: str
    values: Mapping[str, Any]


def read_run(folder: Path, name: str) -> Run:
    """Read a run.

    Raises:
        ConfigError: The folder holds no run that can be shown, or a file of it is damaged.
    """
    present = [file for file in KINDS if (folder / file).is_file()]
    if not present:
        raise ConfigError(
            f"{folder} has none of {', '.join(KINDS)}; name output folders of eval, bench, "
            "calibrate, tune, train, distill or ros-demo."
        )
    found = max(present, key=lambda file: (folder / file).stat().st_mtime_ns)
    if found == "log.jsonl":
        lines = _lines(folder / found)
        distilled = any("consistency_loss" in line for line in lines)
        progress = folder / "progress.json"
        command = read_json(progress, ConfigError).get("command") if progress.is_file() else None
        values = {"lines": lines, "command": command}
        return Run(name, folder, "distill" if distilled else "train", values)
    values = read_json(folder / found, ConfigError)
    if found == "ros.json" and (folder / "details.json").is_file():
        values = {**values, "details": read_json(folder / "details.json", ConfigError)}
    return Run(name, folder, KINDS[found], values)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a training log; an incomplete last one is left out."""
    lines = read_bytes(file, ConfigError, most=MOST_LOG).decode(errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = parse_json(line)
        except ValueError:
            if number == len(lines):
                break
            raise ConfigError(f"{file}: line {number} is damaged; restore the file.") from None
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found
