"""Read the files of a LeRobotDataset v3 except its images, and check them against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ceed_vla.data.broken_values import check_finite
from ceed_vla.data.parquet import MOST, Budget, open_parquet, read_table
from ceed_vla.data.usable import FLAGS
from ceed_vla.errors import DatasetError, raised_as
from ceed_vla.files import plain_name, read_json, regular

STATE = "observation.state"
ACTION = "action"
ENVIRONMENT = "observation.environment_state"
# Columns that order the frames; every LeRobotDataset has them.
BOOKKEEPING = ("index", "episode_index", "frame_index", "task_index", "timestamp", "task")
NUMBERS = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
)
MOST_VALUES = 65_536  # of a vector
LARGEST_IMAGE = 2**13  # [px] of a side
JITTER = 0.2  # of a step between two frames: how far recorded times may differ from 1 / fps ...
TOLERANCE = 1e-4  # [s] ... beyond LeRobot's own tolerance


@dataclass(frozen=True)
class Info:
    """The content of ``meta/info.json`` that training uses."""

    root: Path
    fps: float  # frames a second [Hz]
    frames: int
    episodes: int
    # shapes of state, action and environment state, as far as they exist
    vectors: dict[str, tuple[int, ...]]
    cameras: dict[str, tuple[int, int, int]]  # camera feature -> (H, W, 3)
    videos: tuple[str, ...]  # cameras that are stored as videos
    names: str  # all features
    flags: tuple[str, ...]  # columns of `usable.FLAGS` that exist
    labels: dict[str, list[Any]]  # names of the dimensions of vectors, if they have some
    ignored: tuple[str, ...]  # features that training leaves out, with dtype and shape
    arrays: tuple[str, ...]  # features with two or more dimensions, images excluded


def readable(file: Path | str, remedy: str = "copy it again") -> AbstractContextManager[None]:
    """Re-raise the errors of a reader as a `DatasetError` that names the file."""
    return raised_as(DatasetError, f"{file} cannot be read", f"{remedy}.")


def is_whole(value: object, low: int, high: int = MOST) -> bool:
    """Whether `value`, as found in a file, is a whole number in [low, high]."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def read_info(root: Path) -> Info:
    """Read and check ``meta/info.json``."""
    file = root / "meta" / "info.json"
    if not file.is_file():
        raise DatasetError(
            f"No LeRobotDataset at {root}: no meta/info.json there. `ceed-vla record` makes one."
        )
    info = read_json(file, DatasetError)
    version: Any = info.get("codebase_version")
    fps: Any = info.get("fps")
    features: Any = info.get("features")
    if not (isinstance(version, str) and version.startswith("v3.")):
        raise DatasetError(
            f"{root} has the format {str(version)[:50]}, not v3; convert it with LeRobot's tools."
        )
    for name in ("total_frames", "total_episodes"):
        _require(is_whole(info.get(name), 0), file, name, info.get(name), "a number")
    if not info["total_frames"]:
        raise DatasetError(f"{root}: the dataset has no frames.")
    number = isinstance(fps, int | float) and not isinstance(fps, bool)
    _require(number and 0 < fps <= 10_000, file, "fps", fps, "a number in (0, 10000]")
    _require(
        isinstance(features, dict) and features, file, "features", features, "a mapping of features"
    )
    for name, feature in features.items():
        plain_name(name, f"A feature in {file}", DatasetError)
        fits = isinstance(feature, dict) and isinstance(feature.get("dtype"), str)
        shape: Any = feature.get("shape") if fits else None
        fits = (
            isinstance(shape, list)
            and 0 < len(shape) <= 8
            and all(is_whole(size, 1) for size in shape)
        )
        fits = fits and math.prod(shape) <= MOST
        _require(fits, file, name, feature, "a dtype and a shape of positive numbers")
    vectors = {name: features[name] for name in (STATE, ACTION, ENVIRONMENT) if name in features}
    for name, feature in vectors.items():
        _require(
            feature["dtype"] in NUMBERS,
            file,
            f"the dtype of {name}",
            feature["dtype"],
            "a type of numbers",
        )
        _require(
            math.prod(feature["shape"]) <= MOST_VALUES,
            file,
            name,
            feature,
            f"at most {MOST_VALUES} values",
        )
    images = {name: f for name, f in features.items() if f["dtype"] in ("image", "video")}
    cameras = {name: f for name, f in images.items() if not _is_depth_map(f)}
    flags = tuple(name for name in FLAGS if _is_flag(features.get(name)))
    used = (*cameras, *vectors, *flags, *BOOKKEEPING)
    ignored = {name: feature for name, feature in features.items() if name not in used}
    return Info(
        root=root,
        fps=float(fps),
        frames=info["total_frames"],
        episodes=info["total_episodes"],
        vectors={name: tuple(feature["shape"]) for name, feature in vectors.items()},
        cameras={name: _image_shape(file, name, feature) for name, feature in cameras.items()},
        videos=tuple(name for name, feature in cameras.items() if feature["dtype"] == "video"),
        names=", ".join(features)[:500],
        flags=flags,
        labels={
            name: labels
            for name, feature in vectors.items()
            if (labels := names_of(feature)) is not None
        },
        ignored=tuple(f"{name} {f['dtype']} {tuple(f['shape'])}" for name, f in ignored.items()),
        arrays=tuple(
            name for name, f in ignored.items() if name not in images and len(f["shape"]) > 1
        ),
    )


