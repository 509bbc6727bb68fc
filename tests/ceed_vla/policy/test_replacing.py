"""Saving over a checkpoint: either the old or the new one is complete, and the user's files do not
change.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ceed_vla import CeedVLAPolicy
from ceed_vla.axes.depth.exits import make_exits
from ceed_vla.checkpoints import load, save
from ceed_vla.checkpoints.manifest import (
    MANIFEST,
    check_files,
    hash_of,
    own_files,
    write_manifest,
)
from ceed_vla.checkpoints.replacing import PENDING, finish_replacing, replacing_folder
from ceed_vla.errors import CheckpointError
from ceed_vla.folders import CONFIG, EXITS, WEIGHTS
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors

KILLED = Path(__file__).parents[2] / "helpers" / "killed_saves.py"


def content(folder: Path) -> dict[str, str]:
    return {name: hash_of(folder / name) for name in own_files(folder)}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def give_exits(policy: CeedVLAPolicy, depths: list[int]) -> None:
    policy.backbone.exits = make_exits(policy.backbone, depths, "linear")
    for one in policy.backbone.exits.values():
        assert one.linear is not None
        torch.nn.init.normal_(one.linear.weight, std=0.1)


@pytest.fixture(scope="module")
def other(make_policy: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Another policy with exits, and its processors."""
    policy = make_policy(layers=3)
    give_exits(policy, [1, 2])
    stats = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    return policy, *make_ceed_vla_pre_post_processors(policy.config, stats, instructions=["go on"])


def test_a_reader_that_finishes_a_save_disturbs_no_writer(tmp_path: Path) -> None:
    """As a node that watches a folder in which the user has a folder of his own."""
    (tmp_path / "videos").mkdir()
    stop = threading.Event()

    def read() -> int:
        count = 0
        while not stop.is_set():
            finish_replacing(tmp_path, own_files)
            count += 1
        return count

    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as ends:
        reader = pool.submit(read)
        ends.callback(stop.set)
        for number in range(100):
            with replacing_folder(tmp_path, own_files) as stage:
                (stage / CONFIG).write_text(json.dumps({"type": "ceed_vla", "n": number}))
                (stage / WEIGHTS).write_bytes(b"w" * 100_000)
                write_manifest(stage)
            assert json.loads((tmp_path / CONFIG).read_text())["n"] == number
    assert reader.result() > 0


