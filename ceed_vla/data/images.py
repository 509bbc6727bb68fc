"""Decode the images of a LeRobotDataset, of one camera in a range of frames.

Maps (`frame_cache`) and streams (`frame_stream`) read through it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ceed_vla.data.files import Info, data_files, is_whole, numbers, readable
from ceed_vla.data.parquet import Budget, batch_rows, open_parquet, read_table, weigh
from ceed_vla.errors import DatasetError

# other formats lose bits or start programs
FORMATS = ("PNG", "JPEG", "WEBP")
MODES = ("RGB", "RGBA", "L", "P")
VIDEO_TOLERANCE = 1e-4  # [s] LeRobot's own
SPAN = 32  # frames of an episode that are decoded together
MOST_DECODED = 2**28  # [bytes] of queued images, as stored or decoded
READ_AHEAD = 2**20  # [bytes] of a parquet file

Image8 = NDArray[np.uint8]  # (H, W, 3)


def span_edges(episode: NDArray[np.int64]) -> NDArray[np.int64]:
    """First frame of every span, and one past the last frame (W + 1,).

    Spans are parts of an episode of `SPAN` frames or fewer. `episode` (N,) is sorted.
    """
    frames = np.arange(len(episode))
    firsts = np.flatnonzero((frames - np.searchsorted(episode, episode)) % SPAN == 0)
    return np.append(firsts, len(episode))


class ImageReader:
    """Decodes the images of a dataset.

    `rows` has ``episode_index`` and ``timestamp`` of all frames.
    """

    def __init__(self, info: Info, rows: dict[str, NDArray[Any]]) -> None:
        self.info = info
        self.times = rows["timestamp"]
        self.edges = span_edges(rows["episode_index"])  # (W + 1,)
        # (E,) first frame of every episode
        self.first = np.searchsorted(rows["episode_index"], np.arange(info.episodes))
        self.places = {camera: _video_places(info, camera) for camera in info.videos}
        stored = [camera for camera in info.cameras if camera not in info.videos]
        # parquet files, and the first frames of their row groups
        self.parts: list[tuple[Path, NDArray[np.int64]]] = []
        with readable(f"{info.root}: an image cannot be decoded: it"):
            for file in data_files(info.root) if stored else []:
                parts = open_parquet(file, dict.fromkeys(stored, ())).metadata
                sizes = [parts.row_group(group).num_rows for group in range(parts.num_row_groups)]
                start = self.parts[-1][1][-1] if self.parts else 0
                self.parts.append((file, start + np.cumsum([0, *sizes])))
        self.ends = np.array([edges[-1] for _, edges in self.parts])

    def read(self, camera: str, first: int, end: int) -> Iterator[Image8]:
        """Images (H, W, 3) of the frames [first, end), which are edges of spans."""
        decode = self._videos if camera in self.places else self._stored
        with readable(f"{self.info.root}: an image cannot be decoded: it"):
            for frame, image in zip(range(first, end), decode(camera, first, end), strict=True):
                self._check_size(camera, frame, image.shape)
                yield image

    def _check_size(self, camera: str, frame: int, shape: tuple[int, ...]) -> None:
        if shape != self.info.cameras[camera]:
            raise DatasetError(
                f"{self.info.root}: {camera} of frame {frame} has the shape {shape}, but "
                f"meta/info.json says {self.info.cameras[camera]}; record it again."
            )

    def _stored(self, camera: str, first: int, end: int) -> Iterator[Image8]:
        shape = self.info.cameras[camera]
        together = max(2, min(SPAN, MOST_DECODED // math.prod(shape)))

        def decode(item: tuple[int, Any]) -> Image8:
            frame, stored = item
            data = stored.get("bytes") if isinstance(stored, dict) else None
            if not isinstance(data, bytes):
                raise DatasetError(
                    f"{self.info.root}: {camera} of frame {frame} has no bytes in the data files."
                )
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            self._check_size(camera, frame, (image.height, image.width, 3))  # before it is unpacked
            if image.mode not in MODES:
                raise DatasetError(
                    f"{self.info.root}: {camera} of frame {frame} is {image.mode}, not 8-bit RGB."
                )
            return np.asarray(image.convert("RGB"))

        with ThreadPoolExecutor(2) as pool:
            for file, edges in self.parts[int(np.searchsorted(self.ends, first, side="right")) :]:
                groups = np.flatnonzero((edges[:-1] < end) & (edges[1:] > first)).tolist()
                if not groups:
                    continue
                at = int(edges[groups[0]])
                budget = Budget([file])
                # Buffered: otherwise the column of a whole row group is in memory.
                with pq.ParquetFile(file, buffer_size=READ_AHEAD) as opened:
                    longest = weigh(file, opened, [camera], budget, groups)
                    rows = min(together, batch_rows(longest, MOST_DECODED))
                    for part in opened.iter_batches(rows, row_groups=groups, columns=[camera]):
                        budget.spend(part.nbytes, file)
                        wanted = part.column(camera)[max(first - at, 0) : max(end - at, 0)]
                        yield from pool.map(decode, enumerate(wanted.to_pylist(), max(first, at)))
                        at += part.num_rows
                        if at >= end:
                            return

    def _videos(self, camera: str, first: int, end: int) -> Iterator[Image8]:
        """Decode with LeRobot's function; its dataset class would download missing files."""
        from lerobot.datasets.video_utils import decode_video_frames

        files, starts = self.places[camera]
        low, high = np.searchsorted(self.edges, (first, end))
        for part, after in pairwise(self.edges[low : high + 1].tolist()):
            episode = int(np.searchsorted(self.first, part, side="right")) - 1
            times = (float(starts[episode]) + t for t in self.times[part:after].tolist())
            file = _video_file(self.info, camera, *files[episode].tolist())
            images = decode_video_frames(
                file, list(times), VIDEO_TOLERANCE, _video_backend(), return_uint8=True
            )
            yield from images.permute(0, 2, 3, 1).numpy()