def names_of(feature: Mapping[str, Any]) -> list[Any] | None:
    """Names of the dimensions of a vector, one for each; None if there are none.

    LeRobot has three forms: a list, a list by group (``{"motors": [...]}``), and the place of every
    name (``{"delta_x": 0, ...}``).
    """
    names: Any = feature.get("names")
    size = feature["shape"][0]
    if isinstance(names, Mapping):
        values = list(names.values())
        if all(isinstance(group, list | tuple) for group in values):
            names = [name for group in values for name in group]
        elif sorted(map(str, values)) == sorted(map(str, range(len(values)))):
            names = sorted(names, key=lambda name: int(names[name]))
    return list(names) if isinstance(names, list | tuple) and len(names) == size else None


def _is_flag(feature: dict[str, Any] | None) -> bool:
    return feature is not None and feature["dtype"] == "bool" and feature["shape"] == [1]


def _is_depth_map(feature: dict[str, Any]) -> bool:
    """Whether an image or video feature is marked as a depth map, in LeRobot's new or old form."""
    marks: list[Any] = [feature.get("info"), feature.get("video_info")]
    found = [mark for mark in marks if isinstance(mark, dict)]
    return any(mark.get("is_depth_map") or mark.get("video.is_depth_map") for mark in found)


def _require(fits: Any, file: Path, what: str, value: object, rule: str) -> None:
    if not fits:
        raise DatasetError(
            f"{file}: {what} is {str(value)[:100]!r}; it must be {rule}. Record it again."
        )


def _image_shape(file: Path, name: str, feature: dict[str, Any]) -> tuple[int, int, int]:
    """Shape (H, W, 3) of a camera's images, in whichever order the dataset stores it."""
    shape = feature["shape"]
    names = feature.get("names")
    if isinstance(names, list) and names and str(names[0]).startswith("channel"):
        shape = [*shape[1:], shape[0]]
    fits = len(shape) == 3 and shape[2] == 3 and max(shape) <= LARGEST_IMAGE
    _require(
        fits,
        file,
        f"the shape of {name}",
        feature["shape"],
        f"height and width up to {LARGEST_IMAGE}, and 3",
    )
    return tuple(shape)  # type: ignore[return-value]


def data_files(root: Path) -> list[Path]:
    """The parquet files that hold the frames, in order."""
    return [regular(file, DatasetError) for file in sorted((root / "data").rglob("*.parquet"))]


def read_rows(
    info: Info, vectors: Sequence[str], *, finite: bool = True
) -> dict[str, NDArray[Any]]:
    """Read columns of all frames.

    Args:
        info: The dataset.
        vectors: Names of the vectors to read.
        finite: Whether NaN, infinite and very large values are errors; else they are returned.

    Returns:
        ``episode_index``, ``task_index`` and ``timestamp`` (N,), `vectors` (N, D) float32, and the
        flags of `info` (N,) bool.

    Raises:
        DatasetError: The files are damaged or do not match ``meta/info.json``.
    """
    root, remedy = info.root, "the recording was not finalised, or copy it again"
    shapes = {"index": (), "episode_index": (), "task_index": (), "timestamp": ()}
    flags = dict.fromkeys(info.flags, ())
    wanted = {**shapes, **{name: info.vectors[name] for name in vectors}, **flags}
    files = data_files(root)
    with readable(f"{root}: a data file", remedy):
        # Open one file at a time: systems limit open files to about a thousand.
        rows = sum(open_parquet(file, wanted).metadata.num_rows for file in files)
        if rows != info.frames:
            raise DatasetError(
                f"{root}: the data files hold {rows} frames, but meta/info.json says {info.frames} "
                f"frames; {remedy}."
            )
        budget = Budget(files)
        tables = [read_table(file, wanted, budget) for file in files]
        columns = {
            name: pa.chunked_array([c for t in tables for c in t[name].chunks]) for name in wanted
        }
    arrays = {
        name: (booleans if name in flags else numbers)(columns[name], shape, f"{root}: {name}")
        for name, shape in wanted.items()
    }
    for name in ("index", "episode_index", "task_index"):
        if arrays[name].dtype.kind not in "iu":
            raise DatasetError(f"{root}: {name} is {arrays[name].dtype}; whole numbers are needed.")
    episode = arrays["episode_index"].astype(np.int64)
    steps = np.diff(episode, prepend=-1, append=info.episodes)
    ordered = np.isin(steps, (0, 1)).all() and steps[0] == steps[-1] == 1
    if not ordered or (arrays.pop("index") != np.arange(rows)).any():
        raise DatasetError(
            f"{root}: index or episode_index of the frames are out of order; they must count the "
            f"{rows} frames and {info.episodes} episodes from 0. Record it again."
        )
    with np.errstate(over="ignore"):
        read = {name: arrays.pop(name).astype(np.float32) for name in vectors}
    if finite:
        check_finite(root, read, episode, info.arrays)
    _check_times(arrays["timestamp"].astype(np.float64), steps[1:-1] == 0, info)
    return {
        **arrays,
        **read,
        "episode_index": episode,
        "task_index": arrays["task_index"].astype(np.int64),
    }


