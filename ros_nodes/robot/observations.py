"""The newest image of every camera and the newest joint state, how old they are, and what a policy is shown of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image, JointState

from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.kinematics import Array
from ros_nodes.robot.joint_table import JointTable
from ros_nodes.robot.messages import compressed_to_array, image_to_array, seconds
from ros_nodes.robot.motion import Motion
from ros_nodes.robot.plausibility import by_name
from ros_nodes.robot.robot_file import POSE_COMPONENTS, ImageSource, RobotConfig
from ros_nodes.robot.safety import JOINT_STATES, Hold

if TYPE_CHECKING:
    from ros_nodes.robot.kinematics import ModelArm

MOVED = 0.05  # a joint moves so far, and an image must have changed [rad]
AT_ONCE = 0.1  # between stamps of an image and of the pose that it shows [s]
_MEASURED = {"joint_positions": "position", "joint_velocities": "velocity", "joint_efforts": "effort"}


class Observations:
    """Takes messages, keeps the newest, and answers with a policy's observation; `PolicySpec` has its features.

    A camera that repeats one image for longer than `frozen_after` [s] while the arm moves is a fault; 0: it never is.

    Attributes:
        table: The newest of every joint.
        opening: Measured opening of the gripper [m]; None without.

    `ConfigError`: The policy wants a camera or a state that the robot does not have, or of another length.
    """

    def __init__(
        self,
        robot: RobotConfig,
        cameras: Mapping[str, tuple[int, int, int]],
        states: Mapping[str, int],
        model: ModelArm | None,
        frozen_after: float = 0.5,
    ) -> None:
        self._frozen_after = frozen_after
        self._robot, self._model = robot, model
        images = {source.feature: source for source in robot.images}
        _check(robot, cameras, images, "images")
        _check(robot, states, robot.states, "state")
        for feature, length in states.items():
            if robot.state_dim(feature) != length:
                raise ConfigError(
                    f"The policy's {feature} has {length} values; {', '.join(robot.states[feature])} of {robot.source} "
                    f"make {robot.state_dim(feature)} (arm joints: {', '.join(robot.arm.joints)})."
                )
        self.cameras = [Camera(images[feature], shape) for feature, shape in cameras.items()]
        self._features = tuple(states)
        # Component of a state -> the values of a joint state that are read for it: some drivers send NaN as velocities.
        parts = {"joint_positions", *(part for feature in states for part in robot.states[feature])}
        self._measured = {part: values for part, values in _MEASURED.items() if part in parts}
        self.table = JointTable((*robot.arm.joints, *(robot.gripper.joints if robot.gripper else ())))
        # Camera -> when its image changed [s], the pose then (None where that is not known), and whether it is stuck.
        self._looks: dict[str, tuple[float | None, Array | None, bool]] = {}
        self._joints: dict[str, Array] = {}  # component -> (J,) of the arm [rad], [rad/s], [N m]; empty at first
        self.opening: float | None = None
        self._joint_stamp: float | None = None
        self._joint_fault: str | None = None

    def renewed(self) -> bool:
        """Whether every camera has a new image since this was last true, all as near in time as their rate allows."""
        if not self.cameras or not all(camera.renewed for camera in self.cameras):
            return False
        stamps = [camera.stamp or 0.0 for camera in self.cameras]
        newest = self.cameras[stamps.index(max(stamps))]
        together = max(stamps) - min(stamps) <= 0.5 * min(newest.gaps, default=math.inf)
        for camera in self.cameras:  # sooner together again with the next image of the one that is behind?
            camera.renewed = not together and camera is newest
        return together

    def take_joints(self, message: JointState) -> tuple[Sequence[str], Sequence[float], list[float]]:
        """Take a joint state; a malformed one is a fault until a good one comes.

        Returns what `SafetyFilter.measure` takes: names, positions and stamps of all joints that are known.
        """
        merged, stamps = self.table.take(message)
        gripper, opening = self._robot.gripper, None
        try:
            joints = {
                part: by_name(merged.name, getattr(merged, values), self._robot.arm.joints, part.removeprefix("joint_"))
                for part, values in self._measured.items()
            }
            if gripper is not None and gripper.joints:
                fingers = by_name(merged.name, merged.position, gripper.joints, "positions")
                opening = gripper.measured.ours(float(fingers.sum()))
        except ObservationError as error:
            self._joint_fault = str(error)
        else:
            self._joint_fault, self._joint_stamp = None, seconds(merged.header.stamp)
            self._joints, self.opening = joints, opening
        return merged.name, merged.position, stamps

    @property
    def fault(self) -> Hold | None:
        """What is wrong with the newest messages; None if nothing is."""
        for camera in self.cameras:
            if camera.fault is not None:
                return Hold("bad_image", f"{camera.source.name}: {camera.fault}")
        if self._joint_fault is not None:
            return Hold("bad_joint_states", self._joint_fault)
        return self._frozen()

    def look_anew(self) -> None:
        """An operator has seen the arm: what moved before says nothing about the images that are there now."""
        self._looks.clear()

    def _frozen(self) -> Hold | None:
        for camera in self.cameras if self._frozen_after and self._joints else ():
            name, pose = camera.source.name, self._joints["joint_positions"]
            known = abs((self._joint_stamp or 0.0) - (camera.stamp or 0.0)) < AT_ONCE
            changed, before, stuck = self._looks.get(name, (None, None, False))
            if changed != camera.changed or before is None:
                self._looks[name] = camera.changed, pose if known else None, False
                continue
            since = 0.0 if changed is None or camera.stamp is None else camera.stamp - changed
            if not stuck and since > self._frozen_after and known and np.abs(pose - before).max() > MOVED:
                self._looks[name] = changed, before, stuck = changed, before, True
            if stuck:  # until another image comes
                detail = f"{name} repeats the same image for {since:.2f} s while the arm moved"
                return Hold("frozen_image", f"{detail}; is its driver stuck?")
        return None

    def ages(self, now: float) -> dict[str, float | None]:
        """Input -> age of its newest good message at the clock's time `now` [s]; None if none came."""
        stamps = {JOINT_STATES: self._joint_stamp, **{c.source.name: c.stamp for c in self.cameras}}
        return {name: None if stamp is None else now - stamp for name, stamp in stamps.items()}

    @property
    def image_stamp(self) -> float | None:
        """When the oldest of the newest images was taken [s]; None if one is missing or there are no cameras."""
        known = [camera.stamp for camera in self.cameras if camera.stamp is not None]
        return min(known) if known and len(known) == len(self.cameras) else None

    def forget(self) -> None:
        """Forget all messages: their stamps are worth nothing after a jump of the clock."""
        self.opening = self._joint_stamp = self._joint_fault = None
        self._joints = {}
        self.table.forget()
        self.look_anew()
        for camera in self.cameras:
            camera.forget()

    def snapshot(self, motion: Motion) -> dict[str, NDArray[np.generic]]:
        """What the policy is shown now: images (H, W, 3) uint8 and states (D,) float32.

        `ObservationError`: An input is missing or malformed.
        """
        if not self._joints:
            raise ObservationError("There is no joint state yet.")
        images = {camera.source.feature: camera.pixels() for camera in self.cameras}
        return {**images, **{feature: self._state(feature, motion) for feature in self._features}}

    def _state(self, feature: str, motion: Motion) -> NDArray[np.float32]:
        parts, units, gripper = self._robot.states[feature], self._robot.arm.units, self._robot.gripper
        positions = self._joints["joint_positions"]
        values: dict[str, Any] = {**self._joints, **motion.commanded, "joint_positions": units.theirs(positions)}
        if "joint_velocities" in values:
            values["joint_velocities"] = values["joint_velocities"] / units.scale
        if "joint_efforts" in values:  # [N m], whatever angles are counted in
            values["joint_efforts"] = values["joint_efforts"] * np.sign(units.scale)
        if gripper is not None and self.opening is not None:
            values["finger_opening"] = gripper.policy.theirs(self.opening)
        if self._model is not None and set(POSE_COMPONENTS) & set(parts):
            values["tcp_position"], matrix = self._model.pose(positions)
            values["tcp_quaternion"] = self._model.quaternion(matrix)
        return np.concatenate([np.atleast_1d(values[part]) for part in parts]).astype(np.float32)