@cache
def _video_backend() -> str:
    """LeRobot's choice of a backend, made once.

    If torchcodec cannot be loaded, every attempt takes time and logs a traceback.
    """
    from lerobot.datasets.video_utils import get_safe_default_video_backend

    return str(get_safe_default_video_backend())


def _video_file(info: Info, camera: str, chunk: int, file: int) -> Path:
    return info.root / "videos" / camera / f"chunk-{chunk:03d}" / f"file-{file:03d}.mp4"


def _video_places(info: Info, camera: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where the video of every episode is stored.

    Returns:
        Chunk and number of each episode's file (E, 2), and its start time in the file (E,) [s].
    """
    files = sorted((info.root / "meta" / "episodes").rglob("*.parquet"))
    if not files:
        raise DatasetError(
            f"{info.root} has no meta/episodes, which has the places of its videos; copy it, too."
        )
    names = [
        "episode_index",
        *(f"videos/{camera}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")),
    ]
    with readable(f"{info.root}/meta/episodes"):
        budget = Budget(files)
        tables = [read_table(f, dict.fromkeys(names, ()), budget) for f in files]
        episode, chunk, file, start = (
            np.concatenate([numbers(table[name], (), f"{info.root}: {name}") for table in tables])
            for name in names
        )
    if episode.tolist() != list(range(info.episodes)):
        raise DatasetError(
            f"{info.root}/meta/episodes does not list episodes 0..{info.episodes - 1}."
        )
    for place in zip(chunk.tolist(), file.tolist(), start.tolist(), strict=True):
        if not (is_whole(place[0], 0) and is_whole(place[1], 0) and 0 <= place[2] < math.inf):
            raise DatasetError(
                f"{info.root}/meta/episodes: {camera} has the place {place[0]}/{place[1]}, "
                f"{place[2]} s; it must be two counts and a time, all from 0 on. Copy it again."
            )
    places = np.stack([chunk, file], axis=1).astype(np.int64)
    videos = [_video_file(info, camera, *place) for place in np.unique(places, axis=0).tolist()]
    missing = [video for video in videos if not video.is_file()]
    if missing:
        raise DatasetError(
            f"There is no video {missing[0]} ({len(missing)} of {len(videos)} missing); copy it, "
            "too."
        )
    return places, start.astype(np.float64)
