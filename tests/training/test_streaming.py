"""A streamed dataset has the batches of the decoded one; the step determines the draws.

Memory is limited.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ceed_vla.data import frame_stream
from ceed_vla.data.frame_stream import StreamedImages, StreamingConfig
from ceed_vla.data.frames import FrameStore, open_dataset
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.training.distill import distill
from ceed_vla.training.distill_data import TrajectoriesConfig
from ceed_vla.training.mixture import Mixture
from ceed_vla.training.spans import SlidingSpans
from ceed_vla.training.teacher import train
from ceed_vla.training.trajectories import collect, read_trajectories

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
CHUNK = 4
LENGTHS = (70, 33, 5)  # spans of 32, 32, 6; 32, 1; 5 frames
# of the four spans of the demonstrations
TWO_SPANS = StreamingConfig(above_gb=0, memory_gb=0.0075)
ALL = StreamingConfig(above_gb=0)  # all spans of the small sets fit


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes, one camera as a video and one as stored images."""
    from lerobot.datasets import LeRobotDataset

    shape = {"shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    features = {
        FRONT: {"dtype": "video", **shape},
        WRIST: {"dtype": "image", **shape},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    root = tmp_path_factory.mktemp("mixed") / "data"
    dataset = LeRobotDataset.create("local/data", 10, features, root=root, use_videos=True)
    random = np.random.default_rng(0)
    for length in LENGTHS:
        for step in range(length):
            images = {
                name: random.integers(0, 255, (64, 64, 3)).astype(np.uint8)
                for name in (FRONT, WRIST)
            }
            vector = np.full(2, step, np.float32)
            dataset.add_frame(
                {**images, "observation.state": vector, "action": vector, "task": "go"}
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def data_file(root: Path) -> Path:
    return next((root / "data").rglob("*.parquet"))


def assert_same_batches(one: FrameStore, other: FrameStore) -> None:
    random, last = np.random.default_rng(0), len(one) - 1
    for frames in ([0, last, 0], [31, 32], np.arange(last + 1), random.integers(len(one), size=64)):
        expected, batch = one.batch(frames, CHUNK), other.batch(frames, CHUNK)  # type: ignore[arg-type]
        assert expected.keys() == batch.keys()
        for name, value in expected.items():
            equal = value == batch[name]
            assert equal if name == "task" else equal.all()


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_gb", [0.5, 0.0016])
def test_batches_are_those_of_the_decoded_set(mixed: Path, memory_gb: float) -> None:
    streamed = open_dataset(mixed, streaming=StreamingConfig(above_gb=0, memory_gb=memory_gb))
    decoded = open_dataset(mixed)
    assert streamed.together == int(memory_gb * 1e9 / 2 / 32 / (2 * 64 * 64 * 3))
    assert decoded.together == np.inf
    assert streamed.shapes == decoded.shapes
    assert streamed.digest == decoded.digest
    assert decoded.edges.tolist() == [0, 32, 64, 70, 102, 103, 108]
    assert_same_batches(decoded, streamed)


def test_spans_lie_across_row_groups_and_files(copy: Path, store: FrameStore) -> None:
    table, file = pq.read_table(data_file(copy)), data_file(copy)
    pq.write_table(table[:20], file, row_group_size=6)
    pq.write_table(table[20:], file.with_stem("file-001"), row_group_size=7)
    assert_same_batches(store, open_dataset(copy, streaming=TWO_SPANS))
    assert_same_batches(store, open_dataset(copy))


def test_memory_is_bounded(studio: Any) -> None:
    stores = [open_dataset(root, streaming=TWO_SPANS) for root in (studio.demo, studio.other)]
    for store in stores:
        store.batch(np.arange(len(store)), CHUNK)
    assert sum(span.nbytes for span in frame_stream._held.values()) <= TWO_SPANS.memory_gb * 1e9


def test_a_span_is_decoded_once_while_it_is_open(
    studio: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = Mixture([open_dataset(studio.demo, streaming=TWO_SPANS)], None, 0, CHUNK)
    decoded = []
    read = frame_stream.ImageReader.read
    monkeypatch.setattr(
        frame_stream.ImageReader,
        "read",
        lambda *where: decoded.append(where[1:]) or read(*where),  # type: ignore[func-returns-value]
    )
    for step in range(25):  # four passes of 50 frames
        mixture.draw(8, step)
    assert len(decoded) <= 2 * (4 * 4 + 2)  # cameras, passes and spans


# ---- which datasets are streamed ----------------------------------------------------------------


def test_the_size_decides(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = 50 * 2 * 96 * 96 * 3 / 1e9
    with caplog.at_level(logging.INFO):
        assert open_dataset(copy, streaming=StreamingConfig(above_gb=0.99 * size)).together < np.inf
    assert "0.00276 GB of images, more than streaming.above_gb" in caplog.text
    assert "streamed; batches are drawn from" in caplog.text
    assert not (copy / ".frames").exists()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert open_dataset(copy, streaming=StreamingConfig(above_gb=size)).together == np.inf
    assert "decoded into files" in caplog.text
    later = open_dataset(copy, decode=False)
    later.decode(ALL)
    assert all(isinstance(images, StreamedImages) for images in later.images.values())


@pytest.mark.parametrize(
    "settings", [{"above_gb": -1}, {"memory_gb": 0}, {"above_gb": float("nan")}]
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"streaming\."):
        StreamingConfig(**settings)


# ---- the order -----------------------------------------------------------------------------------


EDGES = np.array([0, 32, 64, 70, 102, 103, 108, 140, 150])


def order(seed: int = 0, most: int = 3) -> SlidingSpans:
    return SlidingSpans(EDGES, most, seed)


def test_every_span_takes_its_turn_once_a_pass() -> None:
    opened = [order().open(step * 150 / 8).tolist() for step in range(24)]
    turns = [spans[0] for spans in opened]
    assert all(one[1:] == other[:-1] for one, other in pairwise(opened))  # the open spans slide
    passes = [turns[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(spans) == list(range(8)) for spans in passes)
    assert passes[0] != passes[1] != passes[2]
    assert turns != [order(seed=1).open(step * 150 / 8)[0] for step in range(24)]


def test_draws_follow_from_the_step() -> None:
    def draw(spans: SlidingSpans, step: int) -> list[int]:
        return spans.draw(np.random.default_rng([0, step]), 16, step * 16).tolist()

    whole = order()
    drawn = [draw(whole, step) for step in range(200)]
    # as in a resumed run
    assert all(draw(order(), step) == drawn[step] for step in (0, 7, 150, 199))
    for step in (0, 7, 150):
        spans = np.searchsorted(EDGES, drawn[step], side="right") - 1
        assert set(spans.tolist()) <= set(whole.open(step * 16).tolist())
    counts = np.bincount(np.concatenate(drawn), minlength=150)
    assert counts.min() > 0
    assert (
        np.abs(np.add.reduceat(counts, EDGES[:-1]) / np.diff(EDGES) / counts.mean() - 1).max() < 0.5
    )


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_draw(studio: Any, world: int) -> None:
    stores = [open_dataset(root, streaming=TWO_SPANS) for root in (studio.demo, studio.other)]
    mixture = Mixture(stores, [1, 5], 0, CHUNK)
    assert mixture.spans[0] is not None
    whole = mixture.draw(12, 5)["observation.state"]
    parts = torch.cat(
        [mixture.draw(12, 5, rank, world)["observation.state"] for rank in range(world)]
    )
    assert sorted(parts.tolist()) == sorted(whole.tolist())


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture
def from_maps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Read streamed images from the decoded set: the same frames are drawn, without streaming."""

    def read(images: StreamedImages, frames: np.ndarray) -> np.ndarray:
        return open_dataset(images.reader.info.root).images[images.camera][frames]

    return lambda: monkeypatch.setattr(StreamedImages, "__getitem__", read)


def test_losses_are_those_of_the_decoded_set(
    studio: Any,
    tmp_path: Path,
    read_log: Callable[..., dict[int, float]],
    from_maps: Callable[[], None],
    interrupt_at: Callable[[int], None],
) -> None:
    folders = [shutil.copytree(studio.demo, tmp_path / name) for name in ("demo", "grounding")]
    for folder in folders:
        shutil.rmtree(folder / ".frames", ignore_errors=True)

    def losses(name: str, **changes: Any) -> dict[int, float]:
        roots = {"roots": str(folders[0]), "grounding_roots": str(folders[1])}
        train(
            studio.train_config(
                tmp_path / name, **{**roots, "streaming": TWO_SPANS, "steps": 6, **changes}
            )
        )
        return read_log(tmp_path / name)

    streamed = losses("streamed")
    interrupt_at(7)
    with pytest.raises(KeyboardInterrupt):
        losses("resumed")
    interrupt_at(-1)
    assert losses("resumed", resume=True) == streamed
    fits = losses("fits", streaming=ALL)
    assert not (folders[0] / ".frames").exists()
    assert losses("decoded", streaming=StreamingConfig()) == fits != streamed
    from_maps()
    assert losses("same frames") == streamed


def test_trajectories_and_students_are_those_of_the_decoded_set(
    studio: Any,
    tmp_path: Path,
    read_log: Callable[..., dict[int, float]],
    from_maps: Callable[[], None],
) -> None:
    collected = read_trajectories(
        collect(studio.collect_config(tmp_path / "collected", streaming=TWO_SPANS))
    )
    expected = read_trajectories(studio.trajectories)
    for name in ("root", "frame", "fixed_point", "guess", "previous"):
        np.testing.assert_array_equal(getattr(collected, name), getattr(expected, name))

    def losses(name: str, **changes: Any) -> dict[int, float]:
        distill(
            studio.distill_config(
                tmp_path / name, **{"streaming": TWO_SPANS, "steps": 4, **changes}
            )
        )
        return read_log(tmp_path / name)

    streamed = losses("streamed")
    assert (
        losses("fits", streaming=ALL) == losses("decoded", streaming=StreamingConfig()) != streamed
    )
    online = {"trajectories": TrajectoriesConfig(online=True)}
    drawn = losses("online", **online)
    from_maps()
    assert losses("same frames") == streamed
    assert losses("online, same frames", **online) == drawn


# ---- what can be wrong ---------------------------------------------------------------------------


def test_what_cannot_be_decoded_is_one_clear_error(mixed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mixed, tmp_path / "copy")
    whole = open_dataset(copy, streaming=StreamingConfig(above_gb=0, memory_gb=0.0016))
    next((copy / "videos").rglob("*.mp4")).write_bytes(b"none")
    with pytest.raises(DatasetError, match=f"{copy}: an image cannot be decoded"):
        whole.batch(np.array([100]), CHUNK)
    with pytest.raises(DatasetError, match="an image cannot be decoded"):
        open_dataset(copy, streaming=ALL)
    shutil.rmtree(copy / "videos")
    with pytest.raises(DatasetError, match="There is no video"):
        open_dataset(copy, streaming=ALL)


def test_a_bad_image_is_named_when_it_is_drawn(copy: Path) -> None:
    table, file = pq.read_table(data_file(copy)), data_file(copy)
    images = table.column(FRONT).to_pylist()
    images[40] = {"bytes": None, "path": "elsewhere.png"}
    index = table.column_names.index(FRONT)
    pq.write_table(table.set_column(index, table.schema.field(index), [images]), file)
    store = open_dataset(copy, streaming=ALL)
    store.batch(np.arange(38), CHUNK)
    with pytest.raises(DatasetError, match="front of frame 40 has no bytes"):
        store.batch(np.array([39]), CHUNK)  # in the same span
    with pytest.raises(DatasetError, match=r"frames 0\.\.49"):
        store.batch(np.array([50]), CHUNK)


def test_memory_that_holds_no_span(copy: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"a span of 32 frames takes 0\.00177 GB decoded, .* Raise it"
    ):
        open_dataset(copy, streaming=StreamingConfig(above_gb=0, memory_gb=0.003))
