"""Bad inputs, each tried in a child process with limits of time and memory, and their outcomes."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ceed_vla.cli.flags import UsageError
from ceed_vla.errors import CeedVLAError

CASE_S = 60.0  # time limit of a case, for a busy machine [s]
MEMORY = 2**31  # memory limit of a case beyond that of the process [bytes]
LONGEST = 2000  # longest message that is readable [characters]


@dataclass
class Counts:
    """Outcomes of cases; all but the first three must stay 0."""

    cases: int = 0
    refused: int = 0  # with a `CeedVLAError`, in a few lines
    accepted: int = 0
    executed: int = 0  # code named in the input ran, or a file appeared next to it
    lost: int = 0  # a foreign file has changed
    hung: int = 0
    crashed: int = 0
    tracebacks: int = 0  # any other exception

    def add(self, other: Counts) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def __str__(self) -> str:
        return ", ".join(f"{value} {name}" for name, value in asdict(self).items())


@dataclass
class Failure:
    """A case that was neither refused nor harmless."""

    number: int
    what: str


def try_cases(
    count: int, case: Callable[[int], Any], outside: Path, mark: Path
) -> tuple[Counts, list[Failure]]:
    """Run ``case(0)`` ... ``case(count - 1)`` in children; a case that hangs or crashes is skipped.

    Args:
        count: Number of cases.
        case: Makes a bad input and reads it.
        outside: A file that no case may change.
        mark: A folder of the children in which nothing may appear.
    """
    counts, failures, first = Counts(cases=count), [], 0
    before = outside.read_bytes()
    while first < count:
        for number, end, what in _child(first, count, case, mark):
            if outside.read_bytes() != before:
                end, what = "lost", f"{outside} was changed"
                outside.write_bytes(before)
            if any(mark.iterdir()):
                end, what = "executed", f"{[file.name for file in mark.iterdir()]} appeared"
                for file in mark.iterdir():
                    file.unlink()
            setattr(counts, end, getattr(counts, end) + 1)
            if end not in ("refused", "accepted"):
                failures.append(Failure(number, f"{end}: {what}"))
            first = number + 1
    return counts, failures


def _child(
    first: int, count: int, case: Callable[[int], Any], mark: Path
) -> list[tuple[int, str, str]]:
    """Outcomes of cases from `first` to the last one, or to one that ended the child."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _run(first, count, case, mark, writing)
    os.close(writing)
    found: list[tuple[int, str, str]] = []
    rest = b""
    deadline = time.monotonic() + CASE_S
    hung = False
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            hung = True
            os.kill(child, signal.SIGKILL)
            break
        read = os.read(reading, 2**16)
        if not read:
            break
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            number, end, what = json.loads(line)
            found.append((number, end, what))
            deadline = time.monotonic() + CASE_S
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    after = found[-1][0] + 1 if found else first
    if hung:
        found.append((after, "hung", f"no answer in {CASE_S:g} s"))
    elif after < count:
        found.append((after, "crashed", f"its process ended with status {status}"))
    return found


def _run(first: int, count: int, case: Callable[[int], Any], mark: Path, writing: int) -> None:
    """Run the cases in the child."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(mark)
    for number in range(first, count):
        end, what = "accepted", ""
        try:
            case(number)
        except (CeedVLAError, UsageError) as error:
            end, what = "refused", str(error)
            if len(what) >= LONGEST:
                end = "tracebacks"  # too long to be read
        except BaseException as error:
            end, what = "tracebacks", f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps([number, end, what[:500]]).encode() + b"\n")
    os._exit(0)
