"""Images of a LeRobotDataset as memory maps: decoded once into ``<root>/.frames``, which is ours alone."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ceed_vla.data.files import Info, data_files, is_whole, numbers, open_parquet, readable
from ceed_vla.errors import DatasetError
from ceed_vla.files import write_text

CACHE, COMPLETE = ".frames", "complete.json"
FORMATS, MODES = ("PNG", "JPEG", "WEBP"), ("RGB", "RGBA", "L", "P")  # others lose bits or start programs
VIDEO_TOLERANCE = 1e-4  # [s] LeRobot's own
DECODED_TOGETHER = 16  # video frames

Shapes = dict[str, tuple[int, ...]]  # camera -> (N, H, W, 3)
ImageMaps = dict[str, NDArray[np.uint8]]
Decoded = Iterator[tuple[str, int, NDArray[np.uint8]]]  # camera, frame, image (H, W, 3)


def read_images(info: Info, rows: dict[str, NDArray[Any]]) -> ImageMaps:
    """Memory maps (N, H, W, 3) of every camera, decoded first where that was not done for these very files.

    Args:
        info: The data set.
        rows: ``episode_index`` and ``timestamp`` of all frames.

    Raises:
        DatasetError: Images that cannot be decoded or have another size, no room, or a ``.frames`` that is not ours.
    """
    root, cache = info.root, info.root / CACHE
    shapes: Shapes = {camera: (info.frames, *shape) for camera, shape in info.cameras.items()}
    sources = [*data_files(root), *sorted((root / "videos").rglob("*.mp4"))]
    try:
        stamps = [[str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns] for f in sources]
        key = json.dumps({"shapes": shapes, "files": stamps})
        _check_own(cache)
        maps = _decoded_before(cache, key, shapes)
        if maps is None:
            _decode_images(info, rows, shapes, cache)
            write_text(cache / COMPLETE, key)
            maps = _decoded_before(cache, key, shapes)
    except OSError as error:
        raise DatasetError(f"{cache} cannot be written ({error}); make room or choose another.") from error
    if maps is None:
        raise DatasetError(f"{cache} changed while the images were decoded; start again.")
    return maps


def _check_own(cache: Path) -> None:
    """Refuse a ``.frames`` that leads elsewhere, or that holds what we did not write."""
    if cache.is_symlink() or (cache.exists() and not cache.is_dir()):
        raise DatasetError(f"{cache} is a link or a file; images go into a folder of that name. Remove it.")
    foreign = cache.is_dir() and not (cache / COMPLETE).is_file()
    if foreign and any(not file.name.startswith(".") for file in cache.iterdir()):
        raise DatasetError(f"{cache} has no {COMPLETE}, so its files are no images of ours; move them.")


def _decoded_before(cache: Path, key: str, shapes: Shapes) -> ImageMaps | None:
    """The maps, if they are what `key` says; nothing in them is believed but uint8 numbers in these shapes."""
    done, files = cache / COMPLETE, {camera: cache / f"{camera}.npy" for camera in shapes}
    if not done.is_file() or done.stat().st_size != len(key.encode()) or done.read_bytes() != key.encode():
        return None
    if not all(file.is_file() for file in files.values()):
        return None
    try:
        maps = {camera: np.lib.format.open_memmap(file, mode="r") for camera, file in files.items()}
    except Exception:  # whatever is wrong with them, they are decoded again
        return None
    right = all(m.dtype == np.uint8 and m.shape == shapes[camera] for camera, m in maps.items())
    return maps if right else None


def _decode_images(info: Info, rows: dict[str, NDArray[Any]], shapes: Shapes, cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    if not (cache / COMPLETE).exists():
        write_text(cache / COMPLETE, "")  # from here on the folder is ours
    # Decode beside the final names: another process may be reading, or decoding the same.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".") as folder:
        names = {camera: Path(folder) / f"{camera}.npy" for camera in shapes}
        maps: ImageMaps = {}
        total = info.frames * len(shapes)
        with tqdm(total=total, desc=f"decoding {info.root.name}", unit="image") as progress:
            for camera, frame, image in _decoded(info, rows):
                _check_size(info, camera, frame, image.shape)
                if not maps:  # the first image has the size that the others shall have: now make room
                    _check_room(cache, sum(math.prod(shape) for shape in shapes.values()))
                    maps = {camera: _reserve(names[camera], shape) for camera, shape in shapes.items()}
                maps[camera][frame] = image
                progress.update()
        for camera, array in maps.items():
            array.flush()  # type: ignore[attr-defined]
            names[camera].replace(cache / names[camera].name)


def _check_size(info: Info, camera: str, frame: int, shape: tuple[int, ...]) -> None:
    if shape != info.cameras[camera]:
        raise DatasetError(
            f"{info.root}: {camera} of frame {frame} has the shape {shape}, meta/info.json says "
            f"{info.cameras[camera]}; record it again."
        )


def _check_room(cache: Path, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DatasetError(
            f"{cache} needs {needed / 1e6:.1f} MB for the decoded images, and {free / 1e6:.1f} MB are free; "
            "make room there."
        )


def _reserve(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A memory map whose room is certain: on a full disk, writing to one would kill the process."""
    array: NDArray[np.uint8] = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
    return array


