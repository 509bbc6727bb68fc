"""LeRobotDatasets as arrays over the frame index; images are memory maps or streamed."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.data.files import ACTION, ENVIRONMENT, STATE, Info, read_info, read_rows, read_tasks
from ceed_vla.data.frame_cache import read_images
from ceed_vla.data.frame_stream import StreamedImages, StreamingConfig
from ceed_vla.data.images import SPAN, ImageReader, span_edges
from ceed_vla.data.usable import INTERVENTION, SUCCESS, Usable, usable_frames
from ceed_vla.errors import DatasetError
from ceed_vla.fields import short

logger = logging.getLogger(__name__)

Images = NDArray[np.uint8] | StreamedImages


@dataclass
class FrameStore:
    """Frames of one LeRobotDataset, as arrays over the frame index."""

    root: Path
    images: dict[str, Images]  # camera feature -> (N, H, W, 3) uint8, memory-mapped or streamed
    state: NDArray[np.float32]  # (N, D) float32
    action: NDArray[np.float32] | None  # (N, A) float32, None for an action-free set
    environment_state: NDArray[np.float32] | None  # (N, E) float32 or None
    task: NDArray[np.int64]  # (N,) index into `tasks`
    tasks: list[str]
    episode: NDArray[np.int64]  # (N,) episode index
    episode_end: NDArray[np.int64]  # (N,) one past the last frame of the frame's episode
    fps: float  # frames a second [Hz]
    # Names of the dimensions of state and actions, if the dataset lists them
    labels: dict[str, list[Any]] = field(default_factory=dict)
    usable: Usable | None = None  # frames whose actions are to be imitated; None: all
    # Features that training leaves out, such as "observation.depth float32 (96, 128)"
    ignored: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.state)

    @property
    def shown(self) -> NDArray[np.bool_]:
        """Whether the action of each frame (N,) is to be imitated."""
        return np.ones(len(self), dtype=bool) if self.usable is None else self.usable.frames

    @property
    def corrected(self) -> bool:
        """Whether the frames to imitate are a person's interventions."""
        return self.usable is not None and self.usable.interventions

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every feature of one frame."""
        vectors = {STATE: self.state, ACTION: self.action, ENVIRONMENT: self.environment_state}
        return {
            name: array.shape[1:]
            for name, array in {**self.images, **vectors}.items()
            if array is not None
        }

    @property
    def digest(self) -> str:
        """16 digits of a hash of states and actions, which identify the dataset."""
        arrays = [array for array in (self.state, self.action) if array is not None]
        return sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]

    @property
    def words_digest(self) -> str:
        """16 digits of a hash of the instruction and the episode of every frame."""
        words = json.dumps(self.tasks).encode()
        parts = [words, *(array.tobytes() for array in (self.task, self.episode))]
        return sha256(b"".join(parts)).hexdigest()[:16]

    @property
    def together(self) -> float:
        """Number of spans that a batch may be drawn from; infinite unless images are streamed."""
        return min(getattr(images, "together", math.inf) for images in self.images.values())

    @property
    def edges(self) -> NDArray[np.int64]:
        """First frame of every span of frames decoded together, and one past the last (W + 1,)."""
        return span_edges(self.episode)

    def decode(self, streaming: StreamingConfig | None = None) -> None:
        """Read the images of a dataset that was opened without them."""
        info = read_info(self.root)
        self.images = _images(info, read_rows(info, []), streaming or StreamingConfig())

    def batch(self, frames: NDArray[np.int64], chunk_size: int) -> dict[str, Any]:
        """Raw batch (before the preprocessor) of `frames` (B,).

        It has cameras (B, 3, H, W) float in [0, 1], state (B, D), ``task`` strings, and if the
        dataset has them ``action`` (B, m, A) with ``action_is_pad`` (B, m) and
        ``observation.environment_state`` (B, E). Action chunks of `chunk_size` steps are cut at the
        end of the episode and padded with its last action.
        """
        frames = self._checked(frames, chunk_size)
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
        """Action chunks (B, m, A) from `frames` (B,) on.

        Returns:
            The chunks, and which of their steps lie past the end of the episode (B, m).
        """
        if self.action is None:
            raise DatasetError(f"{self.root} holds no actions; it has {', '.join(self.shapes)}.")
        frames = self._checked(frames, chunk_size)
        steps = frames[:, None] + np.arange(chunk_size)  # (B, m)
        last = self.episode_end[frames][:, None] - 1
        return torch.from_numpy(self.action[np.minimum(steps, last)]), torch.from_numpy(
            steps > last
        )

    def _checked(self, frames: object, chunk_size: object) -> NDArray[np.int64]:
        """Check frame indices, which may come from files: negative or too large ones are errors."""
        try:
            found = np.asarray(frames if isinstance(frames, np.ndarray | list) else None)
        except ValueError:
            found = np.zeros(0, object)
        whole = found.ndim == 1 and (found.dtype.kind in "iu" or not len(found))
        if not whole or (len(found) and not 0 <= found.min() <= found.max() < len(self)):
            raise DatasetError(
                f"{self.root} has the frames 0..{len(self) - 1}, not {str(frames)[:100]}."
            )
        if type(chunk_size) is not int or not 1 <= chunk_size <= 4096:
            raise DatasetError(
                f"chunk_size is {short(chunk_size)}; it must be a whole number in [1, 4096]."
            )
        return found.astype(np.int64)


def _images(
    info: Info, rows: dict[str, NDArray[Any]], streaming: StreamingConfig
) -> dict[str, Images]:
    """Maps of the decoded images, or streams if these would be larger than allowed."""
    size = info.frames * sum(math.prod(shape) for shape in info.cameras.values()) / 1e9
    what = f"{info.root}: {info.frames} frames, {size:.3g} GB of images"
    if size <= streaming.above_gb:
        logger.info(
            "%s, decoded into files; above streaming.above_gb = %g they are streamed",
            what,
            streaming.above_gb,
        )
        return dict(read_images(info, rows))
    reader = ImageReader(info, rows)
    streams = {
        camera: StreamedImages(reader, camera, streaming.memory_gb * 1e9) for camera in info.cameras
    }
    together = next(iter(streams.values())).together
    if not together:
        raise DatasetError(
            f"{info.root}: a span of {SPAN} frames takes {size / info.frames * SPAN:.3g} GB "
            f"decoded, more than half of streaming.memory_gb = {streaming.memory_gb:g}. Raise it "
            "to ten times a span or more."
        )
    for images in streams.values():
        images[np.zeros(1, np.int64)]  # raises now if the images cannot be decoded at all
    logger.info(
        "%s, more than streaming.above_gb = %g: streamed; batches are drawn from %d spans of %d "
        "frames at a time (streaming.memory_gb = %g)",
        what,
        streaming.above_gb,
        together,
        SPAN,
        streaming.memory_gb,
    )
    return dict(streams)


def open_dataset(
    root: str | Path,
    *,
    decode: bool = True,
    streaming: StreamingConfig | None = None,
    strict: bool = True,
) -> FrameStore:
    """Read a LeRobotDataset v3 from a local folder.

    Args:
        root: The folder.
        decode: Whether images are read; if not, they are black until `FrameStore.decode`.
        streaming: Which images are streamed.
        strict: Whether faults of the data are errors. If not, for an inspection, NaN, infinite and
            very large values are returned, and cameras (`images` is empty) or state (N, 0) may be
            missing.

    Raises:
        DatasetError: The folder holds no readable dataset, or one without instructions; if
            `strict`, also one without camera or state, or with values that are not finite.
    """
    info = read_info(Path(root))
    if strict and STATE not in info.vectors:
        raise DatasetError(f"{root}: the dataset has no {STATE}; it has {info.names}.")
    if strict and not info.cameras:
        raise DatasetError(f"{root}: the dataset has no camera; it has {info.names}.")
    rows = read_rows(info, list(info.vectors), finite=strict)
    episode = rows["episode_index"]
    task = rows["task_index"]
    black: dict[str, Images] = {
        name: np.broadcast_to(np.uint8(0), (info.frames, *shape))
        for name, shape in info.cameras.items()
    }
    usable = usable_frames(episode, rows.get(INTERVENTION), rows.get(SUCCESS))
    return FrameStore(
        root=info.root,
        tasks=read_tasks(info.root, task),
        images=(
            _images(info, rows, streaming or StreamingConfig())
            if decode and info.cameras
            else black
        ),
        state=rows.get(STATE, np.zeros((info.frames, 0), np.float32)),
        action=rows.get(ACTION),
        environment_state=rows.get(ENVIRONMENT),
        task=task,
        episode=episode,
        episode_end=usable.end,
        usable=usable,
        fps=info.fps,
        labels=info.labels,
        ignored=list(info.ignored),
    )
