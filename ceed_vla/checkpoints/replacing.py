"""Replace folders as a whole: after a kill, either all files are the old ones or all are new.

The new folder is written next to the old one, and both change places in one system call. Linux can
do that (`renameat2` with ``RENAME_EXCHANGE``) on most file systems.

Elsewhere, and if the folder itself must stay, the new files are written into a subfolder. Renaming
the subfolder to `PENDING` is the atomic step. Then its files are moved up; after a kill, the next
save or load finishes that. A folder must stay if it is a mount point, contains this process's
working directory or folders of the user, or has a parent that is not writable.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from ceed_vla.errors import CheckpointError
from ceed_vla.files import read_json
from ceed_vla.folders import MANIFEST

PENDING = ".saved"
_STAGE = ".new"  # suffix of folders that are being written
_LONGEST = 100  # characters of the folder's name in the names of these
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EBUSY)


@contextmanager
def replacing_folder(folder: Path, belonging: Callable[[Path], set[str]]) -> Iterator[Path]:
    """Yield an empty folder to write into; it replaces `folder` if the block succeeds.

    The block must write a manifest.

    Args:
        folder: The folder to replace, which need not exist. If it is a link, the link stays, and
            its target is replaced.
        belonging: Returns the names of the files in a folder that are removed with the old content;
            other files stay.

    Raises:
        OSError: The folder cannot be written. Its old content stays.
    """
    if folder.is_symlink() and not folder.exists():
        raise FileNotFoundError(errno.ENOENT, "a link to nothing; name a folder", str(folder))
    target = Path(os.path.realpath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        finish_replacing(target, belonging)
    if not _is_writable(target if target.exists() else target.parent):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    beside = _may_be_exchanged(target)
    place = target.parent if beside else target
    _sweep(place, target.name)
    stage = place / f".{target.name[:_LONGEST]}.{token_hex(8)}{_STAGE}"
    stage.mkdir()
    lock = _hold(stage)
    try:
        yield stage
        for file in (*stage.iterdir(), stage):
            _settle(file)
        if not beside or not _exchanged(stage, target, belonging):
            _replace_inside(stage, target, belonging)
    finally:
        os.close(lock)
        shutil.rmtree(stage, ignore_errors=True)


def finish_replacing(folder: Path, belonging: Callable[[Path], set[str]]) -> None:
    """Finish a replacement in `folder` that a kill ended after its atomic step.

    Raises:
        CheckpointError: The folder cannot be written here, or no save of ours left what is in it.
    """
    pending = folder / PENDING
    if pending.is_symlink():  # the files of another folder would be moved
        raise CheckpointError(f"{pending} is a link, which no save leaves behind; remove it.")
    if not (pending / MANIFEST).is_file():
        return
    try:
        with _alone(folder):
            if (pending / MANIFEST).is_file():  # no other process has finished it meanwhile
                _move_up(pending, folder, belonging)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: a save was interrupted, and cannot be finished here ({error.strerror}). "
            "Load it once from a machine or account that can write to the folder."
        ) from error


def _is_writable(folder: Path) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)


def _may_be_exchanged(target: Path) -> bool:
    """Whether another folder can replace `target` without loss."""
    if not _is_writable(target.parent):
        return False
    if not target.exists():
        return True
    here = Path.cwd()
    if target.is_mount() or here == target or target in here.parents:
        return False
    return all(entry.is_symlink() or entry.is_file() for entry in os.scandir(target))


def _exchanged(stage: Path, target: Path, belonging: Callable[[Path], set[str]]) -> bool:
    """Exchange `stage` and `target`; return False if the system cannot do that."""
    if not target.exists():
        stage.rename(target)
        _settle(target.parent)
        return True
    old = belonging(target)
    for entry in os.scandir(target):
        if entry.name not in old and not (stage / entry.name).exists(follow_symlinks=False):
            link(Path(entry.path), stage / entry.name)
    shutil.copymode(target, stage)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(stage), os.fsencode(target))
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in _CANNOT:
            return False
        raise OSError(code, os.strerror(code), str(target))
    _settle(target.parent)
    return True


def _replace_inside(stage: Path, target: Path, belonging: Callable[[Path], set[str]]) -> None:
    pending = target / PENDING
    target.mkdir(exist_ok=True)
    with _alone(target):
        if pending.exists() and not (pending / MANIFEST).exists():
            shutil.rmtree(pending)  # left by a replacement whose files were all moved
        stage.rename(pending)
        _settle(target)
        _move_up(pending, target, belonging)


def _move_up(pending: Path, folder: Path, belonging: Callable[[Path], set[str]]) -> None:
    """Move the files of `pending` into `folder`, the manifest last, so that it can be repeated."""
    files = read_json(pending / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(
            f"{pending / MANIFEST} lists no files, so the interrupted save cannot be finished; "
            f"remove {pending}, or copy the checkpoint again."
        )
    new = {MANIFEST, *files}
    for name in belonging(folder) - new:
        (folder / name).unlink(missing_ok=True)
    names = sorted(os.listdir(pending), key=lambda name: name == MANIFEST)
    for name in names:
        with suppress(FileNotFoundError):  # another process may finish it at the same time
            os.replace(pending / name, folder / name)
            (pending / name).unlink()  # `replace` does nothing if both names are the same file
    _settle(folder)
    shutil.rmtree(pending, ignore_errors=True)


def link(old: Path, new: Path) -> None:
    """Make `new` a hard link to `old`, or a copy if the file system has no hard links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _hold(stage: Path) -> int:
    """Lock a folder until the returned descriptor is closed or the process ends."""
    number = os.open(stage, os.O_RDONLY)
    _locked(number)
    return number


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process moves files of a replacement up in `folder`, and keep others
    waiting; without locks (a file system that has none), do not wait.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _locked(number: int) -> bool:
    """Lock an open folder; return whether that succeeded."""
    try:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _sweep(place: Path, name: str) -> None:
    """Remove folders that killed replacements of `name` left in `place`; live ones are locked."""
    for left in place.glob(f".{glob.escape(name[:_LONGEST])}.{'[0-9a-f]' * 16}{_STAGE}"):
        with suppress(OSError):
            number = os.open(left, os.O_RDONLY)
            try:
                if _locked(number):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(number)


def _settle(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
