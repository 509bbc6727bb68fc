"""Recording: what each mode stores, and what remains after interrupts and full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ceed_vla.data.files import read_info, read_rows
from ceed_vla.data.statistics import image_statistics, vector_statistics
from ceed_vla.data.writer import DatasetWriter
from ceed_vla.errors import DatasetError
from ceed_vla.sim.record import RecordSummary, _Session, record
from ceed_vla.sim.tabletop.tasks import TASKS


def read(root: Path, **options: Any) -> LeRobotDataset:
    return LeRobotDataset("local/test", root=root, video_backend="pyav", **options)


def rows(root: Path) -> list[dict[str, Any]]:
    """All stored rows (images as PNG bytes), from any number of files."""
    return [
        row
        for path in sorted(root.glob("data/*/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


# -- modes --


def test_clean_episodes_read_back_as_action_chunks(tmp_path: Path, config: Any) -> None:
    root = tmp_path / "clean"
    summary = record(config(root, episodes=4, env={"task": "all"}))
    data = read(root, delta_timestamps={"action": [i / 10 for i in range(8)]})
    assert len(data) == summary.frames
    assert (
        data.num_episodes
        == summary.episodes
        == sum("recorded" in name for name in summary.outcomes)
    )
    assert {name.split("/")[0] for name in summary.outcomes} == set(TASKS)
    first, last = data[0], data[len(data) - 1]
    assert first["observation.images.front"].shape == (3, 96, 96)
    assert float(first["observation.images.front"].max()) <= 1.0
    assert first["observation.state"].shape == (14,)
    assert first["action"].shape == (8, 7)
    assert first["task"]
    assert not first["action_is_pad"].any()
    assert last["action_is_pad"].tolist() == [False] + [True] * 7
    assert "observation.environment_state" in data.meta.features
    assert data.meta.fps == 10
    assert data.meta.robot_type == "ceed_tabletop"
    assert set(data.meta.stats["action"]) >= {"min", "max", "mean", "std", "q01", "q99"}


def test_other_words_for_the_task(tmp_path: Path, config: Any) -> None:
    record(config(tmp_path / "told", episodes=1, instruction="do it"))
    assert read(tmp_path / "told")[0]["task"] == "do it"
    # a recording of an earlier version is resumed
    assert "instruction" not in config(tmp_path / "as-before").identity()


def test_recorded_actions_replay_to_success(tmp_path: Path, config: Any) -> None:
    import gymnasium

    root = tmp_path / "clean"
    record(config(root, episodes=1))
    env = gymnasium.make("ceed_vla/Tabletop-v0", task="push_cube", cameras=())
    env.reset(seed=0)
    solved = [env.step(np.array(row["action"], dtype=np.float32))[2] for row in rows(root)]
    env.close()
    assert solved[-1]
    assert not any(solved[:-1])


def test_perturbed_attempts_split_at_bursts(tmp_path: Path, config: Any) -> None:
    root = tmp_path / "perturb"
    summary = record(
        config(root, mode="perturb", env={"task": "cube_in_bin"}, excursion_fraction=1.0)
    )
    seeds = json.loads((root / "recording.json").read_text())["progress"]["episode_seeds"]
    assert summary.episodes == len(seeds) > len(set(seeds))
    lengths = Counter(row["episode_index"] for row in rows(root))
    assert max(lengths.values()) <= 19
    assert next(row["frame_index"] for row in rows(root) if row["episode_index"] == 1) == 0


def test_grounding_frames_have_own_tasks_and_no_action(tmp_path: Path, config: Any) -> None:
    root = tmp_path / "grounding"
    summary = record(
        config(root, mode="grounding", env={"task": "mixed"}, episodes=10, scenes_per_episode=6)
    )
    data = read(root)
    assert (summary.episodes, summary.frames) == (2, 20)
    assert "action" not in data.meta.features
    assert len({data[i]["task"] for i in range(12)}) > 3
    states = np.stack([row["observation.state"] for row in rows(root)])
    assert len(np.unique(states[:, :3].round(4), axis=0)) == 20


def test_a_summary_counts_in_words() -> None:
    clean = RecordSummary(Path("demos"), 1, 41, 2, {"push/recorded": 1, "push/failed": 1})
    assert (
        str(clean)
        == "demos: 41 frames in 1 episode, from 2 attempts: push/failed 1, push/recorded 1"
    )
    scenes = RecordSummary(Path("scenes"), 1, 40, 20, {"push/recorded": 20}, scenes=200)
    assert (
        str(scenes)
        == "scenes: 40 frames in 1 episode, from 20 scenes (a grounding episode stores up to 200 "
        "scenes, without actions): push/recorded 20"
    )


# -- interrupts, full disks, resume --


@contextmanager
def before_it_is_stored(hook: Callable[[Any], None]) -> Iterator[None]:
    """Call `hook` with every attempt that is about to be stored."""
    store = _Session.store

    def watched(self: _Session, attempts: list[Any]) -> None:
        for attempt in attempts:
            hook(attempt)
        store(self, attempts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Session, "store", watched)
        yield


@pytest.mark.parametrize(
    ("mode", "options"), [("clean", {}), ("grounding", {"scenes_per_episode": 2})]
)
def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, mode: str, options: dict[str, Any], config: Any
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    record(config(whole, episodes=4, mode=mode, **options))

    def interrupt(attempt: Any) -> None:
        if attempt.seed == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_it_is_stored(interrupt):
        record(config(broken, episodes=4, mode=mode, **options))
    assert 0 < len(read(broken)) < len(rows(whole))
    summary = record(config(broken, episodes=4, mode=mode, resume=True, **options))
    assert rows(broken) == rows(whole)
    assert summary.attempts == 4
    statistics = [
        json.loads((root / "meta" / "stats.json").read_text()) for root in (whole, broken)
    ]
    np.testing.assert_allclose(
        statistics[0]["observation.state"]["mean"],
        statistics[1]["observation.state"]["mean"],
        rtol=1e-6,
    )
    assert (
        record(config(broken, episodes=4, mode=mode, resume=True, **options)).frames
        == summary.frames
    )


@pytest.mark.slow
def test_workers_record_the_same(tmp_path: Path, config: Any) -> None:
    record(config(tmp_path / "alone", episodes=5, mode="perturb"))

    def interrupt(attempt: Any) -> None:
        if attempt.seed == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_it_is_stored(interrupt):
        record(config(tmp_path / "shared", episodes=5, mode="perturb", workers=2))
    record(config(tmp_path / "shared", episodes=5, mode="perturb", resume=True))
    assert rows(tmp_path / "shared") == rows(tmp_path / "alone")
    options = {
        "mode": "takeover",
        "policy_path": "student",
        "decoding": "cap1",
        "batch": 2,
        "seed": 30_000,
    }
    for workers, name in ((1, "driven"), (2, "driven_by_two")):
        record(config(tmp_path / name, episodes=4, workers=workers, **options))
    assert rows(tmp_path / "driven_by_two") == rows(tmp_path / "driven")


def test_sigterm_is_an_interrupt(tmp_path: Path, config: Any) -> None:
    def kill(attempt: Any) -> None:
        if attempt.seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), before_it_is_stored(kill):
        record(config(tmp_path / "set", episodes=3))
    assert read(tmp_path / "set").num_episodes == 1


def test_full_disk_leaves_readable_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any
) -> None:
    root = tmp_path / "set"
    written = []
    write_table = pq.ParquetWriter.write_table

    def failing(self: pq.ParquetWriter, table: Any, *args: Any, **kwargs: Any) -> None:
        if "frame_index" in table.column_names:
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(table)
        write_table(self, table, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", failing)
    with pytest.raises(DatasetError, match=r"disk is full.*2 episodes"):
        record(config(root, episodes=4, commit_frames=1))
    monkeypatch.undo()
    assert read(root).num_episodes == 2
    assert record(config(root, episodes=4, resume=True)).episodes == 4
    assert len(read(root)) == len(rows(root))


def test_little_room_stops_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any
) -> None:
    answers = iter([True, True, False])
    monkeypatch.setattr(DatasetWriter, "has_room", lambda self: next(answers))
    with pytest.raises(DatasetError, match=r"disk is full.*2 episodes"):
        record(config(tmp_path / "set", episodes=4))
    assert read(tmp_path / "set").num_episodes == 2


@pytest.mark.parametrize("victim", ["write_tasks", "write_stats", "write_info"])
def test_half_done_commit_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, fake_frames: Any, new_writer: Any
) -> None:
    root = tmp_path / "set"
    writer = new_writer(root)
    writer.add_episode(fake_frames(5, "first"))
    writer.commit({"done": 1})

    def broken(value: Any, folder: Path) -> None:
        name = {
            "write_tasks": "tasks.parquet",
            "write_stats": "stats.json",
            "write_info": "info.json",
        }[victim]
        (folder / "meta" / name).write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"ceed_vla.data.writer.{victim}", broken)
    writer.add_episode(fake_frames(7, "second"))
    with pytest.raises(OSError, match="No space"):
        writer.commit({"done": 2})
    monkeypatch.undo()
    writer = new_writer(root)  # what a new process does after a kill at this point
    assert (writer.episodes, writer.frames, writer.progress) == (1, 5, {"done": 1})
    assert len(read(root)) == 5
    writer.add_episode(fake_frames(3, "third"))
    writer.commit({"done": 2})
    assert [read(root)[i]["task"] for i in (0, 5)] == ["first", "third"]


# -- the writer and its numbers --


def test_writer_stores_images_without_loss(
    tmp_path: Path, fake_frames: Any, new_writer: Any
) -> None:
    writer = new_writer(tmp_path / "set")
    frames = fake_frames(4)
    writer.add_episode(frames)
    writer.commit({})
    stored = (read(tmp_path / "set")[2]["observation.images.front"] * 255).round().byte().numpy()
    np.testing.assert_array_equal(stored.transpose(1, 2, 0), frames[2]["observation.images.front"])


def test_vectors_of_one_number_are_stored_as_lerobot_does(tmp_path: Path) -> None:
    features = {
        "observation.images.top": {
            "dtype": "image",
            "shape": (8, 8, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (1,), "names": ["x"]},
        "action": {"dtype": "float32", "shape": (1,), "names": ["dx"]},
    }
    writer = DatasetWriter(
        tmp_path / "set", repo_id="local/test", fps=10, features=features, robot_type="test"
    )
    image = np.zeros((8, 8, 3), np.uint8)
    states = [np.array([i], np.float32) for i in range(4)]
    frames = [
        {"observation.images.top": image, "observation.state": s, "action": -s, "task": "go"}
        for s in states
    ]
    writer.add_episode(frames)
    writer.commit({})
    read = LeRobotDataset("local/test", root=tmp_path / "set")
    assert [float(read[i]["action"]) for i in range(4)] == [0.0, -1.0, -2.0, -3.0]
    info = read_info(tmp_path / "set")
    assert read_rows(info, ["observation.state"])["observation.state"].tolist() == [
        [0.0],
        [1.0],
        [2.0],
        [3.0],
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"action": np.zeros(3, np.float32)},
        {"action": np.zeros(2, np.float64)},
        {"action": np.array([np.nan, 0], np.float32)},
        {"observation.images.front": np.zeros((8, 9, 3), np.uint8)},
        {"task": ""},
        {"extra": np.zeros(1, np.float32)},
    ],
)
def test_writer_refuses_malformed_frames(
    tmp_path: Path, change: dict[str, Any], fake_frames: Any, new_writer: Any
) -> None:
    writer = new_writer(tmp_path / "set")
    with pytest.raises(DatasetError):
        writer.add_episode([{**fake_frames(1)[0], **change}])
    assert writer.episodes == 0


def test_statistics_match_numpy() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    stats, pixels = image_statistics(images), images.reshape(-1, 3) / 255
    np.testing.assert_allclose(stats["mean"].ravel(), pixels.mean(axis=0))
    np.testing.assert_allclose(stats["std"].ravel(), pixels.std(axis=0))
    np.testing.assert_allclose(stats["q90"].ravel(), np.quantile(pixels, 0.9, axis=0), atol=2 / 255)
    np.testing.assert_allclose(stats["min"].ravel(), pixels.min(axis=0))
    np.testing.assert_allclose(stats["max"].ravel(), pixels.max(axis=0))
    assert vector_statistics(np.arange(5))["q50"] == [2]
    assert vector_statistics(np.ones((1, 3)))["std"].tolist() == [0, 0, 0]
