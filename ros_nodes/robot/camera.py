"""The newest image of one camera, and whether the camera's images are usable."""

from __future__ import annotations

from collections import deque

from ceed_vla.errors import ObservationError
from ceed_vla.ros_nodes.robot.images import (
    CameraImage,
    Shown,
    View,
    message_stamp,
    read_compressed,
    read_image,
)
from ceed_vla.ros_nodes.robot.robot_config import ImageSource

CALM = 1.0  # time without a bad image after which an alternating camera is usable again [s]
_LOOKED_BACK = 30  # images whose verdicts are counted
_QUIET = 1.0  # shortest time between two warnings of a camera [s]


class Camera:
    """Stores the newest message of a camera; only `Shown.pixels` decodes it, in another thread.

    A bad image is a fault until a good image arrives. If bad and good images alternate, the fault
    lasts until no bad image has arrived for `CALM` seconds; otherwise the arm would start and stop
    with every image.

    Attributes:
        source: The camera in the robot's file.
        received: Number of images that arrived, including bad ones.
        stamp: Stamp of the newest image [s]; None before the first image.
        gaps: Times between the latest images, one of which may have been lost [s].
        renewed: Whether an image has arrived since `Observations.renewed` was last true.
        changed: Stamp of the first of the latest images that are all identical [s].
        blank: Whether the image that the policy received last has one colour.
        fault: Why the camera's images are unusable; None if they are usable.
    """

    def __init__(self, source: ImageSource, shape: tuple[int, int, int]) -> None:
        self.source = source
        self._view = View(shape[1], shape[2], source.resize, source.crop)
        self.received = 0
        self._read = read_compressed if source.transport == "compressed" else read_image
        self.forget()

    def forget(self) -> None:
        """Drop all images and verdicts."""
        self.stamp: float | None = None
        self.gaps: deque[float] = deque(maxlen=3)
        self.renewed = False
        self.changed: float | None = None
        self.blank = False
        self.fault: str | None = None
        self._image: CameraImage | None = None
        self._shown: CameraImage | None = None  # the image that is being decoded, or was last
        self._damaged = False  # the fault is in the pixel data; the header does not show it
        self._damage_stamp: float | None = None  # of the last image with damaged data [s]
        self._alternating = False
        self._bad_stamp: float | None = None  # of the last bad image [s]
        # Stamp of one of the last images [s] -> whether it is bad.
        self._verdicts: dict[float, bool] = {}
        # Height, width and stamp [s] of the first image, or of the image of the last warning.
        self._told: tuple[int, int, float] | None = None

    def take(self, message: bytes) -> str | None:
        """Store a serialized message, which may be bad; return a warning, or None."""
        self.received += 1
        try:
            image = self._read(message)
            self._view.box(image.height, image.width)
        except ObservationError as error:
            self._judge(message_stamp(message), str(error))
            return None
        if not self._damaged:
            self._judge(image.stamp, None)
        if self.stamp is not None and image.stamp > self.stamp:
            self.gaps.append(image.stamp - self.stamp)
        if not image.same(self._image) or self.changed is None or image.stamp < self.changed:
            self.changed = image.stamp
        self._image = image
        self.stamp = image.stamp
        self.renewed = True
        return self._warning(image)

    def show(self) -> Shown:
        """Return the newest image for decoding; `judge` then takes the result.

        `ObservationError`: No image has arrived.
        """
        if self._image is None:
            raise ObservationError(f"There is no image of {self.source.name} yet.")
        self._shown = self._image
        return Shown(self._image, self._view)

    @property
    def suspect(self) -> bool:
        """Whether the newest image should be decoded although no request needs it.

        True until a good image ends a fault that only decoding detects, and for `CALM` seconds
        after a damaged image.
        """
        if self._image is None or self._image is self._shown:
            return False
        damage = self._damage_stamp
        return self._damaged or (damage is not None and 0.0 <= self._image.stamp - damage < CALM)

    def judge(self, problem: str | None, *, blank: bool) -> None:
        """Take the result of decoding the image of the last `show`; `problem` is why it is bad."""
        if self._shown is None:  # dropped in the meantime
            return
        self.blank = blank and problem is None
        if problem is not None:
            self._damage_stamp = self._shown.stamp
        if problem is not None or self._damaged:
            self._judge(self._shown.stamp, problem)
            self._damaged = self.fault is not None

    def _judge(self, stamp: float | None, problem: str | None) -> None:
        """Record one of the latest images as bad or good."""
        stamp = stamp if stamp is not None else self.stamp or 0.0
        self._verdicts[stamp] = problem is not None
        while len(self._verdicts) > _LOOKED_BACK:
            del self._verdicts[next(iter(self._verdicts))]
        since = None if self._bad_stamp is None else stamp - self._bad_stamp
        recent = since is not None and 0.0 <= since < CALM
        if problem is not None:
            self._alternating = recent and (self._alternating or self.fault is None)
            self._bad_stamp = stamp
            self.fault = problem
            if self._alternating:
                bad = sum(self._verdicts.values())
                self.fault = f"{bad} of the last {len(self._verdicts)} images were bad: {problem}"
        elif not (self._alternating and recent):
            self._alternating = False
            self.fault = None

    def _warning(self, image: CameraImage) -> str | None:
        """Return a warning about the image size, for the first image and after a change of size."""
        size = (image.height, image.width)
        texts = []
        if self._told is not None:
            height, width, told = self._told
            if (height, width) == size or 0.0 <= image.stamp - told < _QUIET:
                return None
            texts.append(
                f"images were {width} x {height} pixels and are {size[1]} x {size[0]} now",
            )
        self._told = (*size, image.stamp)
        distortion = self._view.distortion(*size)
        if distortion:
            texts.append(distortion)
        return f"{self.source.name}: {'; '.join(texts)}" if texts else None
