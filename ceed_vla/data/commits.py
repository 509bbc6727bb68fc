"""Commit points of a growing dataset: every file belongs to the last commit or can be undone.

`recording.json` is replaced atomically at the end of every commit and names all parquet files and
videos. A commit starts with a copy of the few files in `meta/` that it rewrites, and a list of the
files that it adds. Undoing it only renames and deletes these, which also works on a full disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ceed_vla.errors import DatasetError
from ceed_vla.fields import Interval, fits
from ceed_vla.files import read_json, settle, strange, write_text

PROGRESS_FILE = "recording.json"
WORK_FOLDER = ".recording"
_META_FILES = ("info.json", "stats.json", "tasks.parquet")
_EPISODE_FILE = re.compile(
    r"(data|meta/episodes)/chunk-\d{3,}/file-\d{3,}\.parquet"
    r"|videos/[\w.-]+/chunk-\d{3,}/file-\d{3,}\.mp4"
)


def is_recording(root: Path) -> bool:
    """Whether `root` holds a dataset (possibly still empty) that can be continued."""
    return (root / PROGRESS_FILE).is_file() and (root / "meta").is_dir()


def read_progress(root: Path) -> dict[str, Any]:
    """Read the last `recording.json`: ``total_episodes``, ``files``, the caller's ``progress``."""
    record = read_json(root / PROGRESS_FILE, DatasetError)
    counted = fits(record.get("total_episodes"), int, Interval("[0, inf)"))
    if not (
        _are_episode_files(record.get("files")) and counted and fits(record.get("progress"), dict)
    ):
        raise DatasetError(
            f"{root / PROGRESS_FILE} is damaged: its files, total_episodes or progress are not of "
            "the form that `ceed-vla record` writes. Record into a new root."
        )
    return record


def meta_files(folder: Path) -> list[Path]:
    """The files in `folder` (`meta/` or its backup) that every commit rewrites."""
    return [folder / name for name in _META_FILES if (folder / name).is_file()]


def write_progress(
    root: Path, total_episodes: int, files: Sequence[str], progress: Mapping[str, Any]
) -> None:
    """End a commit: the `files` and all of `meta/` become valid, the copies invalid."""
    record = {"total_episodes": total_episodes, "files": sorted(files), "progress": dict(progress)}
    write_text(root / PROGRESS_FILE, json.dumps(record, indent=1))
    _marker(root).unlink(missing_ok=True)


def begin_commit(root: Path, total_episodes: int, adding: list[str]) -> None:
    """Begin a commit: copy the files that it will rewrite, and store the names of those it adds.

    `total_episodes` is the number before the commit.
    """
    marker = _marker(root)
    marker.parent.mkdir(parents=True, exist_ok=True)
    present = [file.name for file in meta_files(root / "meta")]
    for name in present:
        shutil.copy2(root / "meta" / name, marker.parent / name)
    settle(*meta_files(marker.parent))
    write_text(
        marker, json.dumps({"total_episodes": total_episodes, "files": present, "adding": adding})
    )


def undo_incomplete_commit(root: Path) -> list[str]:
    """Return to the last commit point if a commit is incomplete; this may be interrupted, too.

    Only files that the incomplete commit added are deleted.

    Returns:
        The files of the last commit.

    Raises:
        DatasetError: `root` holds other files, links or damaged bookkeeping, or lacks files, so
            that it is not a recording of ours.
    """
    if links := sorted(str(path.relative_to(root)) for path in strange(root)):
        raise DatasetError(
            f"{root} holds links or pipes ({_listed(links)}), through which recording would write "
            "elsewhere; put the files themselves there."
        )
    committed = read_progress(root)
    known: list[str] = committed["files"]
    backup = _marker(root).parent
    marker = _read_marker(_marker(root)) if _marker(root).is_file() else {}
    incomplete = marker.get("total_episodes") == committed["total_episodes"]
    added = set(marker["adding"]) - set(known) if incomplete else set()
    stored = [
        path
        for folder in ("data", "meta/episodes", "videos")
        for path in (root / folder).rglob("*")
        if path.is_file()
    ]
    there = {path.relative_to(root).as_posix() for path in stored} - added
    for what, names in (
        ("lacks", set(known) - there),
        (f"holds files that {PROGRESS_FILE} does not list:", there - set(known)),
    ):
        if names:
            raise DatasetError(
                f"{root} {what} {_listed(sorted(names))}. Restore the folder as `ceed-vla record` "
                "left it, or record into a new root; nothing was changed."
            )
    if incomplete:
        # an interrupted undo may have restored the file already
        place = backup if (backup / "info.json").is_file() else root / "meta"
        info = (
            read_json(place / "info.json", DatasetError) if "info.json" in marker["files"] else {}
        )
        if info.get("total_episodes", 0) != marker["total_episodes"]:
            raise DatasetError(
                f"{backup} is of another commit than its marker; record into a new root."
            )
        for name in _META_FILES:
            if name not in marker["files"]:
                (root / "meta" / name).unlink(missing_ok=True)
            elif (backup / name).is_file():
                os.replace(backup / name, root / "meta" / name)
        for name in added:
            (root / name).unlink(missing_ok=True)
    _marker(root).unlink(missing_ok=True)
    return known


def _marker(root: Path) -> Path:
    """The file that marks the begin of a commit, next to its copies."""
    return root / WORK_FOLDER / "backup" / "marker.json"


def _read_marker(file: Path) -> dict[str, Any]:
    marker: dict[str, Any] = {"adding": [], **read_json(file, DatasetError)}
    whole = fits(marker.get("total_episodes"), int) and fits(marker.get("files"), list[str])
    # Only before the first commit are statistics and tasks missing; files not listed are deleted.
    whole = whole and {"info.json", *(_META_FILES if marker["total_episodes"] else ())} <= {
        *marker["files"]
    }
    if not (whole and _are_episode_files(marker["adding"])):
        raise DatasetError(
            f"{file} is damaged, so an interrupted commit cannot be undone. Record into a new root."
        )
    return marker


def _are_episode_files(names: Any) -> bool:
    return fits(names, list[str]) and all(map(_EPISODE_FILE.fullmatch, names))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