def _check_times(times: NDArray[np.float64], same: NDArray[np.bool_], info: Info) -> None:
    """Raise `DatasetError` unless the frames of an episode follow each other at `fps`.

    `same` (N - 1,) is whether the next frame is of the same episode.
    """
    with np.errstate(invalid="ignore"):
        off = np.abs(np.diff(times) - 1 / info.fps) > JITTER / info.fps + TOLERANCE
    bad = np.flatnonzero((same & off) | ~np.isfinite(times[1:]) | ~np.isfinite(times[:-1]))
    if len(bad) or not np.isfinite(times).all():
        frame = int(bad[0]) if len(bad) else 0
        raise DatasetError(
            f"{info.root}: timestamp is {times[frame : frame + 2].tolist()} s from frame {frame} "
            f"on; at fps = {info.fps:g} frames are {1 / info.fps:.4g} s apart. Record it again, or "
            "correct fps."
        )


def booleans(column: pa.ChunkedArray, shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """Convert a column of truth values to an array (N,), as `numbers`."""
    values = column.combine_chunks()
    while isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        values = values.flatten()
    if values.null_count or not pa.types.is_boolean(values.type) or len(values) != len(column):
        raise DatasetError(f"{what} is {values.type}; it must be one truth value in each frame.")
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=bool)


def numbers(column: pa.ChunkedArray, shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """Convert a column, whose rows hold numbers of `shape`, to an array (N,) or (N, D).

    Raises:
        DatasetError: A row has another shape or no numbers; `what` names the column.
    """
    values = column.combine_chunks()
    rows = len(column)
    for length in shape:
        values = getattr(values, "storage", values)  # of an extension type
        if not isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
            break  # one value a row
        if values.null_count or pc.any(pc.not_equal(pc.list_value_length(values), length)).as_py():
            raise DatasetError(
                f"{what} has rows of other lengths than {shape}, or empty ones; record it again."
            )
        values = values.flatten()
    kind = values.type
    if values.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DatasetError(f"{what} is {kind} with {values.null_count} nulls; it must be numbers.")
    if len(values) != rows * math.prod(shape):
        raise DatasetError(f"{what} has {len(values)} values in {rows} rows of the shape {shape}.")
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array.reshape(rows, -1) if shape else array


def read_tasks(root: Path, used: NDArray[np.int64]) -> list[str]:
    """Read the instructions in the order of their index; `used` (N,) are the frames' indices."""
    file = root / "meta" / "tasks.parquet"
    with readable(
        file, "the set is damaged: copy it again, with the instruction (`task`) of every frame"
    ):
        names = open_parquet(file, {}).schema_arrow.names
        name = "task" if "task" in names else "__index_level_0__"
        table = read_table(file, {"task_index": (), name: ()}, Budget([file]))
        pairs = sorted(zip(table["task_index"].to_pylist(), table[name].to_pylist(), strict=True))
    tasks = [task for _, task in pairs]
    if [index for index, _ in pairs] != list(range(len(pairs))):
        raise DatasetError(
            f"{file}: task_index does not count the instructions from 0; record it again."
        )
    if not tasks or not all(isinstance(task, str) and task.strip() for task in tasks):
        raise DatasetError(f"{root}: the dataset has frames without an instruction (`task`).")
    if used.min() < 0 or used.max() >= len(tasks):
        raise DatasetError(
            f"{root}: the task_index of a frame is outside 0..{len(tasks) - 1}; record it again."
        )
    return tasks
