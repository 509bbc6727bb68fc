"""One writer per output folder: a lock file names the process that holds it.

The kernel releases the lock when that process ends. The file is `.NAME.ceed-vla.lock` next to the
folder NAME: the folder itself stays new, empty and uploadable, and may be replaced as a whole. The
file is inside the folder if the folder is a mount point, which another container may see under
another name, or if its parent is not writable.

Without `flock` in the file system, and between machines, the record in the file decides: a lock is
free if its process on this machine has ended, or if the process of that number has another start
time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shlex
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ceed_vla import __version__
from ceed_vla.errors import ConfigError

PROGRAM = "ceed-vla "  # start of a lock's record, which marks the file as ours
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LONGEST_RECORD = 4096  # [bytes]
_LONGEST_COMMAND = 200  # [characters]
_LONGEST_NAME = 150  # [bytes] of a folder's name in that of its lock; a longer one is hashed
_ATTEMPTS = 100  # to lock a file that other processes may remove meanwhile


@dataclass(frozen=True)
class Holder:
    """A process that writes to a folder, as its lock file names it."""

    program: str  # with its version
    host: str
    boot: str  # boot ID of the host's kernel; may be empty
    process: int
    started: str  # start time in kernel ticks, which detects a reused number; may be empty
    since: str  # when the lock was taken
    command: str

    @classmethod
    def own(cls) -> Holder:
        """This process."""
        words = [Path(sys.argv[0]).name or "python", *sys.argv[1:]]
        return cls(
            program=f"{PROGRAM}{__version__}",
            host=socket.gethostname(),
            boot=_boot(),
            process=os.getpid(),
            started=_start_of(os.getpid()),
            since=datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
            command=shlex.join(words)[:_LONGEST_COMMAND],
        )

    @classmethod
    def read(cls, text: str) -> Holder | None:
        """Parse the text of a lock file; None for any other text."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict):
            return None
        known: dict[str, Any] = {item.name: values.get(item.name) for item in fields(cls)}
        for name, value in known.items():
            if type(value) is not (int if name == "process" else str):
                return None
        holder = cls(**known)
        return holder if holder.program.startswith(PROGRAM) else None

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since} ({self.command})"

    @property
    def is_near(self) -> bool:
        """Whether it runs under this kernel, in any container, or on a host of this name."""
        return self.host == socket.gethostname() or (self.boot != "" and self.boot == _boot())

    @property
    def is_gone(self) -> bool:
        """Whether the process has certainly ended; False for a process of another host."""
        if self.host != socket.gethostname():
            return False
        return self.boot != _boot() or self.started != _start_of(self.process)


@dataclass
class _Lock:
    """A lock that this process holds."""

    descriptor: int
    holds: int  # nested blocks that hold it
    made: list[Path]  # folders that were created for the file, innermost first


_held: dict[Path, _Lock] = {}  # by lock file


@contextmanager
def locked(folder: Path, what: str, part: str = "", *, launched: bool = False) -> Iterator[None]:
    """Hold the lock of an output folder; blocks of one process may be nested.

    A process that was forked from this one neither holds nor releases it.

    Args:
        folder: The folder, which need not exist.
        what: How an error names the folder, such as ``--output_dir is 'x'``.
        part: Name of the part to lock, if several processes write parts of the folder.
        launched: Whether torchrun or accelerate may have started several processes of one run;
            then the process of rank 0 holds the lock for all.

    Raises:
        ConfigError: Another process holds the lock, or the lock file cannot be written.
    """
    if launched and _rank() > 0:
        yield
        return
    file = lock_file(folder, part)
    if file in _held:
        _held[file].holds += 1
    else:
        try:
            _held[file] = _acquired(file, what)
        except OSError as error:
            why = f"its lock {file} cannot be written ({error.strerror})"
            remedy = "Make its folder writable, or name another."
            raise ConfigError(f"{what}; {why}. {remedy}") from error
    owner = os.getpid()
    try:
        yield
    finally:
        if owner == os.getpid():
            _release(file)


