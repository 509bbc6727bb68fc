"""Damaged or inconsistent datasets: one clear error, and no change outside the folder."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ceed_vla.data.frames import FrameStore, open_dataset
from ceed_vla.errors import DatasetError

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
CHUNK = 4


def data_file(root: Path) -> Path:
    return next((root / "data").rglob("*.parquet"))


# ---- broken datasets ----------------------------------------------------------------------------


def edit_info(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = root / "meta" / "info.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


def edit_column(root: Path, name: str, values: Callable[[list[Any]], list[Any]]) -> None:
    table = pq.read_table(data_file(root))
    index = table.column_names.index(name)
    column = pa.array(values(table.column(index).to_pylist()), table.schema.field(index).type)
    pq.write_table(table.set_column(index, name, column), data_file(root))


def rewrite_tasks(root: Path, names: list[Any], numbers: list[int] | None = None) -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {"task_index": numbers or range(len(names))}, index=pd.Index(names, name="task")
    )
    frame.to_parquet(root / "meta" / "tasks.parquet")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "No LeRobotDataset"),
    "damaged info": (lambda r: (r / "meta" / "info.json").write_text("{"), "is not JSON"),
    "old format": (lambda r: edit_info(r, lambda i: i.update(codebase_version="v2.1")), "v2.1"),
    "no state": (
        lambda r: edit_info(r, lambda i: i["features"].pop("observation.state")),
        "observation.state",
    ),
    "no camera": (
        lambda r: edit_info(r, lambda i: [i["features"].pop(c) for c in (FRONT, WRIST)]),
        "no camera",
    ),
    "no data": (lambda r: shutil.rmtree(r / "data"), "hold 0 frames"),
    "not finalised": (
        lambda r: data_file(r).write_bytes(data_file(r).read_bytes()[:-300]),
        "not finalised",
    ),
    "no tasks file": (lambda r: (r / "meta" / "tasks.parquet").unlink(), "instruction"),
    "empty task": (lambda r: rewrite_tasks(r, ["a", " ", "b"]), "without an instruction"),
    "task index": (lambda r: rewrite_tasks(r, ["a"]), "task_index of a frame is outside"),
    "episode order": (lambda r: edit_column(r, "episode_index", lambda v: v[::-1]), "out of order"),
    "NaN action": (
        lambda r: edit_column(r, "action", lambda v: [*v[:5], [np.nan] * 7, *v[6:]]),
        "action of frame 5",
    ),
    "bad image": (
        lambda r: edit_column(r, FRONT, lambda v: [{"bytes": b"none", "path": None}, *v[1:]]),
        "image cannot be decoded",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_data_set_is_one_clear_error(copy: Path, damage: str) -> None:
    break_it, message = DAMAGES[damage]
    break_it(copy)
    with pytest.raises(DatasetError, match=message) as error:
        open_dataset(copy)
    assert str(copy) in str(error.value)


def test_a_full_disk_is_an_error_before_it_is_a_crash(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(copy)._replace(free=1000)
    monkeypatch.setattr("ceed_vla.data.frame_cache.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DatasetError, match="make room"):
        open_dataset(copy)


# ---- foreign files -------------------------------------------------------------------------------


def info_with(**changes: Any) -> Callable[[Path], Any]:
    return lambda root: edit_info(root, lambda info: info.update(changes))


def feature_with(name: str, **changes: Any) -> Callable[[Path], Any]:
    return lambda root: edit_info(root, lambda info: info["features"][name].update(changes))


def camera_called(name: str) -> Callable[[Path], Any]:
    return lambda root: edit_info(
        root, lambda i: i["features"].update({name: i["features"].pop(FRONT)})
    )


def column_with(name: str, first: Any) -> Callable[[Path], Any]:
    return lambda root: edit_column(root, name, lambda values: [first, *values[1:]])


def retyped(name: str, kind: Any, change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def edit(root: Path) -> None:
        table = pq.read_table(data_file(root))
        index = table.column_names.index(name)
        column = pa.array([change(value) for value in table[name].to_pylist()], kind)
        pq.write_table(table.set_column(index, name, column), data_file(root))

    return edit


def picture(
    mode: str = "RGB", size: tuple[int, int] = (96, 96), kind: str = "PNG"
) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


INFO: dict[str, tuple[Any, str]] = {
    "a list": (lambda r: (r / "meta" / "info.json").write_text("[]"), "instead of settings"),
    "deep": (lambda r: (r / "meta" / "info.json").write_text("[" * 100_000), "is not JSON"),
    "bytes": (lambda r: (r / "meta" / "info.json").write_bytes(b"\xff\xfe"), "is not JSON"),
    "no version": (info_with(codebase_version=None), "format None"),
    "version 31": (info_with(codebase_version=3), "format 3"),
    "fps 0": (info_with(fps=0), "fps is '0'"),
    "fps -5": (info_with(fps=-5), "fps"),
    "fps NaN": (info_with(fps=float("nan")), "fps"),
    "fps text": (info_with(fps="10"), "fps"),
    "fps true": (info_with(fps=True), "fps"),
    "no features": (lambda r: edit_info(r, lambda i: i.pop("features")), "features"),
    "features list": (info_with(features=[1]), "features"),
    "empty features": (info_with(features={}), "features"),
    "feature text": (lambda r: edit_info(r, lambda i: i["features"].update(action="x")), "action"),
    "dtype": (feature_with("action", dtype=5), "action"),
    "dtype object": (feature_with("action", dtype="object"), "dtype of action"),
    "text dtype": (feature_with("observation.state", dtype="string"), "dtype of observation.state"),
    "shape": (feature_with("action", shape="7"), "action"),
    "no shape": (feature_with("action", shape=None), "action"),
    "negative shape": (feature_with("action", shape=[-7]), "action"),
    "huge shape": (feature_with("action", shape=[10**12]), "action"),
    "large shape": (feature_with("action", shape=[10**9]), "shape|lengths"),
    "long vector": (feature_with("action", shape=[70_000]), "at most 65536 values"),
    "other shape": (feature_with("action", shape=[6]), "lengths"),
    "camera shape": (feature_with(FRONT, shape=[96, 96]), "shape of observation.images.front"),
    "grey camera": (feature_with(FRONT, shape=[96, 96, 1]), "shape of observation.images.front"),
    "huge camera": (
        feature_with(FRONT, shape=[10**4, 10**4, 3]),
        "shape of observation.images.front",
    ),
    "large camera": (feature_with(FRONT, shape=[8192, 8192, 3]), "frame 0 has the shape"),
    "absolute camera": (camera_called("/tmp/victim"), "plain name"),
    "camera outside": (camera_called("../victim"), "plain name"),
    "camera nowhere": (camera_called(".."), "plain name"),
    "empty camera": (camera_called(""), "plain name"),
    "odd camera": (camera_called("a\x00b"), "plain name"),
    "another camera": (camera_called("top"), "decoded"),
    "frames": (info_with(total_frames=51), "51 frames"),
    "no frames": (info_with(total_frames=0), "no frame"),
    "frames text": (info_with(total_frames="50"), "total_frames"),
    "episodes": (info_with(total_episodes=5), "out of order"),
    "episodes text": (info_with(total_episodes=None), "total_episodes"),
}
ROWS: dict[str, tuple[Any, str]] = {
    "null action": (column_with("action", None), "lengths"),
    "null in an action": (column_with("action", [None] * 7), "nulls"),
    "short action": (retyped("action", pa.list_(pa.float32()), lambda v: v[:6]), "lengths"),
    "lengths differ": (
        retyped("action", pa.list_(pa.float32()), lambda v: v[: 6 + (v[0] > 0.1)]),
        "lengths",
    ),
    "text action": (
        retyped("action", pa.list_(pa.string()), lambda v: [str(x) for x in v]),
        "must be numbers",
    ),
    "plain action": (retyped("action", pa.float32(), lambda v: v[0]), "values in 50 rows"),
    "huge action": (column_with("action", [1e30] * 7), "beyond 1e"),
    "overflow": (
        retyped("action", pa.list_(pa.float64()), lambda v: [1e300] * 7),
        "must be finite",
    ),
    "huge state": (column_with("observation.state", [3e38] * 14), "beyond 1e"),
    "one time": (retyped("timestamp", pa.float32(), lambda v: 0.0), "0.1 s apart"),
    "NaN time": (retyped("timestamp", pa.float32(), lambda v: float("nan")), "0.1 s apart"),
    "slow": (retyped("timestamp", pa.float32(), lambda v: 50 * v), "0.1 s apart"),
    "late": (column_with("timestamp", float("inf")), "0.1 s apart"),
    "bomb": (
        retyped("action", pa.list_(pa.float32()), lambda v: [0.0] * 10**4),
        "action has 500000 values in 50 rows",
    ),
    "images bomb": (
        retyped(FRONT, pa.list_(pa.int8()), lambda v: [0] * 10**4),
        "front has 500000 values",
    ),
    "NaN state": (column_with("observation.state", [float("nan")] * 14), "must be finite"),
    "null episode": (column_with("episode_index", None), "nulls"),
    "negative episode": (column_with("episode_index", -1), "out of order"),
    "huge episode": (retyped("episode_index", pa.int64(), lambda v: v * 2**40), "out of order"),
    "episode text": (retyped("episode_index", pa.string(), str), "must be numbers"),
    "episode 0.5": (retyped("episode_index", pa.float64(), lambda v: v + 0.0), "whole numbers"),
    "null task": (column_with("task_index", None), "nulls"),
    "negative task": (column_with("task_index", -1), "task_index of a frame is outside"),
    "huge task": (column_with("task_index", 2**40), "task_index of a frame is outside"),
    "index": (column_with("index", 7), "out of order"),
    "no index": (lambda r: drop_column(r, "index"), "index"),
    "no action": (lambda r: drop_column(r, "action"), "action"),
    "no camera": (lambda r: drop_column(r, FRONT), "decoded"),
    "tasks are numbers": (lambda r: rewrite_tasks(r, [1, 2, 3]), "without an instruction"),
    "tasks twice": (lambda r: rewrite_tasks(r, ["a", "b", "c"], [0, 0, 1]), "task_index"),
    "tasks bomb": (lambda r: rewrite_tasks(r, ["a"] * 10**6, [0] * 10**6), "says 1000000 rows in"),
    "tasks are no parquet": (
        lambda r: (r / "meta" / "tasks.parquet").write_bytes(b"x"),
        "cannot be read",
    ),
}
PICTURES: dict[str, tuple[Any, str]] = {
    "one pixel": (column_with(FRONT, picture(size=(1, 1))), r"frame 0 has the shape \(1, 1, 3\)"),
    "turned": (column_with(WRIST, picture(size=(96, 95))), r"\(95, 96, 3\)"),
    "bomb": (column_with(FRONT, picture(size=(12_000, 12_000), mode="1")), "shape|bomb"),
    "depth": (column_with(FRONT, picture("I;16")), "8-bit"),
    "format": (column_with(FRONT, picture(kind="EPS")), "decoded"),
    "no bytes": (column_with(FRONT, {"bytes": None, "path": "/etc/hostname"}), "no bytes"),
    "empty bytes": (column_with(FRONT, {"bytes": b"", "path": None}), "decoded"),
    "null": (column_with(FRONT, None), "no bytes"),
}


def drop_column(root: Path, name: str) -> None:
    pq.write_table(pq.read_table(data_file(root)).drop_columns([name]), data_file(root))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("damage", [*INFO, *ROWS, *PICTURES])
def test_nothing_that_a_data_set_says_wrongly_is_believed(copy: Path, damage: str) -> None:
    break_it, message = {**INFO, **ROWS, **PICTURES}[damage]
    break_it(copy)
    with pytest.raises(DatasetError, match=message):
        open_dataset(copy)


@pytest.mark.parametrize(
    "frames",
    [
        np.array([-1]),
        np.array([50]),
        np.array([10**9]),
        np.array([0.0]),
        np.array([True]),
        np.array([["1"]]),
        [1.5],
        np.array([[1]]),
        None,
        3,
        "0",
        ["0"],
        np.array([np.nan]),
    ],
    ids=str,
)
def test_other_indices_never_index(store: FrameStore, frames: Any) -> None:
    for read in (store.batch, store.chunks):
        with pytest.raises(DatasetError, match=r"frames 0\.\.49"):
            read(frames, CHUNK)
    with pytest.raises(DatasetError, match="chunk_size"):
        store.chunks(np.array([0]), 0)
    assert len(store.chunks([0, 49], CHUNK)[0]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["meta/info.json", "meta/tasks.parquet", "data", "meta/episodes"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_read(video: Path, place: str, kind: str) -> None:
    file = next(
        f for f in (video / place, *sorted((video / place).rglob("*.parquet"))) if f.is_file()
    )
    file.unlink()
    file.symlink_to("/dev/zero") if kind == "device" else os.mkfifo(file)
    with pytest.raises(DatasetError, match=r"not a folder, pipe or device|no meta/info\.json"):
        open_dataset(video)


def test_recorded_times_may_jitter(copy: Path) -> None:
    edit_column(copy, "timestamp", lambda v: [t + 0.009 * (-1) ** i for i, t in enumerate(v)])
    assert len(open_dataset(copy)) == 50


# ---- decoded images ------------------------------------------------------------------------------


def test_a_cache_that_lies_is_decoded_again(copy: Path) -> None:
    first = open_dataset(copy).images[FRONT][3].copy()
    cached = copy / ".frames" / f"{FRONT}.npy"
    whole = cached.read_bytes()
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    lies = [b"", whole[:1000], objects.getvalue(), b"PK\x03\x04", whole.replace(b"|u1", b"|i1", 1)]
    for lie in lies:
        cached.write_bytes(lie)
        np.testing.assert_array_equal(open_dataset(copy).images[FRONT][3], first)
    for lie in ("{", "", json.dumps({"shapes": {}, "files": []})):
        (copy / ".frames" / "complete.json").write_text(lie)
        np.testing.assert_array_equal(open_dataset(copy).images[FRONT][3], first)


def test_a_cache_folder_of_somebody_else_is_left_alone(copy: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim" / f"{FRONT}.npy"
    victim.parent.mkdir()
    victim.write_text("keep me")
    (copy / ".frames").symlink_to(victim.parent)
    with pytest.raises(DatasetError, match="is a link"):
        open_dataset(copy)
    (copy / ".frames").unlink()
    shutil.copytree(victim.parent, copy / ".frames")
    with pytest.raises(DatasetError, match=r"no complete\.json"):
        open_dataset(copy)
    assert victim.read_text() == (copy / ".frames" / f"{FRONT}.npy").read_text() == "keep me"
    shutil.rmtree(copy / ".frames")
    (copy / ".frames").mkdir()
    (copy / ".frames" / "complete.json").symlink_to(victim)  # replaced, not followed
    (copy / ".frames" / f"{FRONT}.npy").symlink_to(victim)
    open_dataset(copy)
    assert victim.read_text() == "keep me"


def test_no_room_for_images(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fallocate(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", fallocate)
    with pytest.raises(DatasetError, match="make room"):
        open_dataset(copy)
    assert [file.name for file in (copy / ".frames").iterdir()] == ["complete.json"]
    monkeypatch.undo()
    open_dataset(copy)


@pytest.mark.parametrize("missing", ["meta/episodes", "videos"])
def test_videos_never_ask_a_hub(video: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked for a name"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    shutil.rmtree(video / missing)
    with pytest.raises(DatasetError, match="copy it, too"):
        open_dataset(video)


@pytest.mark.parametrize(
    ("column", "value"), [("chunk_index", -1), ("file_index", 7), ("from_timestamp", 99.0)]
)
def test_videos_elsewhere(video: Path, column: str, value: Any) -> None:
    file = next((video / "meta" / "episodes").rglob("*.parquet"))
    table = pq.read_table(file)
    name = f"videos/{FRONT}/{column}"
    table = table.set_column(table.column_names.index(name), name, pa.array([value] * len(table)))
    pq.write_table(table, file)
    with pytest.raises(DatasetError, match=r"has the place|no video|cannot be decoded"):
        open_dataset(video)
