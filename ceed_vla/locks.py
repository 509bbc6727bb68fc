"""One writer of an output folder: a lock file names its process, and the kernel frees it with that.

The file is `.NAME.ceed-vla.lock` beside the folder NAME: the folder itself stays new, empty and
uploadable, and may be replaced as a whole. It is inside where the folder is a mount point, which
another container sees under another name, or where nothing can be written beside it.

Where the file system has no `flock`, and between machines, the record in the file decides: a
process of this machine that is gone, or that has another start time, holds nothing.
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

PROGRAM = "ceed-vla "  # with which the record of a lock begins to say whose it is
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LONGEST_RECORD = 4096  # [bytes]
_LONGEST_COMMAND = 200  # [characters]
_LONGEST_NAME = 150  # [bytes] of a folder that names its lock; a longer one is hashed
_ATTEMPTS = 100  # to lock a file that others remove meanwhile


@dataclass(frozen=True)
class Holder:
    """A process that writes to a folder, as its lock file names it."""

    program: str  # with its version
    host: str
    boot: str  # of the host's kernel; empty where it has no name
    process: int
    started: str  # start time in the kernel's clock, which tells a reused number; may be empty
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
        """The holder that a lock file names; None for any other text."""
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
        """Whether it runs under this kernel, in whatever container, or on a host of this name."""
        return self.host == socket.gethostname() or (self.boot != "" and self.boot == _boot())

    @property
    def is_gone(self) -> bool:
        """Whether this host knows that the process has ended."""
        if self.host != socket.gethostname():
            return False
        return self.boot != _boot() or self.started != _start_of(self.process)


@dataclass
class _Lock:
    """A lock that this process holds."""

    descriptor: int
    holds: int  # nested blocks that hold it
    made: list[Path]  # folders that were made for the file, the innermost first


_held: dict[Path, _Lock] = {}  # by lock file


@contextmanager
def locked(folder: Path, what: str, part: str = "", *, launched: bool = False) -> Iterator[None]:
    """Hold the lock of an output folder; blocks of one process may be nested.

    A process that was forked from this one neither holds nor releases it.

    Args:
        folder: The folder, which need not exist.
        what: How an error names the folder, such as ``--output_dir is 'x'``.
        part: Of the folder's files, where several processes write parts of it.
        launched: Whether torchrun or accelerate may have started several processes of one run;
            then the first one holds the lock for all.

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
    """Where the lock of a folder lies; the same by whatever links the folder is named."""
    real = folder.resolve()
    name = real.name or "root"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    closed = real.is_dir() and not os.access(real.parent, os.W_OK)
    place = real if os.path.ismount(real) or closed else real.parent
    return place / ".".join(["", name, *([part] if part else []), "ceed-vla", "lock"])


def _acquired(file: Path, what: str) -> _Lock:
    """The lock of `file`, with this process's record in it; `ConfigError` if another holds it."""
    made: list[Path] = []
    for _ in range(_ATTEMPTS):
        made += _make(file.parent)
        try:
            # Neither a link nor a pipe that somebody put there is followed or waited for.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(file, flags, 0o644)
        except FileNotFoundError:  # its new folder was removed by the process that made it
            continue
        try:
            alone = _flock(descriptor)
            if alone and not _is_at(descriptor, file):
                os.close(descriptor)  # the process before removed it just now
                continue
            _check(descriptor, file, what, alone)
            record = json.dumps(asdict(Holder.own())).encode()
            with suppress(OSError):  # on a full disk the lock holds without a name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, record, 0)
        except BaseException:
            os.close(descriptor)
            _remove(made)
            raise
        return _Lock(descriptor, 1, made)
    raise OSError(errno.EAGAIN, "other processes remove it all the time", str(file))


def _check(descriptor: int, file: Path, what: str, alone: bool | None) -> None:
    """Raise `ConfigError` if another process holds the lock file.

    `alone` says whether `flock` gave it to this process; None where the file system has none.
    """
    is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    text = os.pread(descriptor, _LONGEST_RECORD, 0).decode("utf-8", "replace") if is_file else "-"
    holder = Holder.read(text)
    if holder is None and text.strip("\0") and alone is not False:
        why = f"its lock {file} was not made by ceed-vla"
        raise ConfigError(f"{what}; {why}. Move that file, or name another folder.")
    if alone is False or (alone is None and holder and holder.is_near and not holder.is_gone):
        who = holder or f"one that left no name in {file}"
        raise ConfigError(
            f"{what}, and another process is writing there: {who}. Wait until it has ended, stop "
            "it, or name another folder."
        )
    if holder and not holder.is_near:
        raise ConfigError(
            f"{what}, where {holder} was writing; whether it still does cannot be seen from "
            f"{socket.gethostname()}. If it does not, remove {file}."
        )


def _release(file: Path) -> None:
    """End one hold of this process, and with the last one the lock."""
    lock = _held.get(file)
    if lock is None:
        return
    lock.holds -= 1
    if lock.holds:
        return
    del _held[file]
    with suppress(OSError):
        if _is_at(lock.descriptor, file):
            file.unlink()  # while it is held: a process that waits for it finds that it is gone
    os.close(lock.descriptor)
    _remove(lock.made)


def _forget() -> None:
    """In a forked process: the locks are its parent's, also after that has been killed."""
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _make(folder: Path) -> list[Path]:
    """Make a folder, and return those that had to be made, the innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(folders: list[Path]) -> None:
    """Remove folders that are empty: a command that was refused leaves nothing."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _flock(descriptor: int) -> bool | None:
    """Whether the kernel gives this process the lock; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether `file` is still what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False


def _rank() -> int:
    """The number of this process among those of one launch; 0 without one."""
    found = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    return int(found) if found.isdecimal() else 0


def _boot() -> str:
    """What names the present run of this machine's kernel; empty where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_of(process: int) -> str:
    """When a process started, in the kernel's ticks; "gone" for none, empty if it is not known."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
        return status.rpartition(")")[2].split()[19]  # a name in brackets may hold spaces
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
