"""LeRobotDatasets as arrays: decoded once into memory-mapped files, then read by index."""

from __future__ import annotations

import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ceed_vla.errors import DatasetError

CACHE = ".frames"
ImageMaps = dict[str, NDArray[np.uint8]]
Decoder = Callable[[Path, Sequence[Path], ImageMaps], None]
STATE, ACTION, ENVIRONMENT = "observation.state", "action", "observation.environment_state"


@dataclass
class FrameStore:
    """Frames of one LeRobotDataset, as arrays over the frame index.

    Attributes:
        root: The data set's folder.
        images: Camera feature -> (N, H, W, 3) uint8, memory-mapped.
        state: (N, D) float32.
        action: (N, A) float32, None for an action-free set.
        environment_state: (N, E) float32 or None.
        task: (N,) index into `tasks`.
        tasks: Instructions.
        episode: (N,) episode index.
        episode_end: (N,) one past the last frame of the frame's episode.
        fps: Frames a second [Hz].
    """

    root: Path
    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    action: NDArray[np.float32] | None
    environment_state: NDArray[np.float32] | None
    task: NDArray[np.int64]
    tasks: list[str]
    episode: NDArray[np.int64]
    episode_end: NDArray[np.int64]
    fps: float

    def __len__(self) -> int:
        return len(self.state)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every feature of one frame."""
        vectors = {STATE: self.state, ACTION: self.action, ENVIRONMENT: self.environment_state}
        return {
            name: array.shape[1:] for name, array in {**self.images, **vectors}.items() if array is not None
        }

    def batch(self, frames: NDArray[np.int64], chunk_size: int) -> dict[str, Any]:
        """Raw batch (before the pre-processor) of the given frames.

        Args:
            frames: (B,) frame indices.
            chunk_size: Steps of the action chunk; it is cut at the end of the episode and padded with its last action.

        Returns:
            Cameras (B, 3, H, W) float in [0, 1], state (B, D), ``task`` strings, and where the set has them
            ``action`` (B, m, A) with ``action_is_pad`` (B, m) and ``observation.environment_state`` (B, E).
        """
        batch: dict[str, Any] = {
            name: torch.from_numpy(images[frames]).permute(0, 3, 1, 2).float().div_(255)
            for name, images in self.images.items()
        }
        batch[STATE] = torch.from_numpy(self.state[frames])
        batch["task"] = [self.tasks[i] for i in self.task[frames]]
        if self.environment_state is not None:
            batch[ENVIRONMENT] = torch.from_numpy(self.environment_state[frames])
        if self.action is not None:
            batch[ACTION], batch["action_is_pad"] = self.chunks(frames, chunk_size)
        return batch

    def chunks(self, frames: NDArray[np.int64], chunk_size: int) -> tuple[Tensor, Tensor]:
        """Action chunks (B, m, A) from `frames` (B,) on and which steps lie past the episode's end (B, m)."""
        if self.action is None:
            raise DatasetError(f"{self.root} holds no actions.")
        steps = frames[:, None] + np.arange(chunk_size)  # (B, m)
        last = self.episode_end[frames][:, None] - 1
        return torch.from_numpy(self.action[np.minimum(steps, last)]), torch.from_numpy(steps > last)


def read_chunks(root: str | Path, chunk_size: int) -> Tensor:
    """The action chunk (N, m, A) that starts at every frame of a data set; its images are not decoded.

    Raises:
        DatasetError: The folder holds no readable data set, or one without actions.
    """
    root = Path(root)
    features = _read_info(root)["features"]
    if ACTION not in features:
        raise DatasetError(f"{root} holds no actions; it has {', '.join(features)}.")
    arrays = _read_columns(root, sorted((root / "data").rglob("*.parquet")), [ACTION])
    episode, frames = arrays["episode_index"], np.arange(len(arrays[ACTION]))
    last = np.searchsorted(episode, episode, side="right") - 1
    return torch.from_numpy(
        arrays[ACTION][np.minimum(frames[:, None] + np.arange(chunk_size), last[:, None])]
    )


def open_dataset(root: str | Path) -> FrameStore:
    """Read a LeRobotDataset v3 from a local folder; images are decoded once into ``<root>/.frames``.

    Raises:
        DatasetError: The folder holds no readable data set, or one without camera, state or instruction.
    """
    root = Path(root)
    info = _read_info(root)
    features = info["features"]
    cameras = [name for name, f in features.items() if f["dtype"] in ("image", "video")]
    if STATE not in features:
        raise DatasetError(f"{root}: the data set has no {STATE}; it has {', '.join(features)}.")
    if not cameras:
        raise DatasetError(f"{root}: the data set has no camera; it has {', '.join(features)}.")
    files = sorted((root / "data").rglob("*.parquet"))
    arrays = _read_columns(root, files, [c for c in (STATE, ACTION, ENVIRONMENT) if c in features])
    episode, task, tasks = arrays["episode_index"], arrays["task_index"], _read_tasks(root)
    if (np.diff(episode) < 0).any() or task.min() < 0 or task.max() >= len(tasks):
        raise DatasetError(
            f"{root}: the episodes or the instructions of the frames are out of order; record it again."
        )
    return FrameStore(
        root=root,
        images=_images(root, files, features, cameras, len(episode)),
        state=arrays[STATE],
        action=arrays.get(ACTION),
        environment_state=arrays.get(ENVIRONMENT),
        task=task,
        tasks=tasks,
        episode=episode,
        episode_end=np.searchsorted(episode, episode, side="right"),
        fps=float(info["fps"]),
    )