def run_killed(old: Path, new: Path, place: Path, *more: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", str(KILLED), str(old), str(new), str(place), "24"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("folder", [[], ["mine"]])
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(
    folder: list[str], checkpoint: Path, other: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    """By exchanging folders, and file by file in a folder that must stay because it has the user's
    files.
    """
    old = save(tmp_path / "old", *other)
    (tmp_path / "place").mkdir()
    *killed, full, last = run_killed(old, checkpoint, tmp_path / "place", *folder)
    print("\n".join(map(str, killed)))
    assert len(killed) == 27
    found = [line["found"] for line in killed]
    assert set(found) == {"old", "new"}
    assert found[0] == "old"
    assert found[23] == "new"
    assert full["found"] == "old"
    assert "is there room?" in full["event"]
    assert last == {"left over": [], "found": "new"}


def test_nothing_of_the_old_checkpoint_is_left(
    policy: CeedVLAPolicy, processors: Any, other: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "policy", *other)
    inode = folder.stat().st_ino
    kept = dict.fromkeys(("README.md", "train_config.json", "own.safetensors", ".lock"), "mine")
    for name, text in kept.items():
        (folder / name).write_text(text)
    (folder / "link").symlink_to("README.md")
    assert (folder / EXITS).is_file()
    save(folder, policy, *processors)
    assert folder.stat().st_ino != inode  # the whole folder is new
    assert not (folder / EXITS).exists()
    assert {name: (folder / name).read_text() for name in kept} == kept
    assert os.readlink(folder / "link") == "README.md"
    assert load(folder)[0].config == policy.config
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("why", ["working directory", "folder inside"])
def test_a_folder_that_must_stay_gets_new_files(
    why: str,
    policy: CeedVLAPolicy,
    processors: Any,
    other: tuple[Any, Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save(tmp_path / "policy", *other)
    (folder / "README.md").write_text("mine")
    inode = folder.stat().st_ino
    if why == "working directory":
        monkeypatch.chdir(folder)
        save(".", policy, *processors)
    else:
        (folder / "notes").mkdir()
        save(folder, policy, *processors)
        assert (folder / "notes").is_dir()
    assert folder.stat().st_ino == inode
    assert not (folder / EXITS).exists()
    assert (folder / "README.md").read_text() == "mine"
    assert load(folder)[0].config == policy.config
    assert hidden(folder) == hidden(tmp_path) == []


def test_a_save_that_was_decided_is_finished_by_who_reads(
    checkpoint: Path, other: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    """Like after a kill when some files have been moved and the manifest has not."""
    folder = save(tmp_path / "policy", *other)
    shutil.copytree(checkpoint, folder / PENDING)
    (folder / PENDING / WEIGHTS).replace(folder / WEIGHTS)
    assert load(folder)[0].config == load(checkpoint)[0].config
    assert content(folder) == content(checkpoint)
    assert hidden(folder) == []


def test_a_link_in_the_place_of_a_save_moves_no_file(
    other: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    own, others = tmp_path / "own", tmp_path / "others"
    save(own, *other)
    save(others, *other)
    (others / "notes.txt").write_text("mine")
    before = sorted(os.listdir(others))
    (own / PENDING).symlink_to("../others")
    with pytest.raises(CheckpointError, match=r"is a link, which no save leaves behind; remove it"):
        load(own)
    with pytest.raises(CheckpointError, match="is a link"):
        save(own, *other)
    assert sorted(os.listdir(others)) == before


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"files": ["config.json"]}'])
def test_a_damaged_manifest_of_an_interrupted_save_is_reported(
    other: tuple[Any, Any, Any], tmp_path: Path, text: str
) -> None:
    save(tmp_path, *other)
    (tmp_path / PENDING).mkdir()
    (tmp_path / PENDING / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load(tmp_path)
    assert (tmp_path / WEIGHTS).is_file()


def test_a_link_stays_a_link(
    policy: CeedVLAPolicy, processors: Any, other: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "somewhere" / "policy", *other)
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert save(link, policy, *processors) == link
    assert link.is_symlink()
    assert load(folder)[0].config == policy.config
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    with pytest.raises(CheckpointError, match="a link to nothing"):
        save(tmp_path / "nowhere", policy, *processors)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_stays(
    policy: CeedVLAPolicy, processors: Any, other: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file", policy, *processors)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file" / "policy", policy, *processors)
    assert (tmp_path / "file").read_text() == "mine"
    folder = save(tmp_path / "policy", *other)
    before = content(folder)

    class Failing:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device", str(folder / "x"))

    with pytest.raises(CheckpointError, match="No space left") as error:
        save(folder, policy, processors[0], Failing())
    assert str(tmp_path / "policy") in str(error.value)
    assert content(folder) == before
    assert hidden(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written(
    policy: CeedVLAPolicy,
    processors: Any,
    checkpoint: Path,
    other: tuple[Any, Any, Any],
    tmp_path: Path,
) -> None:
    folder = save(tmp_path / "parent" / "policy", *other)
    folder.parent.chmod(0o555)
    try:
        save(folder, policy, *processors)
        assert load(folder)[0].config == policy.config
        folder.chmod(0o555)
        with pytest.raises(CheckpointError, match="Permission denied"):
            save(folder, *other)
        assert load(folder)[0].config == policy.config
        with pytest.raises(CheckpointError, match="Permission denied"):
            save(folder.parent / "new", *other)
        shutil.copytree(checkpoint, tmp_path / PENDING)
        folder.chmod(0o755)
        (tmp_path / PENDING).rename(folder / PENDING)
        folder.chmod(0o555)
        with pytest.raises(CheckpointError, match="a save was interrupted, and cannot be finished"):
            load(folder)
    finally:
        folder.chmod(0o755)
        folder.parent.chmod(0o755)


def test_what_a_killed_save_left_is_removed_and_what_another_writes_is_not(
    policy: CeedVLAPolicy, processors: Any, tmp_path: Path
) -> None:
    left = tmp_path / ".policy.0123456789abcdef.new"
    left.mkdir()
    (left / WEIGHTS).write_text("half")
    (tmp_path / ".policy.mine.new").mkdir()
    folder = tmp_path / "policy"
    with replacing_folder(folder, own_files) as stage:  # another save that is in progress
        save(folder, policy, *processors)
        assert stage.is_dir()
        assert not left.exists()
        for name in own_files(folder):
            shutil.copy(folder / name, stage / name)
        (stage / "second").write_text("it came last")
    check_files(folder)
    assert (folder / "second").is_file()
    assert hidden(tmp_path) == [".policy.mine.new"]


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_no_mixture(
    checkpoint: Path, other: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "policy")
    read = CeedVLAPolicy._from_folder.__func__  # type: ignore[attr-defined]

    def slowly(cls: Any, *arguments: Any, **options: Any) -> Any:
        found = read(cls, *arguments, **options)
        save(folder, *other)
        return found

    monkeypatch.setattr(CeedVLAPolicy, "_from_folder", classmethod(slowly))
    for loader in (load, CeedVLAPolicy.from_pretrained):
        with pytest.raises(CheckpointError, match="was replaced while it was read; load it again"):
            loader(folder)
    monkeypatch.undo()
    assert load(folder)[0].config == other[0].config


def test_the_manifest_is_written_last(
    policy: CeedVLAPolicy,
    processors: Any,
    tmp_path: Path,
) -> None:
    seen: list[list[str]] = []

    class Watching:
        def save_pretrained(self, folder: Path) -> None:
            processors[1].save_pretrained(folder)
            seen.append(sorted(path.name for path in folder.iterdir()))

    folder = save(tmp_path / "policy", policy, processors[0], Watching())
    assert MANIFEST not in seen[0]
    assert {CONFIG, WEIGHTS} < set(seen[0])
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == set(seen[0])
