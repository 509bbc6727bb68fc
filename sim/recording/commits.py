"""Commit points of a growing data set: all that is on disk belongs to the last commit, or can be undone.

`recording.json` is replaced atomically at the end of every commit and names all its parquet files. The few
files of `meta/` that a commit rewrites are copied first; going back then only renames and deletes, which also
works on a full disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ceed_vla.errors import DatasetError

PROGRESS_FILE = "recording.json"
WORK_FOLDER = ".recording"
_META_FILES = ("info.json", "stats.json", "tasks.parquet")


def is_recording(root: Path) -> bool:
    """Whether `root` holds a data set (possibly still empty) that can be continued."""
    return (root / PROGRESS_FILE).is_file() and (root / "meta").is_dir()


def read_progress(root: Path) -> dict[str, Any]:
    """The last committed `recording.json`.

    Raises:
        DatasetError: Missing or unreadable.
    """
    path = root / PROGRESS_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); only a root written by `ceed-vla record` can be resumed. "
            "Record into a new root"
        ) from error


def write_progress(root: Path, total_episodes: int, progress: Mapping[str, Any]) -> None:
    """The commit point: declare everything now in `data/` and `meta/` valid."""
    record = {
        "total_episodes": total_episodes,
        "files": sorted(str(path.relative_to(root)) for path in _parquet_files(root)),
        "progress": dict(progress),
    }
    temporary = root / f"{PROGRESS_FILE}.tmp"
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, root / PROGRESS_FILE)


def begin_commit(root: Path, total_episodes: int) -> None:
    """Copy what the commit is about to rewrite. `total_episodes` are those before the commit."""
    folder = root / WORK_FOLDER / "backup"
    folder.mkdir(parents=True, exist_ok=True)
    present = [name for name in _META_FILES if (root / "meta" / name).is_file()]
    for name in present:
        shutil.copy2(root / "meta" / name, folder / name)
    temporary = folder / "marker.tmp"
    temporary.write_text(json.dumps({"total_episodes": total_episodes, "files": present}))
    os.replace(temporary, folder / "marker.json")


def end_commit(root: Path) -> None:
    """Drop the copies; the commit point has been passed."""
    (root / WORK_FOLDER / "backup" / "marker.json").unlink(missing_ok=True)


def undo_incomplete_commit(root: Path) -> None:
    """Return to the last commit point; does nothing if it is the newest state. May itself be interrupted.

    Raises:
        DatasetError: `recording.json` is unreadable.
    """
    committed = read_progress(root)
    backup = root / WORK_FOLDER / "backup"
    marker = backup / "marker.json"
    if marker.is_file():
        before = json.loads(marker.read_text())
        if before["total_episodes"] == committed["total_episodes"]:
            for name in _META_FILES:
                if name not in before["files"]:
                    (root / "meta" / name).unlink(missing_ok=True)
                elif (backup / name).is_file():
                    os.replace(backup / name, root / "meta" / name)
    for path in _parquet_files(root):
        if str(path.relative_to(root)) not in committed["files"]:
            path.unlink()
    end_commit(root)


def _parquet_files(root: Path) -> list[Path]:
    return [*root.glob("data/*/*.parquet"), *root.glob("meta/episodes/*/*.parquet")]
