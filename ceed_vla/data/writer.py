"""Write a LeRobotDataset v3 that is readable on disk at any time.

Images are encoded in memory. `LeRobotDataset.add_frame` and `save_episode` write temporary PNG
files instead, which takes longer than rendering, and only log a file that cannot be written (full
disk). Episodes go to a pending parquet file outside `data/`, their videos to files beside it;
`commit()` makes them part of the dataset (`commits.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import load_info, load_stats, write_info, write_stats, write_tasks
from lerobot.datasets.utils import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_DATA_PATH,
    DEFAULT_EPISODES_PATH,
    DEFAULT_VIDEO_PATH,
)
from lerobot.datasets.video_utils import get_video_info
from lerobot.utils.constants import DEFAULT_FEATURES
from lerobot.utils.utils import flatten_dict

from ceed_vla.data import commits
from ceed_vla.data.encoded_images import EncodedImages, png
from ceed_vla.data.files import read_tasks
from ceed_vla.data.statistics import Statistics, image_statistics, vector_statistics
from ceed_vla.data.videos import EncodedVideo
from ceed_vla.errors import DatasetError, raised_as
from ceed_vla.files import settle

_FREE_SPACE = 64 * 2**20  # [bytes] with less, the next commit may not fit

Frame = dict[str, Any]


class DatasetWriter:
    """Appends episodes to one dataset, which is new or continued from its last commit.

    `features` are LeRobot's without the default ones: image, video, float32, int64 and bool
    columns. Every video has a file of its own for each episode.

    Raises:
        DatasetError: `root` holds other files, or a dataset with other features.
    """

    def __init__(
        self,
        root: Path,
        *,
        repo_id: str,
        fps: int,
        features: Mapping[str, Mapping],
        robot_type: str,
    ) -> None:
        self.root = root
        self._fps = fps
        self._features = dict(features)
        self._robot_type = robot_type
        if not commits.is_recording(root):
            if root.exists():
                if not root.is_dir() or any(root.iterdir()):
                    raise DatasetError(f"{root} exists and is not a recording; choose a new root")
                root.rmdir()
            LeRobotDatasetMetadata.create(
                repo_id=repo_id,
                fps=fps,
                features=self._features,
                robot_type=robot_type,
                root=root,
                use_videos=bool(_of_type(self._features, "video")),
            )
            commits.write_progress(root, 0, [], {})
        self._load()

    def _load(self) -> None:
        """Read the last commit; pending episodes are dropped."""
        self._files = commits.undo_incomplete_commit(self.root)
        self._pending_file.unlink(missing_ok=True)
        shutil.rmtree(self.work_folder, ignore_errors=True)
        remedy = "Copy it again, or record into a new root."
        with raised_as(
            DatasetError,
            f"{self.root} cannot be continued, its meta or data files are damaged",
            remedy,
        ):
            self._info = load_info(self.root)
            self._stats = load_stats(self.root)
            known = (
                read_tasks(self.root, np.zeros(1, np.int64)) if self._info.total_episodes else []
            )
            if len(set(known)) < len(known):
                raise DatasetError(
                    f"{self.root}/meta/tasks.parquet repeats an instruction; record into a new "
                    "root."
                )
            self._schema = get_hf_features_from_features(self._info.features).arrow_schema
            self._check_stored(known)
        self._task_ids = {task: index for index, task in enumerate(known)}
        # each batch has one data file and one episodes file
        self._batches = sum(name.startswith("data/") for name in self._files)
        self._start_batch()

    def _check_stored(self, tasks: list[str]) -> None:
        """Raise `DatasetError` unless the stored files are complete and match their metadata."""
        info, root = self._info, self.root
        frames, episodes = (
            sum(
                pq.ParquetFile(root / file).metadata.num_rows
                for file in self._files
                if file.startswith(folder)
            )
            for folder in ("data/", "meta/episodes/")
        )
        # This writer and LeRobot's readers depend on `fps`, `chunks_size` and `data_path`.
        for name, found, expected in (
            ("total_frames", info.total_frames, frames),
            ("total_episodes", info.total_episodes, commits.read_progress(root)["total_episodes"]),
            ("total_tasks", info.total_tasks, len(tasks)),
            ("fps", info.fps, self._fps),
            ("chunks_size", info.chunks_size, DEFAULT_CHUNK_SIZE),
            ("data_path", info.data_path, DEFAULT_DATA_PATH),
            ("rows of meta/episodes", episodes, info.total_episodes),
        ):
            if found != expected:
                raise DatasetError(
                    f"{root}: {name} is {str(found)[:100]!r}, the stored files and this version "
                    f"give {str(expected)[:100]!r}. Copy it again, or record into a new root."
                )
        if info.total_episodes:
            aggregate_stats([self._stats, self._stats])  # raises if the next commit would fail
            values = [
                np.asarray(v, dtype=np.float64)
                for stats in self._stats.values()
                for v in stats.values()
            ]
            if set(self._stats) != set(info.features) or not all(
                np.isfinite(v).all() for v in values
            ):
                raise DatasetError(
                    f"{root}/meta/stats.json lacks features or is not finite; record into a new "
                    "root."
                )
        own = {
            name: feature for name, feature in info.features.items() if name not in DEFAULT_FEATURES
        }
        stored, wanted = (
            {
                name: (feature["dtype"], tuple(feature["shape"]))
                for name, feature in features.items()
            }
            for features in (own, self._features)
        )
        if stored != wanted:
            raise DatasetError(
                f"{root} stores {stored}; this recording writes {wanted}. Use a new root"
            )
        self._check_names(own)

    def _check_names(self, stored: Mapping[str, Mapping]) -> None:
        """Raise `DatasetError` if values of the same shape have other meanings."""
        info, root = self._info, self.root
        for name, feature in stored.items():
            theirs, ours = feature.get("names"), self._features[name].get("names")
            if isinstance(theirs, list) and ours is not None and theirs != list(ours):
                raise DatasetError(
                    f"{root} stores {name} of {', '.join(theirs)}; this recording writes "
                    f"{', '.join(ours)}. Use a new root."
                )
        if info.robot_type != self._robot_type:
            raise DatasetError(
                f"{root} is of the robot {info.robot_type}; this recording is of "
                f"{self._robot_type}. Use a new root."
            )

    def _start_batch(self) -> None:
        self._pending: list[_Episode] = []
        self.pending_frames = 0
        self._parquet: pq.ParquetWriter | None = None

    @property
    def _pending_file(self) -> Path:
        return self.root / commits.WORK_FOLDER / "pending.parquet"

    @property
    def work_folder(self) -> Path:
        """Folder for files of pending episodes, such as videos; cleared when the writer opens."""
        return self.root / commits.WORK_FOLDER / "videos"

    @property
    def progress(self) -> dict[str, Any]:
        """What the caller stored with the last commit."""
        return commits.read_progress(self.root)["progress"]

    @property
    def episodes(self) -> int:
        """Stored episodes, pending ones included."""
        return self._info.total_episodes + len(self._pending)

    @property
    def frames(self) -> int:
        """Stored frames, pending ones included."""
        return self._info.total_frames + self.pending_frames

    def has_room(self) -> bool:
        """Whether the disk has room for a commit and some more episodes."""
        return shutil.disk_usage(self.root).free >= _FREE_SPACE

    def add_episode(
        self,
        frames: Sequence[Frame],
        encoded: Mapping[str, EncodedVideo | EncodedImages] | None = None,
    ) -> None:
        """Append one episode to the pending file: the `task` and every feature of each frame,
        except the cameras that are `encoded` already; files of videos lie in `work_folder`.

        After an `OSError`, `rollback()` returns to the last commit.

        Raises:
            DatasetError: Frames do not match the features.
            OSError: The disk is full.
        """
        if not frames:
            raise DatasetError("an episode needs at least one frame")
        encoded = dict(encoded or {})
        self._check_encoded(encoded, len(frames))
        columns = self._stack(frames, encoded)
        steps = np.arange(len(frames))
        tasks = [frame["task"] for frame in frames]
        for task in tasks:
            self._task_ids.setdefault(task, len(self._task_ids))
        columns |= {  # LeRobot's own, (T,) each
            "timestamp": (steps / self._info.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(len(tasks), self.episodes),
            "index": steps + self.frames,
            "task_index": np.array([self._task_ids[task] for task in tasks]),
        }
        plain = [name for name in columns if self._info.features[name]["dtype"] != "image"]
        statistics = {
            name: (vector_statistics if name in plain else image_statistics)(values)
            for name, values in columns.items()
        } | {name: camera.statistics for name, camera in encoded.items()}
        if self._parquet is None:
            self._pending_file.parent.mkdir(exist_ok=True)
            self._parquet = pq.ParquetWriter(
                self._pending_file, schema=self._schema, compression="snappy", use_dictionary=plain
            )
        images = {n: c.files for n, c in encoded.items() if isinstance(c, EncodedImages)}
        self._parquet.write_table(self._table(columns, images))
        videos = {n: c for n, c in encoded.items() if isinstance(c, EncodedVideo)}
        self._pending.append(_Episode(len(frames), list(dict.fromkeys(tasks)), statistics, videos))
        self.pending_frames += len(frames)

    def commit(self, progress: Mapping[str, Any]) -> None:
        """Make the pending episodes part of the dataset, with the caller's `progress` (JSON).

        After an `OSError`, `rollback()` returns to the last commit.

        Raises:
            OSError: The disk is full.
        """
        if self._parquet is not None:
            chunk, file = divmod(self._batches, DEFAULT_CHUNK_SIZE)
            places = (DEFAULT_DATA_PATH, DEFAULT_EPISODES_PATH)
            adding = [place.format(chunk_index=chunk, file_index=file) for place in places]
            tables = list(adding)
            moves = self._video_moves()
            adding += [name for _, name in moves]
            commits.begin_commit(self.root, self._info.total_episodes, adding)
            self._parquet.close()
            for name in adding:
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._pending_file, self.root / tables[0])
            for video, name in moves:
                os.replace(video.path, self.root / name)
            self._write_metadata(chunk, file, self.root / tables[1])
            settle(*(self.root / name for name in adding), *commits.meta_files(self.root / "meta"))
            self._files += adding
            self._batches += 1
        commits.write_progress(self.root, self._info.total_episodes, self._files, progress)
        self._start_batch()

    def rollback(self) -> None:
        """Discard all changes since the last commit, on disk and in memory."""
        if self._parquet is not None:
            with contextlib.suppress(OSError, ValueError):
                self._parquet.close()
        self._load()

    def _write_metadata(self, chunk: int, file: int, episodes: Path) -> None:
        """Add the pending episodes, stored in data file (chunk, file), to `meta/`."""
        info, rows = self._info, []
        for episode in self._pending:
            row = {
                "episode_index": info.total_episodes,
                "tasks": episode.tasks,
                "length": episode.length,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": info.total_frames,
                "dataset_to_index": info.total_frames + episode.length,
                "meta/episodes/chunk_index": chunk,
                "meta/episodes/file_index": file,
            }
            for name in episode.videos:
                number = divmod(info.total_episodes, DEFAULT_CHUNK_SIZE)
                row |= _video_place(name, number, episode.length / info.fps)
                self._describe(name)
            flat = flatten_dict({"stats": episode.statistics})
            rows.append(row | {name: value.tolist() for name, value in flat.items()})
            info.total_episodes += 1
            info.total_frames += episode.length
        info.total_tasks = len(self._task_ids)
        info.splits = {"train": f"0:{info.total_episodes}"}
        known = [] if self._stats is None else [self._stats]
        self._stats = aggregate_stats([*known, *(episode.statistics for episode in self._pending)])

        pq.write_table(pa.Table.from_pylist(rows), episodes, compression="snappy")
        index = pd.Index(list(self._task_ids), name="task")
        write_tasks(pd.DataFrame({"task_index": range(len(index))}, index=index), self.root)
        write_stats(self._stats, self.root)
        write_info(info, self.root)

    def _video_moves(self) -> list[tuple[EncodedVideo, str]]:
        """The pending videos, each with its name in the dataset."""
        moves = []
        for index, episode in enumerate(self._pending, self._info.total_episodes):
            chunk, file = divmod(index, DEFAULT_CHUNK_SIZE)
            for name, video in episode.videos.items():
                place = DEFAULT_VIDEO_PATH.format(
                    video_key=name, chunk_index=chunk, file_index=file
                )
                moves.append((video, place))
        return moves

    def _describe(self, name: str) -> None:
        """Add what readers need to know of the first video of a camera to `info.json`."""
        feature = self._info.features[name]
        if not feature.get("info"):
            first = DEFAULT_VIDEO_PATH.format(video_key=name, chunk_index=0, file_index=0)
            feature["info"] = get_video_info(self.root / first)

    def _check_encoded(
        self, encoded: Mapping[str, EncodedVideo | EncodedImages], frames: int
    ) -> None:
        """Raise `DatasetError` unless there is a whole video of every camera that needs one, and
        other cameras have their images.
        """
        videos = [name for name, camera in encoded.items() if isinstance(camera, EncodedVideo)]
        wanted = _of_type(self._features, "video")
        if set(videos) != set(wanted):
            raise DatasetError(f"an episode has videos {sorted(videos)}; give {sorted(wanted)}")
        for name, camera in encoded.items():
            if camera.frames != frames:
                raise DatasetError(f"{name} has {camera.frames} images for {frames} frames")
            if isinstance(camera, EncodedImages):
                shape = tuple(self._features[name]["shape"])
                if camera.shape != shape:
                    raise DatasetError(f"{name} is {camera.shape}; this dataset stores {shape}")

    def _stack(
        self, frames: Sequence[Frame], encoded: Mapping[str, object]
    ) -> dict[str, np.ndarray]:
        """Check and stack the caller's features that are not encoded: name -> (T, ...)."""
        plain = {name: one for name, one in self._features.items() if name not in encoded}
        names = {*plain, "task"}
        columns = {}
        for frame in frames:
            if set(frame) != names or not frame["task"]:
                raise DatasetError(
                    f"a frame has {sorted(frame)}; this dataset stores {sorted(names)}"
                )
        for name, feature in plain.items():
            shape = tuple(feature["shape"])
            dtype = np.dtype("uint8" if feature["dtype"] == "image" else feature["dtype"])
            for value in (frame[name] for frame in frames):
                if value.shape != shape or value.dtype != dtype:
                    raise DatasetError(
                        f"{name} is {value.dtype}{value.shape}; this dataset stores {dtype}{shape}"
                    )
            columns[name] = np.stack([frame[name] for frame in frames])
            if dtype.kind == "f" and not np.isfinite(columns[name]).all():
                raise DatasetError(
                    f"{name} holds NaN or infinite values; this episode is not stored"
                )
        return columns

    def _table(
        self, columns: Mapping[str, np.ndarray], images: Mapping[str, Sequence[bytes]]
    ) -> pa.Table:
        """Rows of the data file; `images` are PNG files of the cameras that are encoded."""
        cells: dict[str, Any] = {}
        for field in self._schema:
            if self._info.features[field.name]["dtype"] == "image":
                files = images.get(field.name) or map(png, columns[field.name])
                cells[field.name] = [
                    {"bytes": file, "path": f"frame-{i:06d}.png"} for i, file in enumerate(files)
                ]
                continue
            values = columns[field.name]
            # LeRobot stores vectors of one number as numbers
            cells[field.name] = (
                list(values) if pa.types.is_fixed_size_list(field.type) else values.reshape(-1)
            )
        return pa.Table.from_pydict(cells, schema=self._schema)


@dataclass(frozen=True)
class _Episode:
    """A pending episode.

    Attributes:
        length: Its frames.
        tasks: Its instructions.
        statistics: Of every feature.
        videos: By feature.
    """

    length: int
    tasks: list[str]
    statistics: dict[str, Statistics]
    videos: dict[str, EncodedVideo]


def _of_type(features: Mapping[str, Mapping], dtype: str) -> list[str]:
    return [name for name, feature in features.items() if feature["dtype"] == dtype]


def _video_place(name: str, number: tuple[int, int], seconds: float) -> dict[str, Any]:
    """LeRobot's columns of an episode for its video, which has a file of its own."""
    return {
        f"videos/{name}/chunk_index": number[0],
        f"videos/{name}/file_index": number[1],
        f"videos/{name}/from_timestamp": 0.0,
        f"videos/{name}/to_timestamp": seconds,
    }
