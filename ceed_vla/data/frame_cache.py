"""Images of a LeRobotDataset as memory maps: decoded once into ``<root>/.frames``, which is ours alone."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ceed_vla.data.files import Info, data_files
from ceed_vla.data.images import ImageReader
from ceed_vla.errors import DatasetError
from ceed_vla.files import regular, write_text

CACHE, COMPLETE = ".frames", "complete.json"

Shapes = dict[str, tuple[int, ...]]  # camera -> (N, H, W, 3)
ImageMaps = dict[str, NDArray[np.uint8]]


def read_images(info: Info, rows: dict[str, NDArray[Any]]) -> ImageMaps:
    """Memory maps (N, H, W, 3) of every camera, decoded first where that was not done for these very files.

    `rows` holds ``episode_index`` and ``timestamp`` of all frames. `DatasetError`: no room, or a ``.frames`` not ours.
    """
    root, cache = info.root, info.root / CACHE
    shapes: Shapes = {camera: (info.frames, *shape) for camera, shape in info.cameras.items()}
    sources = [*data_files(root), *(videos := sorted((root / "videos").rglob("*.mp4")))]
    if videos:  # and where in them an episode begins
        sources += sorted((root / "meta" / "episodes").rglob("*.parquet"))
    try:
        stamps = [[str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns] for f in sources]
        key = json.dumps({"shapes": shapes, "files": stamps})
        if cache.is_symlink() or (cache.exists() and not cache.is_dir()):
            raise DatasetError(f"{cache} is a link or a file; images go into a folder of that name. Remove it.")
        foreign = cache.is_dir() and not (cache / COMPLETE).is_file()
        if foreign and any(not file.name.startswith(".") for file in cache.iterdir()):
            raise DatasetError(f"{cache} has no {COMPLETE}, so its files are no images of ours; move them.")
        if (maps := _decoded_before(cache, key, shapes)) is None:
            with _alone(root) as locked:
                if _decoded_before(cache, key, shapes) is None:  # nor did another process meanwhile
                    for left in cache.glob(".*") if locked else ():  # of one that was killed
                        shutil.rmtree(left, ignore_errors=True)
                    _decode_images(info, rows, shapes, cache)
                    write_text(cache / COMPLETE, key)
            maps = _decoded_before(cache, key, shapes)
    except OSError as error:
        raise DatasetError(f"{cache} cannot be written ({error}); make room or choose another.") from error
    if maps is None:
        raise DatasetError(f"{cache} changed while the images were decoded; start again.")
    return maps


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Other processes wait here until this one is done, where the file system can lock, which it says."""
    descriptor, locked = os.open(folder, os.O_RDONLY), False
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(descriptor)


def _decoded_before(cache: Path, key: str, shapes: Shapes) -> ImageMaps | None:
    """The maps, if they are what `key` says; nothing in them is believed but uint8 numbers in these shapes."""
    done, files = cache / COMPLETE, {camera: cache / f"{camera}.npy" for camera in shapes}
    if not done.is_file() or done.stat().st_size != len(key.encode()) or done.read_bytes() != key.encode():
        return None
    try:
        maps = {camera: np.lib.format.open_memmap(regular(file), mode="r") for camera, file in files.items()}
    except Exception:  # whatever is wrong with them, they are decoded again
        return None
    right = all(m.dtype == np.uint8 and m.shape == shapes[camera] for camera, m in maps.items())
    return maps if right else None


def _decode_images(info: Info, rows: dict[str, NDArray[Any]], shapes: Shapes, cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    if not (cache / COMPLETE).exists():
        write_text(cache / COMPLETE, "")  # from here on the folder is ours
    reader = ImageReader(info, rows)
    # Decode beside the final names: another process may be reading, or decoding the same where nothing locks.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".") as folder:
        names = {camera: Path(folder) / f"{camera}.npy" for camera in shapes}
        maps: ImageMaps = {}
        total = info.frames * len(shapes)
        with tqdm(total=total, desc=f"decoding {info.root.name}", unit="image") as progress:
            for camera in shapes:
                for frame, image in enumerate(reader.read(camera, 0, info.frames)):
                    if not maps:  # the first image has the size that the others shall have: now make room
                        _check_room(cache, sum(math.prod(shape) for shape in shapes.values()))
                        maps = {name: _reserve(names[name], shape) for name, shape in shapes.items()}
                    maps[camera][frame] = image
                    progress.update()
        for camera, array in maps.items():
            array.flush()  # type: ignore[attr-defined]
            names[camera].replace(cache / names[camera].name)


def _check_room(cache: Path, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DatasetError(
            f"{cache} needs {needed / 1e6:.1f} MB for the decoded images, and {free / 1e6:.1f} MB are free; "
            "make room there, or stream the set: lower --streaming.above_gb."
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
