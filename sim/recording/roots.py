"""Removal of a new dataset folder if recording fails before anything is stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ceed_vla.data.commits import PROGRESS_FILE, WORK_FOLDER, read_progress

_OF_AN_EMPTY_SET = (PROGRESS_FILE, "meta/info.json")


@contextmanager
def removed_while_empty(root: Path) -> Iterator[None]:
    """Remove what this process wrote to a new `root` if the block fails before an attempt is
    stored.

    A folder that was not empty before is never touched, and an empty one that existed stays. A
    folder that has attempts, or a file that an empty dataset does not have, is not touched either.
    """
    existed = root.exists()
    is_new = not (existed and any(root.iterdir()))
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # the error that ended the block matters more
                _remove_empty(root)
                if existed:
                    root.mkdir(exist_ok=True)
        raise


def _remove_empty(root: Path) -> None:
    """Remove a dataset without attempts; any other folder is unchanged."""
    if not root.is_dir() or root.is_symlink() or not _is_empty(root):
        return
    below = sorted(root.rglob("*"), key=lambda path: len(path.parts), reverse=True)
    for path in [*below, root]:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


def _is_empty(root: Path) -> bool:
    """Whether a folder contains only the files of a dataset without attempts."""
    files = [
        path.relative_to(root) for path in root.rglob("*") if path.is_symlink() or not path.is_dir()
    ]
    for file in files:
        if file.as_posix() not in _OF_AN_EMPTY_SET and file.parts[0] != WORK_FOLDER:
            return False
    if not (root / PROGRESS_FILE).is_file():
        return True
    record = read_progress(root)
    return not record["total_episodes"] and not record["progress"].get("attempts")
