"""Writes the rows of episodes to a LeRobotDataset: decodes images, and encodes videos while the
episode runs. Free of ROS.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.commits import is_recording
from ceed_vla.data.encoded_images import ImageEncoder
from ceed_vla.data.videos import VideoEncoder
from ceed_vla.data.writer import DatasetWriter
from ceed_vla.errors import DatasetError, ObservationError
from ceed_vla.ros_nodes.record.episode import Row
from ceed_vla.ros_nodes.record.plan import INTERVENTION, SUCCESS, Plan
from ceed_vla.ros_nodes.robot.images import CameraImage, View

logger = logging.getLogger(__name__)

_FULL = "The disk is nearly full; free space, and start again. Stored episodes are complete."
_LOOKED = 50  # rows between two looks at the free space


class EpisodeStore:
    """Appends episodes to the data set of a plan.

    An episode is part of the data set only after `end`; until then nothing that is stored changes.

    Attributes:
        damaged: Images of the present episode that could not be decoded; the one before is used.
    """

    def __init__(self, plan: Plan) -> None:
        root = plan.root
        if root.exists() and any(root.iterdir()):
            if not is_recording(root):
                raise DatasetError(f"{root} holds other files; choose another root.")
            if not plan.resume:
                raise DatasetError(f"{root} holds a recording; set resume, or another root.")
        self._plan = plan
        self._writer: DatasetWriter | None = None
        self._views: dict[str, View] = {}
        self._clear()
        if is_recording(root):
            stored = _stored_sizes(root)
            self._open(
                {
                    name: camera.view(*stored.get(name, (2, 2)))
                    for name, camera in plan.cameras.items()
                }
            )

    def _clear(self) -> None:
        self._frames: list[dict[str, Any]] = []
        self._encoders: dict[str, VideoEncoder | ImageEncoder] = {}
        self._last: dict[str, NDArray[np.uint8]] = {}
        self.damaged = 0

    @property
    def episodes(self) -> int:
        """Stored episodes."""
        return self._writer.episodes if self._writer else 0

    @property
    def frames(self) -> int:
        """Stored frames."""
        return self._writer.frames if self._writer else 0

    def add(self, row: Row, task: str) -> None:
        """Append a row to the present episode.

        Raises:
            DatasetError: The data set has other features, an image does not fit, or the disk is
                nearly full.
            OSError: The disk is full.
        """
        if self._writer is None:
            self._open({name: self._view(name, row.images[name]) for name in self._cameras})
        assert self._writer is not None
        if len(self._frames) % _LOOKED == 0 and not self._writer.has_room():
            raise DatasetError(_FULL)
        frame: dict[str, Any] = {
            **{name: row.values[name] for name in (*self._plan.states, "action")},
            INTERVENTION: np.array([row.intervention]),
            SUCCESS: np.array([False]),
            "task": task,
        }
        for name in self._cameras:
            pixels = self._pixels(name, row.images[name])
            self._encoder(name).add(pixels)
        self._frames.append(frame)

    def end(self, *, success: bool) -> None:
        """Make the present episode part of the data set.

        Raises:
            DatasetError: The episode has no row, or cannot be stored.
            OSError: The disk is full.
        """
        if not self._frames:
            raise DatasetError("The episode has no frame, so nothing is stored.")
        assert self._writer is not None
        self._frames[-1][SUCCESS] = np.array([success])
        if not self._writer.has_room():
            raise DatasetError(_FULL)
        try:
            encoded = {name: encoder.close() for name, encoder in self._encoders.items()}
            self._writer.add_episode(self._frames, encoded)
            self._writer.commit({})
        except BaseException:
            self._writer.rollback()
            raise
        self._clear()

    def discard(self) -> None:
        """Drop the present episode."""
        for encoder in self._encoders.values():
            encoder.cancel()
        self._clear()

    @property
    def _cameras(self) -> list[str]:
        return list(self._plan.cameras)

    def _view(self, name: str, image: CameraImage) -> View:
        """How to make a stored image of one of the camera's."""
        return self._plan.cameras[name].view(image.height, image.width)

    def _open(self, views: dict[str, View]) -> None:
        """Open the data set, whose images have these views."""
        plan = self._plan
        for name, view in views.items():
            if plan.format != "png" and (view.height % 2 or view.width % 2):
                raise DatasetError(
                    f"{name} is {view.width} x {view.height} pixels; a video needs even numbers. "
                    "Crop it in the robot's file, or choose the format png."
                )
        self._views = views
        sizes = {name: (view.height, view.width) for name, view in views.items()}
        self._writer = DatasetWriter(
            plan.root,
            repo_id=f"local/{plan.root.resolve().name}",
            fps=plan.fps,
            features=plan.features(sizes),
            robot_type=plan.robot_type,
        )

    def _pixels(self, name: str, image: CameraImage) -> NDArray[np.uint8]:
        """Decode an image; a damaged one is replaced by the last good one of the episode."""
        try:
            pixels = image.pixels(self._views[name])
        except ObservationError as error:
            if name not in self._last:
                raise DatasetError(f"{name}: {error}") from error
            self.damaged += 1
            return self._last[name]
        self._last[name] = pixels
        return pixels

    def _encoder(self, name: str) -> VideoEncoder | ImageEncoder:
        """The encoder of a camera in the present episode."""
        if name not in self._encoders:
            assert self._writer is not None
            folder = self._writer.work_folder
            folder.mkdir(parents=True, exist_ok=True)
            self._encoders[name] = (
                ImageEncoder()
                if self._plan.format == "png"
                else VideoEncoder(folder / f"{name}.mp4", self._plan.fps, self._plan.format)
            )
        return self._encoders[name]


def _stored_sizes(root: Path) -> dict[str, tuple[int, int]]:
    """Height and width [px] of the images in a data set."""
    from lerobot.datasets.io_utils import load_info

    return {
        name: (feature["shape"][0], feature["shape"][1])
        for name, feature in load_info(root).features.items()
        if feature["dtype"] in ("video", "image")
    }
