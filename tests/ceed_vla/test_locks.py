"""One writer per output folder: real processes that hold a lock, die, fork and race."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ceed_vla.errors import ConfigError
from ceed_vla.locks import Holder, lock_file, locked
from ceed_vla.outputs import claim_folder, owned_folder
from tests.helpers.holders import holder

WHAT = "--output_dir is 'run'"
FORKS = """
import os, sys, time
from pathlib import Path
from ceed_vla.locks import locked
with locked(Path(sys.argv[1]), "the parent's"):
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)  # after what a fork does in the child
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""
RACES = """
import os, sys
from pathlib import Path
from ceed_vla.errors import ConfigError
from ceed_vla.locks import locked
folder, inside = Path(sys.argv[1]), Path(sys.argv[2])
done = 0
while done < 100:
    try:
        with locked(folder, "x"):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            inside.unlink()
            done += 1
    except ConfigError as error:
        assert "another process is writing there" in str(error)
"""


def write_record(folder: Path, **changes: Any) -> Path:
    """Write a lock file that no process holds, like a killed process leaves."""
    file = lock_file(folder)
    file.write_text(json.dumps(asdict(replace(Holder.own(), **changes))))
    return file


def test_the_second_writer_is_told_who_is_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with holder(folder) as first:
        with pytest.raises(ConfigError) as error, locked(folder, WHAT):
            pass
        said = f"{WHAT}, and another process is writing there: process {first.pid} on "
        assert str(error.value).startswith(said)
        assert re.search(r" since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00 \(-c ", str(error.value))
        assert not folder.exists()
        assert first.stdin is not None
        first.stdin.close()
        assert first.wait() == 0
    assert list(tmp_path.iterdir()) == []  # folders that only the lock needed are removed, too
    with locked(folder, WHAT):
        assert lock_file(folder).exists()


def test_a_killed_writer_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as first:
        first.kill()
        first.wait()
        assert lock_file(tmp_path / "run").exists()
        with locked(tmp_path / "run", WHAT):
            pass
    assert not lock_file(tmp_path / "run").exists()


def test_a_forked_child_neither_holds_nor_releases(tmp_path: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", FORKS, str(tmp_path / "run")]
    with subprocess.Popen(command, **pipes) as parent:  # type: ignore[call-overload]
        child = int(parent.stdout.readline())
        try:
            with (
                pytest.raises(ConfigError, match=f"process {parent.pid} on"),
                locked(tmp_path / "run", WHAT),
            ):
                pass
            parent.kill()
            parent.wait()
            with locked(tmp_path / "run", WHAT):
                os.kill(child, 0)  # a running process
        finally:
            parent.kill()
            os.kill(child, signal.SIGKILL)
    with locked(tmp_path / "run", WHAT):
        if (own := os.fork()) == 0:  # the child leaves the block as this process does
            os._exit(0 if _left_the_block(tmp_path / "run") else 1)
        assert os.waitpid(own, 0)[1] == 0
        assert lock_file(tmp_path / "run").exists()


def _left_the_block(folder: Path) -> bool:
    """Whether another process has the lock."""
    try:
        with locked(folder, WHAT):
            return False
    except ConfigError:
        return lock_file(folder).exists()


def test_writers_that_race_are_never_two(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACES, str(tmp_path / "run"), str(tmp_path / "inside")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_one_process_are_nested_and_links_are_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locked(tmp_path / "run", WHAT):
        with locked(tmp_path / "link", WHAT):
            pass
        assert lock_file(tmp_path / "run").exists()
    with holder(tmp_path / "run"), pytest.raises(ConfigError), locked(tmp_path / "link", WHAT):
        pass


def test_parts_of_a_folder_have_their_own_writers(tmp_path: Path) -> None:
    with locked(tmp_path, WHAT, "0-of-2"), locked(tmp_path, WHAT, "1-of-2"):
        assert lock_file(tmp_path, "0-of-2") != lock_file(tmp_path, "1-of-2")


def test_processes_of_one_launch_share_the_lock_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path / "run", WHAT, launched=True):
            pass
        with pytest.raises(ConfigError), locked(tmp_path / "run", WHAT):
            pass
        for rank in ("0", "no number"):
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(ConfigError), locked(tmp_path / "run", WHAT, launched=True):
                pass


def test_a_lock_of_another_host_is_refused_with_its_file(tmp_path: Path) -> None:
    file = write_record(tmp_path / "run", host="elsewhere", boot="another")
    seen = r"on elsewhere since .* cannot be determined on"
    with pytest.raises(ConfigError, match=seen) as error, locked(tmp_path / "run", WHAT):
        pass
    assert str(error.value).endswith(f"remove {file}.")
    file.unlink()
    with locked(tmp_path / "run", WHAT):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"boot": "before the last start"},
        {"started": "5"},
        {"process": 2**22 + 1},
        {"host": "a container"},
    ],
    ids=str,
)
def test_what_this_kernel_knows_to_be_free_is_taken_over(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    file = write_record(tmp_path / "run", **changes)
    with locked(tmp_path / "run", WHAT):
        assert Holder.read(file.read_text()) == replace(
            Holder.own(), since=Holder.read(file.read_text()).since
        )
    assert not file.exists()


def test_without_flock_the_record_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)  # like some cluster file systems
    with holder(tmp_path / "run") as first:
        with (
            pytest.raises(ConfigError, match=f"process {first.pid} on"),
            locked(tmp_path / "run", WHAT),
        ):
            pass
        first.kill()
        first.wait()
        with locked(tmp_path / "run", WHAT):
            pass
    write_record(tmp_path / "run", started="5")  # the id of this process, which started later
    with locked(tmp_path / "run", WHAT):
        pass
    write_record(tmp_path / "run", host="a container")
    with pytest.raises(ConfigError, match="a container"), locked(tmp_path / "run", WHAT):
        pass


