"""Collected Jacobi trajectories, compared with the policy's own decoding.

Collections may be interrupted.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import ceed_vla
from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.training.trajectories import Trajectories, collect, read_trajectories
from tests.helpers.trajectories import table_of

SHIFT = 2 * 7  # executed steps times action dimensions of the tiny policy


@pytest.fixture(scope="module")
def collected(studio: Any) -> Trajectories:
    return read_trajectories(studio.trajectories, studio.teacher)


@pytest.fixture(scope="module")
def teacher(studio: Any) -> tuple[Any, Any, Any]:
    return ceed_vla.load(studio.teacher)


def observations(
    studio: Any, teacher: tuple[Any, Any, Any], collected: Trajectories, rows: list[int]
) -> Any:
    stores = [open_dataset(studio.demo), open_dataset(studio.other)]
    parts = [stores[collected.root[row]].batch(collected.frame[[row]], 4) for row in rows]
    batch = {k: torch.cat([p[k] for p in parts]) for k in parts[0] if k != "task"}
    return teacher[1]({**batch, "task": [part["task"][0] for part in parts]})


# ---- contents ------------------------------------------------------------------------------------


def test_every_frame_once(collected: Trajectories) -> None:
    found = sorted(zip(collected.root.tolist(), collected.frame.tolist(), strict=True))
    assert found == [(0, frame) for frame in range(50)] + [(1, frame) for frame in range(13)]


def test_states_end_in_the_autoregressive_block(
    studio: Any, teacher: tuple[Any, Any, Any], collected: Trajectories
) -> None:
    rows = list(range(0, 63, 5))
    result = teacher[0].decode(observations(studio, teacher, collected, rows), "ar")
    np.testing.assert_array_equal(collected.fixed_point[rows], result.tokens.numpy())
    for row in range(len(collected.frame)):
        states = collected.states[row]
        np.testing.assert_array_equal(states[0], collected.guess[row])
        np.testing.assert_array_equal(states[-1], collected.fixed_point[row])
        assert len(states) >= 2
        if len(states) > 2:
            assert (states[1:] != states[:-1]).any(axis=1).all()  # no state is repeated


def test_every_state_is_one_jacobi_update_of_the_one_before(
    studio: Any, teacher: tuple[Any, Any, Any], collected: Trajectories
) -> None:
    rows = [0, 20, 55]
    backbone = teacher[0].backbone
    batch = observations(studio, teacher, collected, rows)
    for i, row in enumerate(rows):
        states = torch.from_numpy(collected.states[row].astype(np.int64))  # (k + 1, n)
        one = {
            k: v[i : i + 1].expand(len(states), *v.shape[1:])
            for k, v in batch.items()
            if torch.is_tensor(v)
        }
        with torch.no_grad():
            _, (logits,) = backbone.packed_logits(backbone.embed_prefix(one), [states])
        updated = logits.argmax(-1)
        assert (updated[:-1] == states[1:]).float().mean() > 0.99  # up to ties in floating point
        assert (updated[-1] == states[-1]).float().mean() > 0.99  # the fixed point


def test_previous_is_the_fixed_point_h_frames_earlier(studio: Any, collected: Trajectories) -> None:
    stores = [open_dataset(studio.demo), open_dataset(studio.other)]
    where = {
        key: i
        for i, key in enumerate(zip(collected.root.tolist(), collected.frame.tolist(), strict=True))
    }
    with_previous = 0
    for row, (root, frame) in enumerate(zip(collected.root, collected.frame, strict=True)):
        episode = stores[root].episode
        if frame >= 2 and episode[frame - 2] == episode[frame]:
            np.testing.assert_array_equal(
                collected.previous[row], collected.fixed_point[where[(int(root), int(frame) - 2)]]
            )
            with_previous += 1
        else:
            assert (collected.previous[row] == -1).all()
    assert with_previous == 63 - 2 * 6  # the first two frames of six episodes have none


def test_guesses_come_in_the_given_shares(
    studio: Any, teacher: tuple[Any, Any, Any], collected: Trajectories
) -> None:
    table = pq.read_table(studio.trajectories / "data0-00000.parquet").to_pydict()
    mid = teacher[0].tokenizer.zero.numpy()
    kinds = {"previous": 0, "mid": 0, "random": 0}
    for i, kind in enumerate(table["guess_kind"]):
        kinds[kind] += 1
        guess, previous = np.array(table["guess"][i]), np.array(table["previous"][i])
        if kind == "previous":
            shifted = np.concatenate([previous[SHIFT:], previous[-7:], previous[-7:]])
            np.testing.assert_array_equal(guess[1:], shifted[1:])  # slot 0 is exact from the start
        elif kind == "mid":
            np.testing.assert_array_equal(guess[1:], mid[1:])
        assert guess[0] == table["fixed_point"][i][0]
    assert kinds["previous"] > kinds["mid"] > 0
    assert kinds["random"] > 0


def test_fixed_points_without_states(studio: Any, collected: Trajectories, tmp_path: Path) -> None:
    collect(studio.collect_config(tmp_path / "ar", states=False))
    found = read_trajectories(tmp_path / "ar", studio.teacher)
    assert found.states == []
    np.testing.assert_array_equal(found.fixed_point, collected.fixed_point)
    np.testing.assert_array_equal(found.previous, collected.previous)


def test_thinned_collections(studio: Any, tmp_path: Path) -> None:
    collect(studio.collect_config(tmp_path / "thin", frame_stride=2, max_frames=1, states=False))
    found = read_trajectories(tmp_path / "thin")
    assert 0 < len(found.frame) < 20  # the minimum is one episode of each dataset
    assert set(found.root) == {0, 1}
    start = open_dataset(studio.demo).episode.searchsorted(open_dataset(studio.demo).episode)
    demo = found.frame[found.root == 0]
    assert ((demo - start[demo]) % 2 == 0).all()


def test_meta_names_what_was_collected(studio: Any) -> None:
    meta = json.loads((studio.trajectories / "meta.json").read_text())
    from ceed_vla.checkpoints import weights_hash

    assert meta["teacher"] == weights_hash(studio.teacher)
    sets = meta["datasets"]
    assert [(s["name"], s["frames"], len(s["digest"])) for s in sets] == [
        ("demo", 50, 16),
        ("other", 13, 16),
    ]
    assert (meta["chunk_size"], meta["action_dim"], meta["num_bins"], meta["shift_steps"]) == (
        4,
        7,
        63,
        2,
    )
    assert meta["guesses"] == pytest.approx({"previous": 0.7, "mid": 0.2, "random": 0.1})
    assert meta["shards"] == 2


# ---- interrupts and several processes ------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ceed_vla.training.trajectories.EPISODES_PER_SHARD", 1)


@pytest.fixture
def whole(studio: Any, small_shards: None, tmp_path: Path) -> dict[str, Any]:
    """Shards of an uninterrupted collection, one per episode."""
    return table_of(collect(studio.collect_config(tmp_path / "whole")))


def test_an_interrupted_collection_keeps_its_shards(
    studio: Any, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written = pq.write_table, []

    def write_table(table: Any, where: Path, **options: Any) -> None:
        if len(written) == 2:
            Path(where).write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(where)
        original(table, where, **options)

    monkeypatch.setattr(pq, "write_table", write_table)
    with pytest.raises(KeyboardInterrupt):
        collect(studio.collect_config(tmp_path / "part"))
    monkeypatch.setattr(pq, "write_table", original)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "part").glob("*.parquet")}
    assert len(kept) == 2
    with pytest.raises(ConfigError, match="--resume=true"):
        collect(studio.collect_config(tmp_path / "part"))
    collect(studio.collect_config(tmp_path / "part", resume=True))
    assert table_of(tmp_path / "part") == whole
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_processes_share_the_shards(
    studio: Any, whole: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in (1, 0):
        collect(studio.collect_config(tmp_path / "two", num_shards=2, shard_index=index))
        if index:
            read_trajectories(tmp_path / "two")
            assert "3 of 6 shards" in caplog.text
    assert table_of(tmp_path / "two") == whole


@pytest.mark.slow
def test_workers_collect_the_same(studio: Any, whole: dict[str, Any], tmp_path: Path) -> None:
    collect(studio.collect_config(tmp_path / "two", workers=2))
    assert table_of(tmp_path / "two") == whole


def test_a_full_disk_leaves_no_half_shard(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_table(table: Any, where: Path, **options: Any) -> None:
        Path(where).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", write_table)
    with pytest.raises(CeedVLAError, match=r"disk full.*--resume=true"):
        collect(studio.collect_config(tmp_path / "part"))
    assert [file.name for file in (tmp_path / "part").iterdir()] == ["meta.json"]