# ---- decoders ---------------------------------------------------------------------------------------------------


def _decoded(info: Info, rows: dict[str, NDArray[Any]]) -> Decoded:
    """All images of all cameras."""
    stored = [camera for camera in info.cameras if camera not in info.videos]
    with readable(f"{info.root}: an image cannot be decoded: it"):
        if stored:
            yield from _stored_images(info, stored)
        if info.videos:
            yield from _video_images(info, rows)


def _stored_images(info: Info, cameras: list[str]) -> Decoded:
    def decode(item: tuple[str, int, Any]) -> tuple[str, int, NDArray[np.uint8]]:
        camera, frame, stored = item
        data = stored.get("bytes") if isinstance(stored, dict) else None
        if not isinstance(data, bytes):
            raise DatasetError(f"{info.root}: {camera} of frame {frame} has no bytes in the data files.")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(info, camera, frame, (image.height, image.width, 3))  # before it is unpacked
        if image.mode not in MODES:
            raise DatasetError(f"{info.root}: {camera} of frame {frame} is {image.mode}, not 8-bit RGB.")
        return camera, frame, np.asarray(image.convert("RGB"))

    first = 0
    with ThreadPoolExecutor(2) as pool:
        for file in data_files(info.root):
            for part in open_parquet(file, dict.fromkeys(cameras, ())).iter_batches(256, columns=cameras):
                items = [
                    (camera, first + i, stored)
                    for camera in cameras
                    for i, stored in enumerate(part.column(camera).to_pylist())
                ]
                yield from pool.map(decode, items, chunksize=32)
                first += part.num_rows


def _video_images(info: Info, rows: dict[str, NDArray[Any]]) -> Decoded:
    """LeRobot's decoder on local files: its data set would ask a hub for those that are missing."""
    from lerobot.datasets.video_utils import decode_video_frames

    places = {camera: _video_places(info, camera) for camera in info.videos}
    missing = [str(file) for place in places.values() for file, _ in place if not file.is_file()]
    if missing:
        raise DatasetError(f"There is no video {missing[0]} ({len(missing)} episodes lack theirs); copy them too.")
    ends = np.searchsorted(rows["episode_index"], np.arange(info.episodes), side="right")
    for camera, place in places.items():
        for (file, start), first, end in zip(place, [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            for part in range(first, end, DECODED_TOGETHER):
                times = rows["timestamp"][part : min(part + DECODED_TOGETHER, end)].tolist()
                images = decode_video_frames(file, [start + t for t in times], VIDEO_TOLERANCE, return_uint8=True)
                for i, image in enumerate(images):  # (3, H, W)
                    yield camera, part + i, image.permute(1, 2, 0).numpy()


def _video_places(info: Info, camera: str) -> list[tuple[Path, float]]:
    """File of every episode, and the time in it at which the episode starts [s]."""
    files = sorted((info.root / "meta" / "episodes").rglob("*.parquet"))
    if not files:
        raise DatasetError(f"{info.root} has no meta/episodes, which says where its videos are; copy it too.")
    names = [f"videos/{camera}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    with readable(f"{info.root}/meta/episodes"):
        columns_read = ["episode_index", *names]
        tables = [open_parquet(f, dict.fromkeys(columns_read, ())).read(columns=columns_read) for f in files]
        episode, *columns = (
            np.concatenate([numbers(table[name], (), f"{info.root}: {name}") for table in tables])
            for name in ("episode_index", *names)
        )
    if episode.tolist() != list(range(info.episodes)):
        raise DatasetError(f"{info.root}/meta/episodes does not list episodes 0..{info.episodes - 1}.")
    places = []
    for chunk, file, start in zip(*(column.tolist() for column in columns), strict=True):
        if not (is_whole(chunk, 0) and is_whole(file, 0) and 0 <= start < math.inf):
            raise DatasetError(f"{info.root}/meta/episodes: {camera} has no place {chunk}/{file} at {start} s.")
        name = Path("videos") / camera / f"chunk-{chunk:03d}" / f"file-{file:03d}.mp4"
        places.append((info.root / name, float(start)))
    return places
