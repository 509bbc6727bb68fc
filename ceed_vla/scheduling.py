"""Which cores threads run on, and before which other threads.

A robot decodes, waits for a camera and decodes again. After such a pause the scheduler sometimes
wakes two threads of one forward on the same core, which doubles its time. A `Placement` gives every
thread a core of its own. Linux only; elsewhere, and where a core would have to be shared with
others, threads stay with the scheduler.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO

from ceed_vla.errors import ConfigError
from ceed_vla.fields import THREADS, Interval, fits, short

logger = logging.getLogger(__name__)

PIN_HELP = "auto, none, or one core for each thread, such as 2,3"
_PIN = re.compile(r"auto|none|\d{1,4}(,\d{1,4})*")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_CGROUPS = Path("/sys/fs/cgroup")

_uses: Counter[int] = Counter()  # core -> placements of this process on it
_claims: dict[int, IO[str]] = {}  # core -> the file whose lock tells other processes
_of_torch = threading.local()  # `placement` of the thread that called `place_torch`


class Placement:
    """The cores of one engine's threads.

    Args:
        threads: Number of threads; 0 for one per core that this process may use.
        pin: "auto", "none", or one core for each thread, separated by commas. With "auto" nothing
            is pinned if there is one thread, if there are more threads than cores, if a quota
            limits the process to fewer cores than it may run on, or if other processes of this user
            hold the cores.

    Attributes:
        threads: Number of threads, at least 1.
        cores: The core of every thread, first that of the thread that decodes; empty if threads are
            not pinned.

    Raises:
        ConfigError: `threads` or `pin` is invalid, or names a core that this machine lacks.
    """

    def __init__(self, threads: int = 0, pin: str = "auto") -> None:
        if problem := pin_problem(pin):
            raise ConfigError(f"pin is {problem}.")
        if not fits(threads, int, Interval(THREADS)):
            raise ConfigError(f"threads is {short(threads)}; it must be in {THREADS}.")
        usable = usable_cores()
        limit = quota()
        available = len(usable) if limit is None else max(1, min(len(usable), int(limit)))
        self.threads = threads or (available if pin in ("auto", "none") else pin.count(",") + 1)
        self.cores: tuple[int, ...] = ()
        if threads > available:
            _say_once(
                f"threads is {self.threads}, but this process may use {_cores(available)}; "
                "more threads than cores make a forward slower.",
                logging.WARNING,
            )
        if pin == "none" or (pin == "auto" and self.threads == 1):
            return
        if not hasattr(os, "sched_setaffinity"):
            _say_once("Threads are not pinned to cores: this system cannot do that.")
        elif pin != "auto":
            self.cores = _named_cores(pin, self.threads)
        elif self.threads > available or available < len(usable):
            _say_once(
                f"Threads are not pinned to cores: {self.threads} threads share {_cores(available)}"
                f" of the {len(usable)} that this process may run on."
            )
        else:
            self.cores = _claim(usable, self.threads)
        weakref.finalize(self, _release, self.cores)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Run the calling thread on the first core; afterwards where it ran before.

        Threads and processes that it starts meanwhile stay on that core.
        """
        if not self.cores:
            yield
            return
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {self.cores[0]})
        except OSError as error:  # the cores of a container may change while it runs
            _say_once(
                f"Core {self.cores[0]} cannot be used any more ({error.strerror}); the calling "
                "thread is no longer pinned. Load the policy again.",
                logging.WARNING,
            )
            self.cores = ()
            yield
            return
        try:
            yield
        finally:
            with suppress(OSError):  # these cores are gone as well; the system chose others
                os.sched_setaffinity(0, before)


def place_torch(threads: int | None, pin: str = "auto") -> None:
    """Set torch's number of threads and, on a CPU, pin those that it starts for the calling thread.

    Call it before other work with torch; threads that exist already stay with the scheduler.

    Args:
        threads: Number of threads; 0 for one per core, None for torch's default, at most one per
            core, or for as many as `pin` names.
        pin: See `Placement`.

    Raises:
        ConfigError: See `Placement`.
    """
    import torch

    _of_torch.placement = None
    if threads is None:
        usual = pin in ("auto", "none")
        threads = min(torch.get_num_threads(), Placement(0, "none").threads) if usual else 0
    placement = Placement(threads, pin)
    torch.set_num_threads(placement.threads)
    if not placement.cores:
        return
    before = _threads()
    torch.ones(placement.threads * 2**16).add_(1)  # starts the threads
    new = sorted(_threads() - before)
    if len(new) != placement.threads - 1:
        _say_once("Threads of torch are not pinned to cores: they were started before.")
        return
    for thread, core in zip(new, placement.cores[1:], strict=True):
        os.sched_setaffinity(thread, {core})
    _of_torch.placement = placement


@contextmanager
def torch_pinned() -> Iterator[None]:
    """Run the calling thread on its core if `place_torch` pinned torch's threads for it."""
    placement = getattr(_of_torch, "placement", None)
    with placement.pinned() if placement else nullcontext():
        yield


