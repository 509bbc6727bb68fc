"""Locations of checkpoints: shipped names, local folders, and names that are both."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ceed_vla
from ceed_vla import checkpoints, folders
from ceed_vla.errors import CheckpointError
from ceed_vla.folders import FILES, pretrained_path, resolve_checkpoint, unambiguous

SHIPPED = pretrained_path("student")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """An empty working directory; warnings are recorded."""
    monkeypatch.chdir(tmp_path)
    folders._warn.cache_clear()
    caplog.set_level(logging.WARNING)
    return tmp_path


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("given", ["student", Path("student"), "student/"])
def test_a_shipped_name(here: Path, given: str | Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_checkpoint(given) == SHIPPED
    assert not caplog.messages


@pytest.mark.parametrize("given", ["student", Path("student"), "student/"])
@pytest.mark.parametrize("inner", ["", "pretrained_model"])
def test_a_local_checkpoint_of_a_shipped_name(
    here: Path, given: str | Path, inner: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = checkpoint(here / "student" / inner)
    assert resolve_checkpoint(given) == resolve_checkpoint(given) == expected
    (message,) = caplog.messages  # once, although it is resolved several times
    assert message.startswith(
        f"student is the local folder {here}/student, not the shipped checkpoint"
    )
    assert "./student" in message


def test_a_local_folder_that_is_no_checkpoint(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "student" / "checkpoints").mkdir(parents=True)
    (here / "teacher").touch()
    assert resolve_checkpoint("student") == SHIPPED
    assert resolve_checkpoint("teacher") == pretrained_path("teacher")
    assert [
        f"the local folder {here}/{name} is not a checkpoint" in text
        for name, text in zip(("student", "teacher"), caplog.messages, strict=True)
    ] == [True, True]
    assert "Write ./student if you mean the folder" in caplog.messages[0]


def test_an_incomplete_local_checkpoint_is_an_error(here: Path) -> None:
    (checkpoint(here / "student") / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"student lacks model\.safetensors"):
        resolve_checkpoint("student")


@pytest.mark.parametrize("given", ["./student", "../{}/student", "{absolute}/student"])
def test_a_path_is_always_the_local_folder(
    here: Path, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = given.format(here.name, absolute=here)
    with pytest.raises(CheckpointError, match="No checkpoint folder at"):
        resolve_checkpoint(given)
    (here / "student").mkdir()
    with pytest.raises(CheckpointError, match=r"student lacks config\.json"):
        resolve_checkpoint(given)
    (here / "student").rmdir()
    folder = checkpoint(here / "student")
    found = resolve_checkpoint(given)
    assert found.resolve() == folder.resolve()
    assert resolve_checkpoint(found) == found  # still unambiguous as a `Path`
    assert not caplog.messages


def test_a_name_of_a_wheel(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wheel = here / "site" / "ceed_vla_foldertest"
    shutil.copytree(SHIPPED, wheel / "student")
    (wheel / "__init__.py").touch()
    monkeypatch.syspath_prepend(here / "site")
    assert resolve_checkpoint("foldertest/student") == wheel / "student"
    (here / "foldertest").mkdir()
    assert resolve_checkpoint("foldertest/student") == wheel / "student"
    assert not caplog.messages
    local = checkpoint(here / "foldertest" / "student")
    assert resolve_checkpoint("foldertest/student") == local
    assert len(caplog.messages) == 1
    assert resolve_checkpoint("./foldertest/student") == local
    assert len(caplog.messages) == 1


def test_a_local_folder_needs_no_wheel(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "runs").mkdir()
    with pytest.raises(CheckpointError, match="No checkpoint folder at runs/student"):
        resolve_checkpoint("runs/student")
    checkpoint(here / "runs" / "student")
    assert resolve_checkpoint("runs/student") == Path("runs/student")
    assert not caplog.messages


def test_unambiguous(here: Path) -> None:
    assert unambiguous("./student") == str(here / "student")
    for text in ("student", "./other", "runs/student", "/student", "", "../student"):
        assert unambiguous(text) == text


def test_nothing_heavy_is_imported_to_list_what_there_is() -> None:
    """Shells complete `ceed_vla.<TAB>` with `dir`."""
    script = (
        "import sys, ceed_vla, ceed_vla.folders, ceed_vla.checkpoints\nfor module in (ceed_vla, "
        "ceed_vla.checkpoints): assert {*module.__all__} <= {*dir(module)}\nprint([name for name "
        "in ('torch', 'lerobot', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (run.stdout.strip(), run.returncode) == ("[]", 0), run.stderr


def test_dir_has_the_exports() -> None:
    assert {"load", "CeedVLAPolicy", "pretrained_path", "__version__", "__name__"} <= set(
        dir(ceed_vla)
    )
    assert {"load", "save", "seal"} <= set(dir(checkpoints))
    for name in ceed_vla.__all__:
        assert hasattr(ceed_vla, name)