@pytest.mark.parametrize(
    "text", ["keep me", "[1]", '{"program": "other"}', "[" * 4000, '{"program": "ceed-vla 1"}']
)
def test_a_file_of_somebody_else_is_no_lock(tmp_path: Path, text: str) -> None:
    lock_file(tmp_path / "run").write_text(text)
    with (
        pytest.raises(ConfigError, match="was not made by ceed-vla"),
        locked(tmp_path / "run", WHAT),
    ):
        pass
    assert lock_file(tmp_path / "run").read_text() == text


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_no_lock(tmp_path: Path, kind: str) -> None:
    file, victim = lock_file(tmp_path / "run"), tmp_path / "victim"
    victim.write_text("keep me")
    {
        "link": lambda: file.symlink_to(victim),
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
    }[kind]()
    with (
        pytest.raises(ConfigError, match=re.escape(f"its lock {file}")),
        locked(tmp_path / "run", WHAT),
    ):
        pass
    assert victim.read_text() == "keep me"


@pytest.mark.parametrize("text", ["", "\0" * 300])
def test_an_empty_lock_is_taken_over(tmp_path: Path, text: str) -> None:
    lock_file(tmp_path / "run").write_text(text)  # the state after a power failure
    with locked(tmp_path / "run", WHAT):
        pass
    assert not lock_file(tmp_path / "run").exists()


def test_where_the_lock_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lock_file(tmp_path / "run") == tmp_path / ".run.ceed-vla.lock"
    assert lock_file(tmp_path / ("x" * 255)).parent == tmp_path
    with locked(tmp_path / ("x" * 255), WHAT):
        pass
    monkeypatch.chdir(tmp_path)
    assert lock_file(Path(".")) == tmp_path.parent / f".{tmp_path.name}.ceed-vla.lock"
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with owned_folder("output_dir", str(tmp_path)):  # inside, where another container finds it, too
        assert [file.name for file in tmp_path.iterdir()] == [f".{tmp_path.name}.ceed-vla.lock"]
        assert claim_folder("output_dir", str(tmp_path), (), ()) == tmp_path  # treated as empty
    assert list(tmp_path.iterdir()) == []
