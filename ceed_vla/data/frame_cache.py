"""Images of a LeRobotDataset as memory maps, decoded once into the folder ``<root>/.frames``.

``complete.json`` has the SHA-256 of the maps and of the files that they were decoded from, so that
maps of other files are never used. A file is hashed again if its size, times or inode have changed;
programs cannot set the change time, so it reveals every change. Opening a dataset again therefore
reads no images.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ceed_vla.data.files import Info, data_files
from ceed_vla.data.images import ImageReader
from ceed_vla.errors import DatasetError
from ceed_vla.files import read_json, regular, write_text

CACHE, COMPLETE = ".frames", "complete.json"
# With a coarse clock, a file that changes right after it was read may have the same times.
_UNSETTLED_NS = 2 * 10**9
_HASHED_TOGETHER = 4  # files
_LARGEST_RECORD = 2**26  # [bytes]

Shapes = dict[str, tuple[int, ...]]  # camera -> (N, H, W, 3)
ImageMaps = dict[str, NDArray[np.uint8]]


def read_images(info: Info, rows: dict[str, NDArray[Any]]) -> ImageMaps:
    """Open memory maps (N, H, W, 3) of every camera; decode the images unless that was done.

    Args:
        info: The dataset.
        rows: ``episode_index`` and ``timestamp`` of all frames.

    Raises:
        DatasetError: The disk is full, or ``.frames`` is not ours.
    """
    root = info.root
    cache = info.root / CACHE
    shapes: Shapes = {camera: (info.frames, *shape) for camera, shape in info.cameras.items()}
    sources = [*data_files(root), *(videos := sorted((root / "videos").rglob("*.mp4")))]
    if videos:  # these files have the start of each episode in its video
        sources += sorted((root / "meta" / "episodes").rglob("*.parquet"))
    try:
        if cache.is_symlink() or (cache.exists() and not cache.is_dir()):
            raise DatasetError(
                f"{cache} is a link or a file; it must be a folder for decoded images. Remove it."
            )
        foreign = cache.is_dir() and not (cache / COMPLETE).is_file()
        if foreign and any(not file.name.startswith(".") for file in cache.iterdir()):
            raise DatasetError(
                f"{cache} has no {COMPLETE}, so this package did not write its files; move them."
            )
        if (maps := _decoded_before(root, sources, shapes)) is None:
            with _alone(root) as locked:
                maps = _decoded_before(root, sources, shapes)  # perhaps by another process
                if maps is None:
                    for left in cache.glob(".*") if locked else ():  # of a killed process
                        shutil.rmtree(left, ignore_errors=True)
                    known = _described(root, sources)  # before they are read
                    _decode_images(info, rows, shapes, cache)
                    known |= _described(root, _map_files(cache, shapes).values())
                    _write_record(cache, shapes, known)
                    maps = _opened(cache, shapes)
    except OSError as error:
        raise DatasetError(
            f"{cache} cannot be written ({error}); make room, or copy the dataset elsewhere."
        ) from error
    if maps is None:
        raise DatasetError(f"{cache} changed while the images were decoded; start again.")
    return maps


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Let other processes wait until the block ends; yield whether the file system can lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    locked = False
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(descriptor)


def _decoded_before(root: Path, sources: Sequence[Path], shapes: Shapes) -> ImageMaps | None:
    """The maps, if they and their sources match the record, and are uint8 of these shapes."""
    cache = root / CACHE
    files = _map_files(cache, shapes)
    maps = _opened(cache, shapes)
    known, settled_ns = _read_record(cache, shapes)
    if maps is None or known.keys() != {_name(root, f) for f in (*sources, *files.values())}:
        return None
    doubtful = []
    for file in (*sources, *files.values()):
        before = known[_name(root, file)]
        now = _Stamp.of(file)
        if before.size != now.size:
            return None
        if before.stamp != now or now.changed_ns > settled_ns:
            doubtful.append(file)
    if doubtful:
        found = _described(root, doubtful)
        if any(known[name].sha256 != entry.sha256 for name, entry in found.items()):
            return None
        with suppress(OSError):  # a read-only disk
            _write_record(cache, shapes, known | found)
    return maps


def _opened(cache: Path, shapes: Shapes) -> ImageMaps | None:
    """The maps in `cache`, if they are uint8 of these shapes."""
    files = _map_files(cache, shapes)
    opened = np.lib.format.open_memmap
    try:
        maps = {name: opened(regular(file), mode="r") for name, file in files.items()}
    except Exception:  # damaged in any way: decode again
        return None
    right = all(m.dtype == np.uint8 and m.shape == shapes[name] for name, m in maps.items())
    return maps if right else None


def _map_files(cache: Path, shapes: Shapes) -> dict[str, Path]:
    """The file of every camera."""
    return {camera: cache / f"{camera}.npy" for camera in shapes}


# ---- sources and maps -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stamp:
    """Attributes that change with a file's content; only the kernel sets the last two."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> _Stamp:
        found = file.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@dataclass(frozen=True)