def lock_file(folder: Path, part: str = "") -> Path:
    """Path of a folder's lock file; the same for all links to the folder."""
    real = folder.resolve()
    name = real.name or "root"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    closed = real.is_dir() and not os.access(real.parent, os.W_OK)
    place = real if os.path.ismount(real) or closed else real.parent
    return place / ".".join(["", name, *([part] if part else []), "ceed-vla", "lock"])


def _acquired(file: Path, what: str) -> _Lock:
    """Lock `file` and write this process's record; `ConfigError` if another process holds it."""
    made: list[Path] = []
    for _ in range(_ATTEMPTS):
        made += _make(file.parent)
        try:
            # Do not follow a link, and do not block on a pipe, that others may have placed there.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(file, flags, 0o644)
        except FileNotFoundError:  # its new folder was removed by the process that made it
            continue
        try:
            alone = _flock(descriptor)
            if alone and not _is_at(descriptor, file):
                os.close(descriptor)  # the previous holder removed it just now
                continue
            _check(descriptor, file, what, alone)
            record = json.dumps(asdict(Holder.own())).encode()
            with suppress(OSError):  # on a full disk the lock holds without a record
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, record, 0)
        except BaseException:
            os.close(descriptor)
            _remove(made)
            raise
        return _Lock(descriptor, 1, made)
    raise OSError(errno.EAGAIN, "other processes keep removing it", str(file))


def _check(descriptor: int, file: Path, what: str, alone: bool | None) -> None:
    """Raise `ConfigError` if another process holds the lock file.

    `alone` is the result of `_flock`.
    """
    is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    text = os.pread(descriptor, _LONGEST_RECORD, 0).decode("utf-8", "replace") if is_file else "-"
    holder = Holder.read(text)
    if holder is None and text.strip("\0") and alone is not False:
        why = f"its lock {file} was not made by ceed-vla"
        raise ConfigError(f"{what}; {why}. Move that file, or name another folder.")
    if alone is False or (alone is None and holder and holder.is_near and not holder.is_gone):
        who = holder or f"its record is missing from {file}"
        raise ConfigError(
            f"{what}, and another process is writing there: {who}. Wait until it has ended, stop "
            "it, or name another folder."
        )
    if holder and not holder.is_near:
        raise ConfigError(
            f"{what}, where {holder} was writing; whether it still runs cannot be determined on "
            f"{socket.gethostname()}. If it has ended, remove {file}."
        )


def _release(file: Path) -> None:
    """End one nested hold of this process; the last one releases the lock."""
    lock = _held.get(file)
    if lock is None:
        return
    lock.holds -= 1
    if lock.holds:
        return
    del _held[file]
    with suppress(OSError):
        if _is_at(lock.descriptor, file):
            file.unlink()  # before the release: a process that opened it finds that it is gone
    os.close(lock.descriptor)
    _remove(lock.made)


def _forget() -> None:
    """Close the parent's locks in a forked process, so that they end with the parent."""
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _make(folder: Path) -> list[Path]:
    """Create a folder, and return all folders that had to be created, innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(folders: list[Path]) -> None:
    """Remove folders that are empty, so that a refused command leaves nothing behind."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _flock(descriptor: int) -> bool | None:
    """Whether the kernel grants this process the lock; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the path `file` still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False


def _rank() -> int:
    """Rank of this process in a launch of several; 0 without a launcher."""
    found = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    return int(found) if found.isdecimal() else 0


def _boot() -> str:
    """Boot ID of this machine's kernel; empty if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_of(process: int) -> str:
    """Start time of a process in kernel ticks; "gone" if it has ended, empty if unknown."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
        return status.rpartition(")")[2].split()[19]  # the name in brackets may contain spaces
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return "gone"
    except (OSError, IndexError):
        return ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return "gone"
    except (OSError, OverflowError):
        return ""
    return ""
