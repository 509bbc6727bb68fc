"""Settings and data that `ceed-vla collect` refuses, and foreign trajectories."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ceed_vla
from ceed_vla.errors import CheckpointError, ConfigError, DatasetError
from ceed_vla.training.trajectories import collect, read_trajectories
from tests.helpers.trajectories import table_of

# ---- refusals ------------------------------------------------------------------------------------


def test_another_teacher_is_refused(studio: Any, tmp_path: Path) -> None:
    other = shutil.copytree(studio.teacher, tmp_path / "other")
    policy, pre, post = ceed_vla.load(other)
    with torch.no_grad():
        policy.backbone.head.bias += 0.1
    from ceed_vla.checkpoints import save

    save(other, policy, pre, post)
    with pytest.raises(CheckpointError, match="collected from teacher"):
        read_trajectories(studio.trajectories, other)
    with pytest.raises(ConfigError, match="other teacher"):
        collect(studio.collect_config(studio.trajectories, policy_path=str(other), resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": ""}, "output_dir"),
        ({"roots": ""}, "--roots"),
        ({"frame_stride": 4}, "must divide n_action_steps = 2"),
        ({"frame_stride": 0}, r"frame_stride is 0.*\[1, 1e9\]"),
        ({"max_frames": -5}, "max_frames is -5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 100_000}, "threads is 100000"),
        ({"num_shards": 0}, "num_shards is 0"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "gpu"}, "gpu"),
        ({"guesses": "1,2"}, "shares of previous, mid, random"),
        ({"guesses": "a,b,c"}, "must be numbers"),
        ({"guesses": "nan,1,1"}, "must be numbers"),
        ({"guesses": "inf,1,1"}, "must be numbers"),
        ({"guesses": "-1,1,1"}, "must be numbers"),
        ({"guesses": "0,0,0"}, "shares"),
        ({"num_shards": 2, "shard_index": 2}, r"0\.\.1"),
    ],
)
def test_bad_settings(studio: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        collect(studio.collect_config(tmp_path / "bad", **changes))


def test_other_settings_in_the_same_folder(studio: Any) -> None:
    with pytest.raises(ConfigError, match="other states, seed"):
        collect(studio.collect_config(studio.trajectories, seed=5, states=False, resume=True))


def test_data_that_the_teacher_cannot_read(
    studio: Any, tmp_path: Path, write_dataset: Callable[..., Path]
) -> None:
    root = write_dataset(tmp_path / "other", (5,), cameras=["observation.images.top"])
    with pytest.raises(DatasetError, match="does not fit the policy"):
        collect(studio.collect_config(tmp_path / "bad", roots=str(root)))
    assert not (tmp_path / "bad").exists()


def test_nothing_collected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="ceed-vla collect"):
        read_trajectories(tmp_path)


# ---- foreign files ------------------------------------------------------------------------------


@pytest.fixture
def copy(studio: Any, tmp_path: Path) -> Path:
    return shutil.copytree(studio.trajectories, tmp_path / "copy")


META_DAMAGES: list[dict[str, Any]] = [
    {"num_bins": "63"},
    {"num_bins": 0},
    {"num_bins": 10**6},
    {"chunk_size": None},
    {"chunk_size": -4},
    {"action_dim": 1.5},
    {"block_length": True},
    {"shards": 0},
    {"shards": "2"},
    {"shards": 1},
    {"states": 1},
    {"teacher": None},
    {"datasets": None},
    {"datasets": []},
    {"datasets": [1, 2]},
    {"datasets": [{"name": "demo"}]},
    {"datasets": [{"name": "demo", "frames": -1}]},
    {"datasets": [{"name": "demo", "frames": 50}]},
    {"datasets": [{"name": "demo", "frames": 50}, {"name": "other", "frames": 5}]},
    {"chunk_size": 5, "block_length": 35},
    {"num_bins": 3},
    {"states": False},
]


@pytest.mark.parametrize("change", META_DAMAGES, ids=str)
def test_a_damaged_meta_file_is_an_error(copy: Path, change: dict[str, Any]) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(DatasetError, match=re.escape(str(copy))):
        read_trajectories(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "[" * 10_000, "{}"])
def test_a_meta_file_that_is_no_mapping(studio: Any, copy: Path, text: str) -> None:
    (copy / "meta.json").write_text(text)
    with pytest.raises(DatasetError, match=r"meta\.json"):
        read_trajectories(copy)
    with pytest.raises(DatasetError, match=r"meta\.json"):
        collect(studio.collect_config(copy, resume=True))


def changed(
    name: str, change: Callable[[list[Any]], list[Any]], kind: Any = None
) -> Callable[[Any], Any]:
    def edit(table: Any) -> Any:
        index = table.column_names.index(name)
        column = pa.array(change(table[name].to_pylist()), kind or table.schema.field(index).type)
        return table.set_column(index, name, column)

    return edit


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value, *values[1:]]


SHARD_DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "negative frame": (changed("frame", first(-1)), "frame is -1"),
    "frame beyond": (changed("frame", first(10**9)), "frame is"),
    "frame twice": (changed("frame", first(1)), "at most once"),
    "no frame": (changed("frame", first(None)), "frame has 1 empty"),
    "frames as text": (changed("frame", lambda v: [str(x) for x in v], pa.string()), "columns"),
    "root beyond": (changed("root", first(7)), "root is"),
    "negative root": (changed("root", first(-1)), "root is -1"),
    "guess kind": (changed("guess_kind", first("best")), "guess_kind"),
    "iterations": (changed("iterations", first(0)), "iterations is 0"),
    "more iterations": (changed("iterations", first(99)), r"iterations \+ 1 blocks"),
    "tokens beyond": (changed("fixed_point", first([63] * 28)), "fixed_point has tokens"),
    "negative tokens": (changed("guess", first([-1] * 28)), "guess has tokens"),
    "half a previous": (changed("previous", first([-1] * 27 + [0])), "previous has tokens"),
    "short block": (changed("fixed_point", first([0] * 27)), r"blocks of 27\.\.28"),
    "empty block": (changed("previous", first(None)), "previous has 1 empty"),
    "empty token": (changed("guess", first([None] * 28)), "guess has 28 empty"),
    "states of 9999": (
        changed("states", lambda v: [[9999] * len(x) for x in v]),
        "states has tokens",
    ),
    "other states": (changed("states", first([0] * 56)), "states"),
    "wide tokens": (changed("guess", lambda v: v, pa.list_(pa.int64())), "columns"),
    "no states": (lambda t: t.drop_columns(["states"]), "columns"),
    "another column": (lambda t: t.append_column("more", t["frame"]), "columns"),
    "bomb": (
        lambda t: t.set_column(
            6, "fixed_point", pa.array([[0] * 1000] * len(t), pa.list_(pa.int16()))
        ),
        "fixed_point has 50000 values in 50 rows",
    ),
    "no rows": (lambda t: t.slice(0, 0), "0 rows"),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
def test_a_damaged_shard_is_an_error(studio: Any, copy: Path, damage: str) -> None:
    break_it, message = SHARD_DAMAGES[damage]
    file = copy / "data0-00000.parquet"
    pq.write_table(break_it(pq.read_table(file)), file)
    with pytest.raises(DatasetError, match=f"data0-00000.*{message}"):
        read_trajectories(copy)
    with pytest.raises(DatasetError, match=f"data0-00000.*{message}"):
        collect(studio.collect_config(copy, resume=True))
    assert file.exists()


@pytest.mark.parametrize("name", ["data0-00000.parquet", "meta.json"])
def test_pipes_are_not_read(studio: Any, copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(DatasetError, match=r"pipe or device|no meta\.json"):
        read_trajectories(copy)
    with pytest.raises(DatasetError, match=r"pipe or device|no meta\.json"):
        collect(studio.collect_config(copy, resume=True))


def test_shards_that_are_none(studio: Any, copy: Path) -> None:
    shard = copy / "data0-00000.parquet"
    shutil.copy(shard, copy / "data0-00001.parquet")
    with pytest.raises(DatasetError, match=r"3 shards, its meta\.json says 2"):
        read_trajectories(copy)
    (copy / "data1-00000.parquet").unlink()
    with pytest.raises(DatasetError, match="more than one"):
        read_trajectories(copy)
    (copy / "data0-00001.parquet").rename(copy / "data1-00000.parquet")
    with pytest.raises(DatasetError, match="50 rows for 13"):
        read_trajectories(copy)
    (copy / "data1-00000.parquet").rename(copy / "notes.parquet")
    with pytest.raises(DatasetError, match=r"notes\.parquet is not a shard"):
        read_trajectories(copy)
    (copy / "notes.parquet").unlink()
    shard.write_bytes(shard.read_bytes()[:-300])
    with pytest.raises(DatasetError, match=r"data0-00000\.parquet cannot be read"):
        read_trajectories(copy)
    (copy / "meta.json").unlink()
    with pytest.raises(ConfigError, match=r"no meta\.json"):
        collect(studio.collect_config(copy, resume=True))


def test_a_shard_of_other_frames_is_not_taken_for_done(studio: Any, copy: Path) -> None:
    file = copy / "data0-00000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 20), file)
    read_trajectories(copy)  # a reader does not have the list of expected frames
    with pytest.raises(DatasetError, match="20 other frames"):
        collect(studio.collect_config(copy, resume=True))


def test_collections_before_the_block_length_was_written_go_on(studio: Any, copy: Path) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    del meta["block_length"]
    for described in meta["datasets"]:
        del described["digest"]
    (copy / "meta.json").write_text(json.dumps(meta))
    (copy / "data1-00000.parquet").unlink()
    collect(studio.collect_config(copy, resume=True))
    assert table_of(copy) == table_of(studio.trajectories)