class _Described:
    """A file's content, and its stamp when it was read."""

    sha256: str
    stamp: _Stamp

    @classmethod
    def of(cls, file: Path) -> _Described:
        stamp = _Stamp.of(file)
        with regular(file, DatasetError).open("rb") as content:
            return cls(hashlib.file_digest(content, "sha256").hexdigest(), stamp)

    @classmethod
    def read(cls, text: object) -> _Described:
        """Parse an entry of the record; `ValueError` for another text."""
        sha256, *numbers = str(text).split()
        size, modified, changed, inode = map(int, numbers)
        return cls(sha256, _Stamp(size, modified, changed, inode))

    @property
    def size(self) -> int:
        return self.stamp.size

    def __str__(self) -> str:
        return " ".join([self.sha256, *map(str, astuple(self.stamp))])


def _name(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()


def _described(root: Path, files: Iterable[Path]) -> dict[str, _Described]:
    """Content and stamp of files, by their path in the dataset; hashed in parallel."""
    waiting = list(files)
    with ThreadPoolExecutor(min(_HASHED_TOGETHER, os.cpu_count() or 1)) as pool:
        entries = pool.map(_Described.of, waiting)
        bar = tqdm(entries, "hashing", len(waiting), unit="file", delay=1)
        return {_name(root, file): entry for file, entry in zip(waiting, bar, strict=True)}


def _read_record(cache: Path, shapes: Shapes) -> tuple[dict[str, _Described], int]:
    """Files by name, and the change time [ns] up to which stamps count; empty for other shapes."""
    most = _LARGEST_RECORD
    try:
        record = read_json(cache / COMPLETE, DatasetError, most=most, values=most)
        known = {name: _Described.read(text) for name, text in record["files"].items()}
        written_ns = int(record["written_ns"])
    except (DatasetError, ValueError, KeyError, AttributeError, TypeError):
        return {}, 0
    if record.get("shapes") != {camera: list(shape) for camera, shape in shapes.items()}:
        return {}, 0
    return known, written_ns - _UNSETTLED_NS


def _write_record(cache: Path, shapes: Shapes, known: Mapping[str, _Described]) -> None:
    files = {name: str(entry) for name, entry in known.items()}
    record = {"shapes": shapes, "written_ns": time.time_ns(), "files": files}
    write_text(cache / COMPLETE, json.dumps(record))


# ---- decoding ---------------------------------------------------------------------------------


def _decode_images(info: Info, rows: dict[str, NDArray[Any]], shapes: Shapes, cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    if not (cache / COMPLETE).exists():
        write_text(cache / COMPLETE, "")  # marks the folder as ours
    reader = ImageReader(info, rows)
    # Decode into a temporary folder: another process may be reading the maps, or, without locks,
    # decoding the same images.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".") as folder:
        names = _map_files(Path(folder), shapes)
        maps: ImageMaps = {}
        total = info.frames * len(shapes)
        with tqdm(total=total, desc=f"decoding {info.root.name}", unit="image") as progress:
            for camera in shapes:
                for frame, image in enumerate(reader.read(camera, 0, info.frames)):
                    # reserve the space after the first image, whose size was checked
                    if not maps:
                        _check_room(cache, sum(math.prod(shape) for shape in shapes.values()))
                        maps = {
                            name: _reserve(names[name], shape) for name, shape in shapes.items()
                        }
                    maps[camera][frame] = image
                    progress.update()
        for camera, array in maps.items():
            array.flush()  # type: ignore[attr-defined]
            names[camera].replace(cache / names[camera].name)


def _check_room(cache: Path, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DatasetError(
            f"{cache} needs {needed / 1e6:.1f} MB for the decoded images, but {free / 1e6:.1f} MB "
            "are free; make room there, or stream the dataset: lower --streaming.above_gb."
        )


def _reserve(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A memory map with reserved space: on a full disk, writing to one would kill the process."""
    array: NDArray[np.uint8] = np.lib.format.open_memmap(
        file, mode="w+", dtype=np.uint8, shape=shape
    )
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
    return array
