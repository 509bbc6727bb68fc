"""Runs the cases of the fuzz tests, and counts their outcomes."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpus import Counts, try_cases
from tests.helpers.mutations import damage

# To run more cases than the suite, and to write their outcomes to a file:
# FUZZ_FACTOR=20 FUZZ_SEED=1 FUZZ_REPORT=counts.txt pytest -n 0 --timeout 0 tests/test_fuzz*.py
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
OFFSET = 1000 * int(os.environ.get("FUZZ_SEED", "0"))
TOTAL: dict[str, Counts] = {}


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that connects to anything."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))


def write_report() -> None:
    """Write the outcomes of all cases so far to the file FUZZ_REPORT, if set."""
    file = os.environ.get("FUZZ_REPORT")
    if not file:
        return
    total = Counts()
    for counts in TOTAL.values():
        total.add(counts)
    lines = [f"{kind}: {counts}" for kind, counts in {**TOTAL, "all": total}.items()]
    Path(file).write_text("\n".join(lines) + "\n")


def run_cases(
    good: Path, names: list[str], read: Callable[[Path], Any], tmp_path: Path, count: int, seed: int
) -> int:
    """Damage a copy of `good` `count` times and read it; return the number of refusals."""
    victim = tmp_path / "victim"
    mark = tmp_path / "mark"
    folder = tmp_path / "place" / "folder"
    victim.write_text("mine")
    mark.mkdir()

    def case(number: int) -> None:
        source = random.Random(f"{seed + OFFSET} {number}")
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(good, folder)
        damage(folder / source.choice(names), source)
        read(folder)

    return counted(tmp_path.name.rstrip("0123456789"), count * FACTOR, case, victim, mark) // FACTOR


def counted(kind: str, count: int, case: Callable[[int], Any], victim: Path, mark: Path) -> int:
    """Try cases, count their outcomes, and fail if one was neither refused nor harmless."""
    counts, failures = try_cases(count, case, victim, mark)
    TOTAL.setdefault(kind, Counts()).add(counts)
    assert not failures, f"{counts}\n" + "\n".join(
        f"case {f.number}: {f.what}" for f in failures[:5]
    )
    found = sorted(str(path.relative_to(victim.parent)) for path in victim.parent.iterdir())
    assert set(found) <= {"place", "victim", "mark"}, "something was written outside the folder"
    return counts.refused
