"""Processes that share work: ordered results, original errors, discovered packages, clean exit."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shared_work import make

from ceed_vla import discovery, workers
from ceed_vla.errors import CeedVLAError, TokenError
from ceed_vla.workers import Workers


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests need neither torch nor LeRobot."""
    monkeypatch.setattr(workers, "PRELOADED", [])


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_errors_as_they_are(count: int) -> None:
    before = set(multiprocessing.active_children())
    with Workers(count, make, 100) as pool:
        assert [value for value, _ in pool.map(range(12))] == list(range(100, 112))
        assert [value for value, _ in pool.map([])] == []
        with pytest.raises(TokenError, match="item -1 is none"):
            list(pool.map([3, -1, 4]))
        assert [value for value, _ in pool.map(iter([5]))] == [105]
    assert set(multiprocessing.active_children()) <= before


READING = """
from shared_work import reader
from ceed_vla import workers
if __name__ == "__main__":
    workers.PRELOADED = []
    with workers.Workers(2, reader) as pool:
        print(list(pool.map([0])))
"""


def test_a_worker_reads_no_input(tmp_path: Path) -> None:
    """A library that prompts reads the end of standard input, even if the command has input."""
    script = tmp_path / "reading.py"
    script.write_text(READING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, input="yes\n" * 100, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split("\n")[0] == "[(b'', '')]"


def test_processes_import_what_was_discovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package_of_a_user.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(discovery, "_discovered", {"package_of_a_user"})
    with Workers(2, make, 0) as pool:
        assert list(pool.map([1])) == [(1, True)]


def test_a_process_that_dies_is_an_error_and_nothing_is_left() -> None:
    before = set(multiprocessing.active_children())  # processes of other tests
    with pytest.raises(CeedVLAError, match="died"), Workers(2, make, 0) as pool:
        list(pool.map([1, -2, 3]))
    with pytest.raises(KeyboardInterrupt), Workers(2, make, 0) as pool:  # noqa: PT012
        next(pool.map(range(1000)))
        raise KeyboardInterrupt
    left = set(multiprocessing.active_children()) - before
    for process in left:
        process.join(30)
    assert not any(process.is_alive() for process in left)


def test_an_answer_that_a_dead_process_was_writing_holds_nothing_up() -> None:
    with pytest.raises(KeyboardInterrupt), Workers(2, make, 0) as pool:  # noqa: PT012
        next(pool.map(range(10)))
        pool._pool._result_queue._wlock.acquire()  # as if it was killed while it wrote
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 60


KILLED = """
import multiprocessing
import os
import subprocess
import sys
import time
from shared_work import make, reader
from ceed_vla import workers
from ceed_vla.workers import Workers
workers.PRELOADED = []
if __name__ == "__main__":
    with Workers(2, make, 0) as workers:
        found = workers.map(range(10**6))
        next(found)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        list(found)
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(KILLED)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests' / 'helpers'}"}
    command = [sys.executable, str(tmp_path / "main.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    end = time.monotonic() + 30
    while (
        left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    ) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
