"""Recordings that are damaged, or contain other files, are refused before anything is changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ceed_vla.errors import DatasetError
from ceed_vla.sim.record import record


@pytest.fixture
def stored(tmp_path: Path, fake_frames: Any, new_writer: Any) -> Path:
    """A recording of two commits, with its progress as `record` writes it."""
    root = tmp_path / "set"
    writer = new_writer(root)
    for episode in range(2):
        writer.add_episode(fake_frames(5, f"task {episode}"))
        writer.commit({"done": episode})
    return root


def damaged(name: str, **changes: Any) -> Any:
    def edit(root: Path) -> None:
        values = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps({**values, **changes}))

    return edit


def feature(**changes: Any) -> Any:
    def edit(root: Path) -> None:
        info = json.loads((root / "meta" / "info.json").read_text())
        info["features"]["action"].update(changes)
        (root / "meta" / "info.json").write_text(json.dumps(info))

    return edit


FIRST_FILE = "data/chunk-000/file-000.parquet"
DAMAGES: dict[str, tuple[Any, str]] = {
    "unknown file": (
        lambda r: (r / "data/chunk-000/mine.parquet").write_bytes(b"x"),
        "list: data/chunk-000/mine",
    ),
    "unknown note": (lambda r: (r / "data/notes.txt").write_bytes(b"x"), r"list: data/notes\.txt"),
    "unknown episodes": (
        lambda r: (r / "meta/episodes/chunk-000/file-009.parquet").write_bytes(b"x"),
        "does not list",
    ),
    "next file": (
        lambda r: (r / "data/chunk-000/file-002.parquet").write_bytes(b"x"),
        "does not list",
    ),
    "missing file": (lambda r: (r / FIRST_FILE).unlink(), f"lacks {FIRST_FILE}"),
    "truncated file": (
        lambda r: (r / FIRST_FILE).write_bytes((r / FIRST_FILE).read_bytes()[:-100]),
        "damaged",
    ),
    "empty file": (lambda r: (r / FIRST_FILE).write_bytes(b""), "damaged"),
    "other rows": (
        lambda r: pq.write_table(pq.read_table(r / FIRST_FILE).slice(0, 2), r / FIRST_FILE),
        "total_frames",
    ),
    "link": (lambda r: (r / "meta/mine").symlink_to("/tmp"), "links"),
    "pipe": (
        lambda r: [(r / "meta/stats.json").unlink(), os.mkfifo(r / "meta/stats.json")],
        "pipes",
    ),
    "progress pipe": (
        lambda r: [(r / "recording.json").rename(r / "x"), os.mkfifo(r / "recording.json")],
        "is not a recording",
    ),
    "progress": (lambda r: (r / "recording.json").write_text("{"), "not JSON"),
    "progress list": (lambda r: (r / "recording.json").write_text("[]"), "instead of settings"),
    "files": (damaged("recording.json", files=5), "damaged"),
    "no files": (damaged("recording.json", files=[]), "does not list"),
    "file outside": (damaged("recording.json", files=["../x.parquet"]), "damaged"),
    "absolute file": (damaged("recording.json", files=["/tmp/x.parquet"]), "damaged"),
    "file numbers": (damaged("recording.json", files=[1]), "damaged"),
    "episodes": (damaged("recording.json", total_episodes=7), "total_episodes"),
    "episodes text": (damaged("recording.json", total_episodes="2"), "damaged"),
    "no progress": (damaged("recording.json", progress=None), "damaged"),
    "info": (lambda r: (r / "meta/info.json").write_text("{"), "damaged"),
    "info list": (lambda r: (r / "meta/info.json").write_text("[]"), "damaged"),
    "no info": (lambda r: (r / "meta/info.json").unlink(), "damaged"),
    "fps": (damaged("meta/info.json", fps=-5), "damaged"),
    "other fps": (damaged("meta/info.json", fps=20), "fps"),
    "fps text": (damaged("meta/info.json", fps="10"), "damaged"),
    "template": (
        damaged("meta/info.json", data_path="{chunk_index.__class__}/{file_index}.parquet"),
        "data_path",
    ),
    "template outside": (
        damaged("meta/info.json", data_path="../{chunk_index}{file_index}"),
        "data_path",
    ),
    "chunk size": (damaged("meta/info.json", chunks_size=1), "chunks_size"),
    "frames": (damaged("meta/info.json", total_frames=99), "total_frames"),
    "tasks": (damaged("meta/info.json", total_tasks=0), "total_tasks"),
    "features": (damaged("meta/info.json", features=[]), "damaged"),
    "feature shape": (feature(shape=[5]), "Use a new root"),
    "feature type": (feature(dtype="object"), "damaged|new root"),
    "stats": (lambda r: (r / "meta/stats.json").write_text("{"), "damaged"),
    "no stats": (lambda r: (r / "meta/stats.json").unlink(), "damaged"),
    "stats list": (lambda r: (r / "meta/stats.json").write_text("[]"), "damaged"),
    "stats text": (damaged("meta/stats.json", action={"mean": "x"}), "damaged"),
    "stats NaN": (
        damaged(
            "meta/stats.json",
            index={n: [float("nan")] for n in ("min", "max", "mean", "std", "count")},
        ),
        "not finite",
    ),
    "no tasks": (lambda r: (r / "meta/tasks.parquet").unlink(), "damaged"),
    "tasks file": (lambda r: (r / "meta/tasks.parquet").write_bytes(b"x"), "damaged"),
}


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(p): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and ".recording" not in p.parts
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recording_is_refused_and_left_as_it_is(
    stored: Path, damage: str, new_writer: Any
) -> None:
    break_it, message = DAMAGES[damage]
    break_it(stored)
    before = contents(stored)
    with pytest.raises(DatasetError, match=message):
        new_writer(stored)
    assert contents(stored) == before


@pytest.mark.parametrize(
    "marker",
    [
        "{",
        "[]",
        "{}",
        '{"total_episodes": 2, "files": []}',
        '{"total_episodes": 2, "files": ["info.json"]}',
        '{"total_episodes": 2, "files": 3}',
        '{"total_episodes": "2", "files": ["info.json"]}',
        '{"total_episodes": 2, "files": ["info.json", "stats.json", "tasks.parquet"], '
        '"adding": ["../victim"]}',
        '{"total_episodes": 2, "files": ["info.json", "stats.json", "tasks.parquet"], '
        '"adding": ["meta/info.json"]}',
    ],
)
def test_a_damaged_marker_deletes_nothing(stored: Path, marker: str, new_writer: Any) -> None:
    (stored / ".recording" / "backup" / "marker.json").write_text(marker)
    before = contents(stored)
    with pytest.raises(DatasetError, match=r"marker\.json"):
        new_writer(stored)
    assert contents(stored) == before


def test_a_backup_of_another_commit_replaces_nothing(stored: Path, new_writer: Any) -> None:
    backup, names = stored / ".recording" / "backup", ["info.json", "stats.json", "tasks.parquet"]
    for name in names:
        (backup / name).write_bytes((stored / "meta" / name).read_bytes())
    info = json.loads((backup / "info.json").read_text())
    (backup / "info.json").write_text(json.dumps({**info, "total_episodes": 1}))
    (backup / "marker.json").write_text(json.dumps({"total_episodes": 2, "files": names}))
    before = contents(stored)
    with pytest.raises(DatasetError, match="another commit"):
        new_writer(stored)
    assert contents(stored) == before


@pytest.mark.parametrize("back", range(4))
def test_undoing_a_commit_may_be_interrupted_too(stored: Path, new_writer: Any, back: int) -> None:
    backup, names = stored / ".recording" / "backup", ["info.json", "stats.json", "tasks.parquet"]
    before = contents(stored)
    for place, name in enumerate(names):  # the first ones are restored already
        (backup / name).write_bytes((stored / "meta" / name).read_bytes())
        if place < back:
            (backup / name).unlink()
    for name in names[max(back, 1) :]:  # info.json is the last one that a commit writes
        (stored / "meta" / name).write_bytes(b"half")
    (backup / "marker.json").write_text(json.dumps({"total_episodes": 2, "files": names}))
    new_writer(stored)
    assert contents(stored) == before


def test_a_marker_cannot_name_what_is_committed(stored: Path, new_writer: Any) -> None:
    marker = {
        "total_episodes": 2,
        "files": ["info.json", "stats.json", "tasks.parquet"],
        "adding": [FIRST_FILE],
    }
    for name in marker["files"]:  # type: ignore[attr-defined]
        (stored / ".recording" / "backup" / name).write_bytes((stored / "meta" / name).read_bytes())
    (stored / ".recording" / "backup" / "marker.json").write_text(json.dumps(marker))
    before = contents(stored)
    assert new_writer(stored).frames == 10
    assert contents(stored) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"attempts": -1},
        {"attempts": 5},
        {"attempts": "1"},
        {"outcomes": []},
        {"outcomes": {"push_cube/recorded": 9}},
        {"outcomes": {"push_cube/recorded": None}},
        {"failed_seeds": "x"},
        {"episode_seeds": []},
        {"episode_seeds": ["0"]},
        {"config": None},
    ],
    ids=str,
)
def test_damaged_progress_is_refused(tmp_path: Path, changes: dict[str, Any], config: Any) -> None:
    root = tmp_path / "set"
    record(config(root, episodes=1))
    values = json.loads((root / "recording.json").read_text())
    (root / "recording.json").write_text(
        json.dumps({**values, "progress": {**values["progress"], **changes}})
    )
    before = contents(root)
    with pytest.raises(DatasetError, match=r"recording\.json is damaged"):
        record(config(root, episodes=2, resume=True))
    assert contents(root) == before


def test_a_commit_is_on_disk_before_it_counts(
    stored: Path, new_writer: Any, fake_frames: Any, monkeypatch: Any
) -> None:
    settled: list[str] = []

    def sync(handle: int) -> None:
        settled.append(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(stored).as_posix())

    monkeypatch.setattr(os, "fsync", sync)
    writer = new_writer(stored)
    writer.add_episode(fake_frames(5, "task 2"))
    settled.clear()
    writer.commit({"done": 2})
    names = ("info.json", "stats.json", "tasks.parquet")
    marker, done = (
        next(i for i, name in enumerate(settled) if key in name)
        for key in (".marker", ".recording.")
    )
    assert {Path(name).name for name in settled[:marker]} >= set(names)  # the copies
    assert {f"meta/{name}" for name in names} <= set(settled[marker:done])
