"""The newest image of one camera, and whether its images can be used."""

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
from ceed_vla.ros_nodes.robot.robot_file import ImageSource

CALM = 1.0  # without a bad image, before a camera that sends bad ones among good ones is used [s]
_LOOKED_BACK = 30  # images whose verdicts are counted
_QUIET = 1.0  # between two warnings of a camera [s]


class Camera:
    """Keeps the newest message of a camera; only `Shown.pixels` decodes it, in another thread.

    A bad image is a fault until a good one comes. Where bad images alternate with good ones, until
    none came for `CALM` seconds: otherwise the arm would start and stop with every image.

    Attributes:
        source: The camera in the robot's file.
        received: Images that have come, bad ones included.
        stamp: When the newest image was taken [s]; None before the first.
        gaps: Between the last images, one of which may have been lost [s].
        renewed: Whether an image has come since `Observations.renewed` was last true.
        changed: Stamp of the first of the images that are all the same [s].
        blank: Whether the image that the policy saw last has one colour.
        fault: Why its images cannot be used; None if they can.
    """

    def __init__(self, source: ImageSource, shape: tuple[int, int, int]) -> None:
        self.source = source
        self._view = View(shape[1], shape[2], source.resize, source.crop)
        self.received = 0
        self._read = read_compressed if source.transport == "compressed" else read_image
        self.forget()

    def forget(self) -> None:
        """Forget all images."""
        self.stamp: float | None = None
        self.gaps: deque[float] = deque(maxlen=3)
        self.renewed = False
        self.changed: float | None = None
        self.blank = False
        self.fault: str | None = None
        self._image: CameraImage | None = None
        self._shown: CameraImage | None = None  # the one that is being decoded, or was last
        self._damaged = False  # the fault was found in the data, where no header tells of it
        self._damage_stamp: float | None = None  # of the last image that was found so [s]
        self._alternating = False
        self._bad_stamp: float | None = None  # of the last bad image [s]
        # Stamp of one of the last images [s] -> whether it is bad.
        self._verdicts: dict[float, bool] = {}
        # Height, width and stamp [s] of the image that was warned of last, or came first.
        self._told: tuple[int, int, float] | None = None

    def take(self, message: bytes) -> str | None:
        """Keep a serialized message, which may be bad; returns what to warn of."""
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
        """The newest image, for whoever decodes it; `judge` is then told of it.

        `ObservationError`: There is none.
        """
        if self._image is None:
            raise ObservationError(f"There is no image of {self.source.name} yet.")
        self._shown = self._image
        return Shown(self._image, self._view)

    @property
    def suspect(self) -> bool:
        """Whether its newest image should be decoded without a request for it.

        So it is until a good one ends a fault that no header tells of, and for `CALM` seconds after
        a damaged one.
        """
        if self._image is None or self._image is self._shown:
            return False
        damage = self._damage_stamp
        return self._damaged or (damage is not None and 0.0 <= self._image.stamp - damage < CALM)

    def judge(self, problem: str | None, *, blank: bool) -> None:
        """Take what decoding the image of the last `show` has found; `problem` is why it is bad."""
        if self._shown is None:  # forgotten meanwhile
            return
        self.blank = blank and problem is None
        if problem is not None:
            self._damage_stamp = self._shown.stamp
        if problem is not None or self._damaged:
            self._judge(self._shown.stamp, problem)
            self._damaged = self.fault is not None

    def _judge(self, stamp: float | None, problem: str | None) -> None:
        """One of the last images is bad or good."""
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
        """What is new of the size of its images: at the first one, and where it changes."""
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