def _read_info(root: Path) -> dict[str, Any]:
    file = root / "meta" / "info.json"
    if not file.is_file():
        raise DatasetError(
            f"No LeRobotDataset at {root}: no meta/info.json there. Record one with `ceed-vla record`."
        )
    try:
        info = json.loads(file.read_text())
        version = str(info["codebase_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{file} is damaged ({type(error).__name__}: {error}).") from error
    if not version.startswith("v3."):
        raise DatasetError(
            f"{root} has LeRobot's format {version}, this needs v3; convert it with LeRobot's tools."
        )
    return info


def _read_columns(root: Path, files: Sequence[Path], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Numeric columns: (N, D) float32 for `names`, (N,) int64 for the episode and task indices."""
    indices = ["episode_index", "task_index"]
    try:
        table = pa.concat_tables([pq.read_table(file, columns=[*names, *indices]) for file in files])
        arrays = {name: np.stack(table[name].to_numpy()) for name in (*names, *indices)} if len(table) else {}
    except Exception as error:  # pyarrow raises its own kinds, and KeyError or ValueError for odd columns
        raise DatasetError(
            f"{root}: a data file cannot be read ({error}); the recording was not finalised."
        ) from error
    if not arrays:
        raise DatasetError(f"{root}: the data set has no frame.")
    arrays |= {name: arrays[name].astype(np.float32).reshape(len(table), -1) for name in names}
    for name in names:
        bad = np.flatnonzero(~np.isfinite(arrays[name]).all(axis=1))
        if len(bad):
            raise DatasetError(f"{root}: {name} of frame {bad[0]} is not finite ({len(bad)} such frames).")
    return arrays | {name: arrays[name].astype(np.int64) for name in indices}


def _read_tasks(root: Path) -> list[str]:
    """Instructions in the order of their index."""
    try:
        table = pq.read_table(root / "meta" / "tasks.parquet").to_pandas()
        tasks = [str(task) for task in table.sort_values("task_index").index]
    except Exception as error:
        raise DatasetError(
            f"{root}: meta/tasks.parquet cannot be read ({error}); every frame needs its instruction (`task`)."
        ) from error
    if not tasks or not all(task.strip() for task in tasks):
        raise DatasetError(f"{root}: the data set has frames without an instruction (`task`).")
    return tasks


def _images(
    root: Path, files: Sequence[Path], features: dict[str, Any], cameras: Sequence[str], frames: int
) -> dict[str, NDArray[np.uint8]]:
    """Memory maps of every camera, decoded first where that was not done for these very files."""
    shapes = {c: (frames, *_image_shape(features[c])) for c in cameras}
    sources = [*files, *sorted((root / "videos").rglob("*.mp4"))]
    stamps = [[str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns] for f in sources]
    key = json.dumps({"shapes": shapes, "files": stamps})
    cache = root / CACHE
    done = cache / "complete.json"
    if not (done.is_file() and done.read_text() == key):
        cache.mkdir(exist_ok=True)
        videos = any(features[c]["dtype"] == "video" for c in cameras)
        _decode_images(root, files, shapes, cache, _decode_videos if videos else _decode_pngs)
        done.write_text(key)
    return {c: np.load(cache / f"{c}.npy", mmap_mode="r") for c in cameras}


def _decode_images(
    root: Path, files: Sequence[Path], shapes: dict[str, tuple[int, ...]], cache: Path, decode: Decoder
) -> None:
    needed = sum(math.prod(shape) for shape in shapes.values())
    if shutil.disk_usage(cache).free < needed:  # a memory map on a full disk would kill the process
        raise DatasetError(f"{cache} needs {needed / 1e9:.1f} GB for the decoded images; make room there.")
    # Decode beside the final names: another process may be reading, or decoding the same.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        names = {camera: Path(folder) / f"{camera}.npy" for camera in shapes}
        maps = {
            camera: np.lib.format.open_memmap(names[camera], mode="w+", dtype=np.uint8, shape=shape)
            for camera, shape in shapes.items()
        }
        try:
            decode(root, files, maps)
        except Exception as error:  # Pillow, pyarrow and the video decoders each raise their own kinds
            raise DatasetError(
                f"{root}: an image cannot be decoded ({type(error).__name__}: {error})."
            ) from error
        for camera, array in maps.items():
            array.flush()
            names[camera].replace(cache / names[camera].name)


def _image_shape(feature: dict[str, Any]) -> list[int]:
    """(H, W, 3), whichever order the data set names."""
    shape, names = list(feature["shape"]), feature.get("names") or [""]
    return [*shape[1:], shape[0]] if str(names[0]).startswith("channel") else shape


def _decode_pngs(root: Path, files: Sequence[Path], maps: ImageMaps) -> None:
    def fill(item: tuple[str, int, bytes]) -> None:
        camera, index, data = item
        maps[camera][index] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    first = 0
    with (
        ThreadPoolExecutor(2) as pool,
        tqdm(total=_frames(maps), desc=f"decoding {root.name}", unit="frame") as progress,
    ):
        for file in files:
            for rows in pq.ParquetFile(file).iter_batches(256, columns=list(maps)):
                items = [
                    (camera, first + i, rows.column(camera)[i]["bytes"].as_py())
                    for camera in maps
                    for i in range(rows.num_rows)
                ]
                list(pool.map(fill, items, chunksize=32))
                first += rows.num_rows
                progress.update(rows.num_rows)


def _decode_videos(root: Path, files: Sequence[Path], maps: ImageMaps) -> None:
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset(repo_id=f"local/{root.name}", root=root)
    for index in tqdm(range(_frames(maps)), desc=f"decoding {root.name}", unit="frame"):
        item = dataset[index]
        for camera, array in maps.items():
            array[index] = (item[camera].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def _frames(maps: ImageMaps) -> int:
    return len(next(iter(maps.values())))
