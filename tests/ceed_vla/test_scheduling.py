"""Threads of a forward on cores of their own: which, for whom, and where that fails."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ceed_vla import scheduling
from ceed_vla.errors import ConfigError
from ceed_vla.scheduling import Placement, quota, usable_cores

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system does not pin threads"
)
OWN = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No other process or earlier test holds a core, no quota limits this one."""
    (tmp_path / "claims").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "claims"))
    monkeypatch.setattr(scheduling, "_CGROUPS", tmp_path)
    monkeypatch.setattr(scheduling, "_uses", Counter())
    monkeypatch.setattr(scheduling, "_claims", {})
    scheduling._say_once.cache_clear()
    usable_cores.cache_clear()


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four cores, as far as a placement knows."""
    monkeypatch.setattr(scheduling, "usable_cores", lambda: (0, 1, 2, 3))


def test_the_calling_thread_is_pinned_and_then_free_again() -> None:
    core = max(OWN)
    placement = Placement(1, str(core))
    with placement.pinned():
        assert os.sched_getaffinity(0) == {core}
        with placement.pinned():
            assert os.sched_getaffinity(0) == {core}
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == OWN
    with pytest.raises(ValueError, match="of the caller"), placement.pinned():
        raise ValueError("of the caller")
    assert os.sched_getaffinity(0) == OWN


@pytest.mark.usefixtures("four")
def test_engines_of_a_process_share_cores_only_when_all_are_taken() -> None:
    first, second = Placement(2), Placement(2)
    assert (first.cores, second.cores) == ((0, 1), (2, 3))
    third = Placement(3)
    assert third.cores == (0, 1, 2)
    del first, third
    assert Placement(2).cores == (0, 1)
    assert second.cores == (2, 3)


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(("threads", "pin"), [(1, "auto"), (0, "none"), (2, "none"), (5, "auto")])
def test_what_is_not_pinned(threads: int, pin: str) -> None:
    placement = Placement(threads, pin)
    assert placement.cores == ()
    assert placement.threads == (threads or 4)
    with placement.pinned():
        assert os.sched_getaffinity(0) == OWN


@pytest.mark.usefixtures("four")
def test_more_threads_than_cores_are_one_plain_warning(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        Placement(5)
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "threads is 5, but this process may use 4 cores" in warning.message


@pytest.mark.usefixtures("four")
def test_a_container_with_less_time_than_cores_is_not_pinned(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert quota() == 2.5
    placement = Placement()
    assert (placement.threads, placement.cores) == (2, ())
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert quota() is None
    assert Placement().cores == (0, 1, 2, 3)


@pytest.mark.usefixtures("four")
def test_the_quota_of_an_older_kernel(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert quota() is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    assert quota() == 0.5
    assert Placement().threads == 1


def test_two_processors_of_a_core_count_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scheduling, "_TOPOLOGY", str(tmp_path / "siblings{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    for processor, siblings in enumerate(("0,4", "1,5", "2,6", "3,7", "0,4", "1,5")):
        (tmp_path / f"siblings{processor}").write_text(siblings + "\n")
    assert usable_cores() == (0, 1, 2)


HOLDS = """
from ceed_vla import scheduling
scheduling.usable_cores = lambda: (0, 1, 2)
placement = scheduling.Placement(2)
print(placement.cores, flush=True)
input()
"""


@pytest.mark.usefixtures("four")
def test_processes_beside_each_other_take_other_cores(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path / "claims")}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDS], env=environment, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "(0, 1)\n"
        beside = Placement(2)
        assert beside.cores == (2, 3)
        with caplog.at_level(logging.INFO):
            assert Placement(3).cores == ()
        assert "other processes decode on them" in caplog.text
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert Placement(2).cores == (0, 1)


@pytest.mark.parametrize("pin", ["off", "", "auto,1", "0,,1", "-1", 1, None])
def test_a_pin_of_another_form(pin: Any) -> None:
    message = r"pin is .*; it must be auto, none, or one core for each thread, such as 2,3\."
    with pytest.raises(ConfigError, match=message):
        Placement(2, pin)


def test_named_cores_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="threads is 2; name a different core for each thread"):
        Placement(2, "0,0")
    with pytest.raises(ConfigError, match="threads is 2; name a different core for each thread"):
        Placement(2, "0")
    with pytest.raises(ConfigError, match=r"core 9999 cannot be used \(.*\)\. Choose among .*0"):
        Placement(1, "9999")
    assert os.sched_getaffinity(0) == OWN


def test_a_system_that_cannot_pin_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    with caplog.at_level(logging.INFO):
        placements = [Placement(2) for _ in range(2)]
    assert [placement.cores for placement in placements] == [(), ()]
    assert caplog.text.count("this system cannot do that") == 1


def test_a_core_that_disappears_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    placement = Placement(1, str(min(OWN)))
    placement.cores = (9999,)
    with placement.pinned():
        assert os.sched_getaffinity(0) == OWN
    assert "Core 9999 cannot be used any more" in caplog.text
    assert placement.cores == ()


TORCH = """
import os, threading
from ceed_vla.scheduling import place_torch, torch_pinned

def affinities() -> list[set[int]]:
    return [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]

before = os.sched_getaffinity(0)
place_torch(2, "1,0")
assert sorted(map(sorted, affinities())).count([0]) == 1, affinities()
assert os.sched_getaffinity(0) == before
found = []
def pinned() -> None:
    with torch_pinned():
        found.append(os.sched_getaffinity(0))
pinned()
thread = threading.Thread(target=pinned)  # has threads of its own in torch
thread.start()
thread.join()
assert found == [{1}, before], found
place_torch(2, "none")
pinned()
assert found[-1] == before
place_torch(2, "0,1")  # the threads exist already
pinned()
assert found[-1] == before
"""


@pytest.mark.skipif(not {0, 1} <= OWN, reason="one core")
def test_threads_of_torch() -> None:
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