class Camera:
    """The newest image of one camera; a malformed message is a fault until a good one comes."""

    def __init__(self, source: ImageSource, shape: tuple[int, int, int]) -> None:
        self.source = source
        self._height, self._width = shape[1], shape[2]
        self.forget()

    def forget(self) -> None:
        self.stamp: float | None = None
        self.gaps: deque[float] = deque(maxlen=3)  # between the last images, one of which may have been lost [s]
        self.renewed = False
        self.changed: float | None = None  # stamp of the first of the images that are all the same
        self.blank = False  # the image that the policy saw last has one colour
        self.fault: str | None = None
        self._data: object = None
        self._pixels: NDArray[np.uint8] | None = None
        self._unread: CompressedImage | None = None

    def take(self, message: Image | CompressedImage) -> None:
        """Keep a message. Reading JPEG takes milliseconds, so it waits for `pixels`, unless it may clear a fault."""
        if self.source.transport == "compressed" and self.fault is None:
            self._unread = message
        else:
            try:
                self._pixels = self._read(message)
            except ObservationError as error:
                self.fault = str(error)
                return
            self.fault = self._unread = None
        stamp = seconds(message.header.stamp)
        if self.stamp is not None and stamp > self.stamp:
            self.gaps.append(stamp - self.stamp)
        self.stamp, self.renewed = stamp, True
        if self._data != message.data or self.changed is None or self.stamp < self.changed:
            self._data, self.changed = message.data, self.stamp

    def pixels(self) -> NDArray[np.uint8]:
        """(H, W, 3) in the policy's size."""
        if self._unread is not None:
            message, self._unread = self._unread, None
            try:
                self._pixels = self._read(message)
            except ObservationError as error:
                self.fault, self.stamp = str(error), None
                raise
        if self._pixels is None:
            raise ObservationError(f"There is no image of {self.source.name} yet.")
        pixels = np.ascontiguousarray(self._pixels)
        self.blank = all((part == pixels[0, 0]).all() for part in (pixels[::4, ::4], pixels))  # few are tried first
        if pixels.shape[:2] == (self._height, self._width):
            return pixels
        from PIL import Image as PillowImage

        image = PillowImage.fromarray(pixels)
        return np.asarray(image.resize((self._width, self._height), PillowImage.Resampling.BILINEAR))

    def _read(self, message: Image | CompressedImage) -> NDArray[np.uint8]:
        compressed = self.source.transport == "compressed"
        pixels = compressed_to_array(message) if compressed else image_to_array(message)
        if self.source.crop:
            top, left, kept_height, kept_width = self.source.crop
            if top + kept_height > pixels.shape[0] or left + kept_width > pixels.shape[1]:
                size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
                raise ObservationError(f"The image is {size}; the robot's file crops {list(self.source.crop)} of it.")
            pixels = pixels[top : top + kept_height, left : left + kept_width]
        height, width = pixels.shape[:2]
        if (height, width) != (self._height, self._width) and not self.source.resize:
            raise ObservationError(
                f"The image is {width} x {height} pixels; the policy was trained on {self._width} x {self._height}. "
                "Set the camera to it, or resize: true in the robot's file."
            )
        return pixels


def _check(robot: RobotConfig, wanted: Iterable[str], have: Mapping[str, Any], key: str) -> None:
    """Refuse a policy that wants more features than the robot's file has under `key`."""
    for feature in wanted:
        if feature not in have:
            has = ", ".join(have) or "none"
            raise ConfigError(f"The policy wants {feature!r}; {robot.source} has {has}. Add it under {key}.")
