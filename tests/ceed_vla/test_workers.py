"""Processes that share work: every result, original errors, discovered packages, clean exit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from shared_work import make

from ceed_vla import discovery
from ceed_vla.errors import CeedVLAError, ConfigError, TokenError
from ceed_vla.workers import ClusterConfig, Workers, local, open_workers, schedule
from ceed_vla.workers.schedule import Finished, Lost, Raised, Result, Scheduled


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests need neither torch nor LeRobot."""
    monkeypatch.setattr(local, "PRELOADED", [])


def opened(count: int, offset: int) -> Workers:
    return open_workers(count, ClusterConfig(), make, offset)


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_errors_as_they_are(count: int) -> None:
    before = set(multiprocessing.active_children())
    with opened(count, 100) as pool:
        assert [value for ((value, _),) in pool.map(range(12))] == list(range(100, 112))
        assert list(pool.map([])) == []
        with pytest.raises(TokenError, match="item -1 is none"):
            list(pool.map([3, -1, 4]))
        assert [value for ((value, _),) in pool.map(iter([5]))] == [105]
        assert sorted((item, value) for item, (value, _) in pool.stream([1, 0, 2])) == [
            (0, 100),
            (1, 101),
            (2, 102),
        ]
    assert set(multiprocessing.active_children()) <= before


READING = """
from shared_work import reader
from ceed_vla.workers import ClusterConfig, local, open_workers
if __name__ == "__main__":
    local.PRELOADED = []
    with open_workers(2, ClusterConfig(), reader) as pool:
        print(*pool.map([0]))
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
    with opened(2, 0) as pool:
        assert list(pool.map([1])) == [[(1, True)]]


def test_a_process_that_dies_is_an_error_and_nothing_is_left() -> None:
    before = set(multiprocessing.active_children())  # processes of other tests
    with pytest.raises(CeedVLAError, match=r"died.*use fewer workers"), opened(2, 0) as pool:
        list(pool.map([1, -2, 3]))
    with pytest.raises(KeyboardInterrupt), opened(2, 0) as pool:  # noqa: PT012
        next(pool.map(range(1000)))
        raise KeyboardInterrupt
    with opened(2, 0) as pool:  # left in the middle of its work
        next(pool.stream(range(1000)))
    left = set(multiprocessing.active_children()) - before
    for process in left:
        process.join(30)
    assert not any(process.is_alive() for process in left)


def test_a_process_that_stops_answering_holds_nothing_up() -> None:
    """It is stopped, as by a device that never returns, so it does not handle SIGTERM either."""
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117, PT012
        with opened(2, 0) as pool:
            found = pool.stream(range(10**6))
            next(found)
            stopped: Any = pool._workers[0]  # type: ignore[attr-defined]
            os.kill(stopped.process.pid, signal.SIGSTOP)
            began = time.monotonic()
            raise KeyboardInterrupt
    assert not stopped.process.is_alive()
    assert time.monotonic() - began < 60


def test_errors_that_cannot_be_sent_arrive_as_text() -> None:
    with opened(2, 0) as pool, pytest.raises(CeedVLAError, match="UnsendableError: item -3"):
        list(pool.map([-3]))


def test_results_of_an_abandoned_iteration_are_not_mixed_with_the_next() -> None:
    with opened(2, 0) as pool:
        next(pool.stream(range(50, 60)))
        assert [value for ((value, _),) in pool.map(range(6))] == list(range(6))


class TwoAtOnce:
    """A crew of two workers whose messages come in the same round, or never."""

    def __init__(self, *messages: list[Any]) -> None:
        self.workers = [Scripted(own) for own in messages]

    def open(self) -> list[Any]:
        return list(self.workers)

    def wait(self, busy: list[Any], timeout: float | None) -> list[Any]:
        return [worker for worker in busy if worker.messages]

    def replace(self, lost: Any, reason: str) -> Any:
        return None

    def close(self, workers: list[Any], *, at_once: bool) -> None:
        """Nothing runs."""


class Scripted:
    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages
        self.ended = False

    def start(self, item: Any) -> None:
        """It answers what it was told to."""

    def receive(self) -> Any:
        return self.messages.pop(0)

    def running(self) -> bool:
        return True

    def end(self) -> None:
        self.ended = True


def test_an_error_comes_after_the_results_of_the_same_round() -> None:
    crew = TwoAtOnce([Lost("gone")], [Lost("gone, too")])
    with Scheduled(crew) as pool, pytest.raises(CeedVLAError, match="No worker is left"):
        list(pool.stream("ab"))
    crew = TwoAtOnce([Raised(TokenError("wrong"))], [Result("kept")])
    kept = []
    with Scheduled(crew) as pool, pytest.raises(TokenError):  # noqa: PT012
        for _, result in pool.stream("ab"):
            kept.append(result)
    assert kept == ["kept"]


def test_a_silent_worker_is_ended_and_its_item_goes_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schedule, "LEAST_WAIT_S", 0.0)
    crew = TwoAtOnce([], [Finished(), Result("second"), Finished()])
    with Scheduled(crew, timeout_s=0.01) as pool:
        assert list(pool.map("ab")) == [["second"], []]
    assert [worker.ended for worker in crew.workers] == [True, False]


@pytest.mark.parametrize("address", ["here", "host:", ":1", "host:port"])
def test_addresses_of_clusters_are_checked(address: str) -> None:
    with pytest.raises(ConfigError, match="must be local, auto or HOST:PORT"):
        ClusterConfig(address)
    with pytest.raises(ConfigError, match=r"Set --cluster\.address"):
        ClusterConfig(workers=2)


KILLED = """
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from shared_work import make, reader
from ceed_vla.workers import ClusterConfig, local, open_workers
local.PRELOADED = []
if __name__ == "__main__":
    with open_workers(2, ClusterConfig(), make, 0) as workers:
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
