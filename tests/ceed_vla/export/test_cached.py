"""Exports in the cache: made once, made again if damaged, removed if many."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("onnxscript", reason="exports need the extra export")

import ceed_vla.export.cached as cached
from ceed_vla.edge import EdgePolicy
from ceed_vla.errors import ConfigError
from ceed_vla.export import onnx_files
from ceed_vla.export.cached import cache_folder, cached_export, cached_policy
from ceed_vla.export.export import _check_steps
from ceed_vla.folders import resolve_checkpoint


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A cache of its own, in which an export is a copy of the student's; lists what was made."""
    source = cached_export("student")
    folders: list[Path] = []

    def export(checkpoint: Any, folder: Path, packages: str, lock: int) -> None:
        time.sleep(0.1)  # others meanwhile wait for the lock
        folders.append(folder)
        shutil.copytree(source, folder)

    monkeypatch.setenv("CEED_VLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached, "_export", export)
    return folders


def test_an_export_is_made_once(made: list[Path]) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(cached_export("student"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert set(found) == set(made)


@pytest.mark.parametrize("damage", ["truncated", "incomplete"])
def test_a_damaged_export_is_made_again(made: list[Path], damage: str) -> None:
    folder = cached_export("student")
    if damage == "truncated":
        (folder / "block.onnx").write_bytes(b"")
    else:
        (folder / "export.json").unlink()
    rest = folder.with_name(f".{folder.name}.rest")
    rest.mkdir()
    assert isinstance(cached_policy("student", 1), EdgePolicy)
    assert len(made) == 2
    assert not rest.exists()
    assert [f.name for f in cache_folder().iterdir() if f.is_dir()] == [folder.name]


def test_processes_that_find_the_same_damage_make_one_export(made: list[Path]) -> None:
    folder = cached_export("student")
    (folder / "block.onnx").write_bytes(b"")
    found: list[EdgePolicy] = []
    threads = [
        threading.Thread(target=lambda: found.append(cached_policy("student", 1))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(made) == 2  # the first one, and one in its place


def test_a_checkpoint_that_changes_while_it_is_exported(
    made: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(resolve_checkpoint("student"), tmp_path / "current")
    export = cached._export

    def replaced(source: Any, *rest: Any) -> None:
        export(source, *rest)
        config = checkpoint / "config.json"
        config.write_text(config.read_text() + " ")

    monkeypatch.setattr(cached, "_export", replaced)
    with pytest.raises(ConfigError, match="was changed while it was exported; load it again"):
        cached_export(checkpoint)
    assert not made[0].exists()


def test_the_reason_of_an_export_that_was_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(returncode=-9, stderr="WARNING: no manifest\n")

    monkeypatch.setattr(cached.subprocess, "run", killed)
    with pytest.raises(ConfigError, match="exit code -9, killed, perhaps for memory; export it"):
        cached._export("it", tmp_path, "", 0)


def test_the_oldest_exports_are_removed(made: list[Path]) -> None:
    folder = cached_export("student")
    for age in range(25):
        other = folder.with_name(f"other{age}")
        shutil.copytree(folder, other)
        os.utime(other, (age, age))
    cached._remove_oldest(cache_folder())
    left = {f.name for f in cache_folder().iterdir() if f.is_dir()}
    assert left == {folder.name, *(f"other{age}" for age in range(6, 25))}


def test_a_cache_that_cannot_be_written_is_one_error(
    made: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CEED_VLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written .*; name another folder with CEED"):
        cached_export("student")


def test_without_a_home_the_cache_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("CEED_VLA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ConfigError, match=r"no home for the cache .*; set CEED_VLA_CACHE"):
        cache_folder()


def test_steps_that_exports_do_not_have_are_refused() -> None:
    class Relative:
        _registry_name = "relative_actions_processor"

        def __init__(self, enabled: bool) -> None:
            self.enabled = enabled

    rename = SimpleNamespace(rename_map={})
    _check_steps("it", [Relative(enabled=False), rename])
    with pytest.raises(ConfigError, match="it has the processor step relative_actions_processor"):
        _check_steps("it", [Relative(enabled=True)])
    with pytest.raises(ConfigError, match="the processor step SimpleNamespace"):
        _check_steps("it", [SimpleNamespace(rename_map={"a": "b"})])


def test_the_size_of_a_graph_is_that_of_what_it_uses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    inputs = {"x": torch.zeros(1, 4)}
    monkeypatch.setattr(onnx_files, "MOST_GRAPH", 1000)
    onnx_files.write_graph(tmp_path / "half.onnx", Half(), inputs, ["y"])
    monkeypatch.setattr(onnx_files, "MOST_GRAPH", 50)
    with pytest.raises(ConfigError, match=r"half\.onnx would have .* Run it with torch"):
        onnx_files.write_graph(tmp_path / "half.onnx", Half(), inputs, ["y"])