def _threads() -> set[int]:
    """The system's ids of all threads of this process."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def pin_problem(pin: object) -> str | None:
    """What is wrong with `Placement`'s `pin`; None if its form is right."""
    if isinstance(pin, str) and _PIN.fullmatch(pin):
        return None
    return f"{short(pin)}; it must be {PIN_HELP}"


def raise_priority(priority: int, *, only_this_thread: bool, second: int | None = None) -> str:
    """Schedule the threads of this process before all threads without real-time priority.

    ros2_control's manager does the same. Threads and processes that start later do not inherit it.

    Args:
        priority: Priority of SCHED_FIFO, from 1 up; 0 changes nothing.
        only_this_thread: Whether only the calling thread gets the priority.
        second: A thread that gets a priority one lower. Commands then need not wait for its work,
            and other processes cannot interrupt it while it has the interpreter's lock.

    Returns:
        How the calling thread is scheduled now, with the reason if real-time priority failed.
    """
    if not priority:
        return "normal"
    if not hasattr(os, "sched_setscheduler"):
        return "normal (this system has no SCHED_FIFO)"
    threads = [0] if only_this_thread else [int(name) for name in os.listdir("/proc/self/task")]
    try:
        for thread in threads:
            level = max(priority - 1, 1) if thread == second else priority
            with suppress(ProcessLookupError):  # it has ended since
                os.sched_setscheduler(
                    thread, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(level)
                )
    except OSError as error:
        return f"normal (no real-time priority: {error.strerror})"
    return f"fifo {priority}"


@cache
def usable_cores() -> tuple[int, ...]:
    """One logical processor of every physical core that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    first: dict[str, int] = {}  # the processors of a core -> the first that may be used
    for processor in sorted(os.sched_getaffinity(0)):
        first.setdefault(_text(Path(_TOPOLOGY.format(processor))) or str(processor), processor)
    return tuple(first.values())


def quota() -> float | None:
    """The CPU time that the container grants to this process, in cores; None without a limit."""
    own = [
        line.partition("::/")[2]
        for line in _text(Path("/proc/self/cgroup")).splitlines()
        if line.startswith("0::/")
    ]
    group = _CGROUPS / (own[0] if own else "")
    limits = []
    for folder in (group, *group.parents):
        runtime, _, period = _text(folder / "cpu.max").partition(" ")
        limits.append((runtime, period))
        if folder == _CGROUPS:
            break
    old = _CGROUPS / "cpu"
    limits.append((_text(old / "cpu.cfs_quota_us"), _text(old / "cpu.cfs_period_us")))
    cores = [int(a) / int(b) for a, b in limits if a.isdigit() and b.isdigit() and int(b)]
    return min(cores, default=None)


def _named_cores(pin: str, threads: int) -> tuple[int, ...]:
    """The cores that a setting names; raises `ConfigError` if they do not fit."""
    cores = tuple(map(int, pin.split(",")))
    if len(set(cores)) != threads:
        raise ConfigError(
            f"pin is {pin}, threads is {threads}; name a different core for each thread, or use "
            "auto."
        )
    before = os.sched_getaffinity(0)
    for core in cores:
        try:
            os.sched_setaffinity(0, {core})
        except OSError as error:
            raise ConfigError(
                f"pin is {pin}; core {core} cannot be used ({error.strerror}). Choose among "
                f"{', '.join(map(str, sorted(before)))}, or use auto."
            ) from error
        finally:
            os.sched_setaffinity(0, before)
    for core in cores:
        _hold(core)  # so that others with "auto" avoid it; who holds it already may share it
    _uses.update(cores)
    return cores


def _claim(usable: Sequence[int], threads: int) -> tuple[int, ...]:
    """Cores for that many threads, first those that no engine of this process uses; none if other
    processes hold too many of them.
    """
    cores: list[int] = []
    for core in sorted(usable, key=lambda core: _uses[core]):
        if len(cores) < threads and _hold(core):
            cores.append(core)
    if len(cores) < threads:
        _release(())  # what was locked above
        _say_once("Threads are not pinned to cores: other processes decode on them.")
        return ()
    _uses.update(cores)
    return tuple(cores)


def _hold(core: int) -> bool:
    """Whether this process holds a core now. The lock ends with the process."""
    import fcntl

    if core in _claims:
        return True

    folder = Path(tempfile.gettempdir()) / f"ceed_vla-cores-{os.getuid()}"
    try:
        folder.mkdir(exist_ok=True)
        file = (folder / str(core)).open("w")
    except OSError:
        return True  # where nothing can be written, no other process can hold it either
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    _claims[core] = file
    return True


def _release(cores: Sequence[int]) -> None:
    """Give cores back, and the locks of all cores that no placement uses."""
    _uses.subtract(cores)
    for core in [core for core in _claims if _uses[core] <= 0]:
        _claims.pop(core).close()


@cache
def _say_once(text: str, level: int = logging.INFO) -> None:
    logger.log(level, text)


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _text(path: Path) -> str:
    """The stripped content of a file of the system; "" if it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
