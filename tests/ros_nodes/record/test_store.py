"""Episodes on disk: readable by LeRobot and by training, whole or absent, whatever fails."""

from __future__ import annotations

import errno
import io
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image

from ceed_vla.data.frames import open_dataset
from ceed_vla.data.videos import VideoEncoder
from ceed_vla.data.writer import DatasetWriter
from ceed_vla.errors import DatasetError
from ceed_vla.ros_nodes.record.episode import Row
from ceed_vla.ros_nodes.record.plan import Plan, StoredCamera
from ceed_vla.ros_nodes.record.store import EpisodeStore
from ceed_vla.ros_nodes.robot.images import read_compressed, read_image

CAMERA = "observation.images.front"


def plan(root: Path, **changes: Any) -> Plan:
    whole = Plan(
        root=root,
        fps=10,
        robot_type="arm",
        format="h264",
        cameras={CAMERA: StoredCamera()},
        states={"observation.state": 3},
        action_names=("a", "b"),
    )
    return replace(whole, **changes)


def raw(pixels: np.ndarray) -> bytes:
    """A serialized sensor_msgs/Image."""
    height, width, _ = pixels.shape
    header = struct.pack("<BBBBiIIxxxxII", 0, 1, 0, 0, 1, 0, 1, height, width)
    encoding = struct.pack("<I5sBxxI", 5, b"rgb8\0", 0, 3 * width)
    return header + encoding + struct.pack("<I", pixels.size) + pixels.tobytes()


