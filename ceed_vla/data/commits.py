"""Commit points of a growing data set: all that is on disk belongs to the last commit, or can be
undone.

`recording.json` is replaced atomically at the end of every commit and names all its parquet files.
The few files of `meta/` that a commit rewrites are copied first, the parquet files that it adds are
named; going back then only renames and deletes these, which also works on a full disk.
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
_EPISODE_FILE = re.compile(r"(data|meta/episodes)/chunk-\d{3,}/file-\d{3,}\.parquet")


def is_recording(root: Path) -> bool:
    """Whether `root` holds a data set (possibly still empty) that can be continued."""
    return (root / PROGRESS_FILE).is_file() and (root / "meta").is_dir()


def read_progress(root: Path) -> dict[str, Any]:
    """The last committed `recording.json`: ``total_episodes``, ``files`` and the caller's
    ``progress``.
    """
    record = read_json(root / PROGRESS_FILE, DatasetError)
    counted = fits(record.get("total_episodes"), int, Interval("[0, inf)"))
    if not (
        _are_episode_files(record.get("files")) and counted and fits(record.get("progress"), dict)
    ):
        raise DatasetError(
            f"{root / PROGRESS_FILE} is damaged: its files, total_episodes or progress are not "
            "what `ceed-vla record` writes. Record into a new root."
        )
    return record


def meta_files(folder: Path) -> list[Path]:
    """Those of a data set's `meta/` that every commit rewrites, or their copies."""
    return [folder / name for name in _META_FILES if (folder / name).is_file()]


def write_progress(
    root: Path, total_episodes: int, files: Sequence[str], progress: Mapping[str, Any]
) -> None:
    """The commit point: declare the parquet `files` and all that is in `meta/` valid, and drop the
    copies.
    """
    record = {"total_episodes": total_episodes, "files": sorted(files), "progress": dict(progress)}
    write_text(root / PROGRESS_FILE, json.dumps(record, indent=1))
    _marker(root).unlink(missing_ok=True)


def begin_commit(root: Path, total_episodes: int, adding: list[str]) -> None:
    """Copy what the commit is about to rewrite, and name the parquet files that it adds.

    `total_episodes` are those before the commit.
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
    """Return to the last commit point, if that is not the newest state; gives the parquet files.
    May be interrupted.

    Only what the incomplete commit has added is deleted. Whatever else is there makes `root` no
    recording of ours, a `DatasetError`; so do damaged bookkeeping, links, and parquet files that
    are missing.
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
        for folder in ("data", "meta/episodes")
        for path in (root / folder).rglob("*")
        if path.is_file()
    ]
    there = {path.relative_to(root).as_posix() for path in stored} - added
    for what, names in (
        ("lacks", set(known) - there),
        ("holds files that it does not know:", there - set(known)),
    ):
        if names:
            raise DatasetError(
                f"{root} {what} {_listed(sorted(names))}. Bring the folder back to what `ceed-vla "
                "record` left there, or record into a new root; nothing was changed."
            )
    if incomplete:
        # put back before an interrupt
        kept = backup if (backup / "info.json").is_file() else root / "meta"
        info = read_json(kept / "info.json", DatasetError) if "info.json" in marker["files"] else {}
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
    """What says that a commit has begun, beside its copies."""
    return root / WORK_FOLDER / "backup" / "marker.json"


def _read_marker(file: Path) -> dict[str, Any]:
    marker: dict[str, Any] = {"adding": [], **read_json(file, DatasetError)}
    whole = fits(marker.get("total_episodes"), int) and fits(marker.get("files"), list[str])
    # Only the first commit finds no statistics and no tasks there; what is not listed is deleted.
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
