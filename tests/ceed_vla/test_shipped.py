"""Checkpoints on the nodes of a cluster: one copy, removed after the job however it ends."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ceed_vla import folders
from ceed_vla.workers import shipped

WORKER = """
import sys, time
from ceed_vla.workers.shipped import Shipped, unpack
unpack(Shipped("/not/here", {"config.json": b"{}"}, "digest"), sys.argv[1])
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of a node."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def worker(job: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, job]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_path_of_a_checkpoint_leads_to_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_relocated", {})
    original = tmp_path / "original"
    shutil.copytree(folders.resolve_checkpoint("student"), original)
    (original / "sub").mkdir()
    (original / "sub" / "file").write_bytes(b"contents")
    sent = shipped.read_checkpoint(str(original))
    shutil.rmtree(original)
    shipped.unpack(sent, "job")
    copy = folders.resolve_checkpoint(str(original))
    assert (copy / "sub" / "file").read_bytes() == b"contents"
    assert copy.is_relative_to(shipped.folder_of("job"))
    shipped.remove("job")
    assert not copy.exists()


def test_the_next_job_removes_what_killed_ones_left_and_nothing_else(node: Path) -> None:
    killed, alive = worker("killed"), worker("alive")
    killed.send_signal(signal.SIGKILL)
    killed.wait(20)
    assert shipped.folder_of("killed").exists()
    try:
        following = worker("following")
        assert sorted(path.name for path in node.iterdir()) == [
            "ceed_vla-alive",
            "ceed_vla-alive.held",
            "ceed_vla-following",
            "ceed_vla-following.held",
        ]
        following.kill()
        following.wait(20)
        shipped.remove_abandoned()
        assert shipped.folder_of("alive").exists()
        assert not shipped.folder_of("following").exists()
    finally:
        alive.kill()
        alive.wait(20)