def jpeg(pixels: np.ndarray) -> bytes:
    """A serialized sensor_msgs/CompressedImage."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    data = buffer.getvalue()
    header = struct.pack("<BBBBiIIxxxxI5sxxxI", 0, 1, 0, 0, 1, 0, 1, 5, b"jpeg\0", len(data))
    return header + data


def pixels_of(index: int, height: int = 32, width: int = 48) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : 2 * index] = [250, 40, 120]
    return pixels


def row(index: int, pixels: np.ndarray | None = None) -> Row:
    image = read_image(raw(pixels_of(index) if pixels is None else pixels))
    values = {
        "observation.state": np.full(3, index, np.float32),
        "action": np.array([index, -index], np.float32),
    }
    return Row({CAMERA: image}, values, intervention=index % 4 == 3)


def stored(store: EpisodeStore, frames: int, *, success: bool = True) -> None:
    for index in range(frames):
        store.add(row(index), "wipe the table")
    store.end(success=success)


@pytest.mark.parametrize("format", ["h264", "av1", "png"])
def test_lerobot_and_training_read_what_was_stored(tmp_path: Path, format: str) -> None:
    root = tmp_path / "data"
    store = EpisodeStore(plan(root, format=format))
    stored(store, 12)
    stored(store, 7, success=False)
    assert (store.episodes, store.frames) == (2, 19)
    data = LeRobotDataset("local/data", root=root)
    for place, index in ((0, 0), (5, 5), (11, 11), (12, 0), (18, 6)):
        frame = data[place]
        red = frame[CAMERA][0].numpy() > 0.5
        assert abs(red.sum() / 32 - 2 * index) <= 1
        assert frame["action"].tolist() == [index, -index]
        assert frame["task"] == "wipe the table"
        assert bool(frame["intervention"]) == (index % 4 == 3)
    assert [i for i in range(19) if data[i]["next.success"]] == [11]
    assert data.meta.features[CAMERA]["dtype"] == ("image" if format == "png" else "video")
    assert 0.0 < data.meta.stats[CAMERA]["mean"][0].item() < 1.0
    trained = open_dataset(root)
    assert trained.images[CAMERA].shape == (19, 32, 48, 3)


def test_a_recording_is_continued_only_if_told(tmp_path: Path) -> None:
    root = tmp_path / "data"
    stored(EpisodeStore(plan(root)), 5)
    with pytest.raises(DatasetError, match="holds a recording; set resume"):
        EpisodeStore(plan(root))
    with pytest.raises(DatasetError, match="this recording writes"):
        EpisodeStore(plan(root, resume=True, states={"observation.state": 4}))
    store = EpisodeStore(plan(root, resume=True))
    stored(store, 4)
    assert (store.episodes, store.frames) == (2, 9)
    assert len(open_dataset(root)) == 9
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(DatasetError, match="holds other files"):
        EpisodeStore(plan(tmp_path / "other", resume=True))


def test_a_discarded_episode_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    store = EpisodeStore(plan(root))
    stored(store, 5)
    before = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    for index in range(30):
        store.add(row(index), "wipe the table")
    store.discard()
    assert {path: path.stat().st_size for path in root.rglob("*") if path.is_file()} == before
    with pytest.raises(DatasetError, match="The episode has no frame"):
        store.end(success=True)


@pytest.mark.parametrize("where", ["encoder", "tables", "room"])
def test_a_full_disk_ends_the_episode_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    root = tmp_path / "data"
    store = EpisodeStore(plan(root))
    stored(store, 5)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "encoder":
            patch.setattr(VideoEncoder, "_encode_one", full)
        elif where == "tables":
            patch.setattr(DatasetWriter, "_write_metadata", full)
        else:
            patch.setattr(DatasetWriter, "has_room", lambda _: False)
        with pytest.raises((OSError, DatasetError), match=r"No space|nearly full"):
            stored(store, 6)
    store.discard()
    assert len(open_dataset(root)) == 5
    stored(store, 6)
    assert len(open_dataset(root)) == 11
    assert len(LeRobotDataset("local/data", root=root)) == 11


@pytest.mark.timeout(60)
def test_an_encoder_that_fails_at_the_end_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(encoder: VideoEncoder) -> None:
        while encoder._next() is not None:
            pass
        raise OSError(errno.ENOSPC, "No space left on device")

    def begins(encoder: VideoEncoder) -> None:
        encoder._next()
        time.sleep(0.2)  # the queue fills meanwhile
        raise OSError(errno.ENOSPC, "No space left on device")

    for fails in (ends, begins):
        monkeypatch.setattr(VideoEncoder, "_encode", fails)
        encoder = VideoEncoder(tmp_path / "closed.mp4", 10, "h264")
        encoder.add(pixels_of(0))
        with pytest.raises(OSError, match="No space"):
            encoder.close()
        encoder = VideoEncoder(tmp_path / "cancelled.mp4", 10, "h264")
        while not encoder._images.full():
            encoder.add(pixels_of(0))
            if fails is ends:
                break
        encoder.cancel()


def test_another_robot_or_order_of_joints_is_another_data_set(tmp_path: Path) -> None:
    root = tmp_path / "data"
    stored(EpisodeStore(plan(root)), 3)
    for changes, why in (
        ({"action_names": ("b", "a")}, "stores action of a, b; this recording writes b, a"),
        ({"robot_type": "other"}, "is of the robot arm; this recording is of other"),
    ):
        with pytest.raises(DatasetError, match=why):
            EpisodeStore(plan(root, resume=True, **changes))
    stored(EpisodeStore(plan(root, resume=True)), 3)


def test_images_that_do_not_fit(tmp_path: Path) -> None:
    store = EpisodeStore(plan(tmp_path / "odd"))
    with pytest.raises(DatasetError, match="is 47 x 31 pixels; a video needs even numbers"):
        store.add(row(0, pixels_of(0, 31, 47)), "wipe the table")
    store = EpisodeStore(plan(tmp_path / "data", cameras={CAMERA: StoredCamera((0, 0, 30, 40))}))
    stored(store, 3)
    assert open_dataset(tmp_path / "data").images[CAMERA].shape == (3, 30, 40, 3)
    scaled = StoredCamera((0, 0, 30, 40), (16, 16))
    stored(EpisodeStore(plan(tmp_path / "small", cameras={CAMERA: scaled})), 3)
    assert open_dataset(tmp_path / "small").images[CAMERA].shape == (3, 16, 16, 3)


def test_a_damaged_image_is_replaced_by_the_one_before(tmp_path: Path) -> None:
    store = EpisodeStore(plan(tmp_path / "data"))
    good = read_compressed(jpeg(pixels_of(8)))
    damaged = replace(good, data=good.data[: good.begin + 300] + bytes(len(good.data)))
    for image in (good, damaged, good):
        store.add(replace(row(0), images={CAMERA: image}), "wipe the table")
    assert store.damaged == 1
    store.end(success=True)
    images = open_dataset(tmp_path / "data").images[CAMERA]
    np.testing.assert_allclose(images[1], images[0], atol=3)
