"""The newest image of every camera and the newest joint state, how old they are, and what a policy is shown of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image, JointState

from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.kinematics import Array
from ros_nodes.robot.messages import compressed_to_array, image_to_array, joint_state_by_name, seconds
from ros_nodes.robot.motion import Motion
from ros_nodes.robot.robot_file import POSE_COMPONENTS, ImageSource, RobotConfig
from ros_nodes.robot.safety import JOINT_STATES, Hold

if TYPE_CHECKING:
    from ros_nodes.robot.kinematics import ModelArm


@dataclass(frozen=True)
class Joints:
    """A joint state in the robot's order."""

    positions: Array  # (J,) of the arm [rad]
    velocities: Array | None  # (J,) [rad/s]; None unless the policy's state has them
    opening: float | None  # of the gripper [m]; None without a measured gripper


class Observations:
    """Takes messages, keeps the newest, and answers with a policy's observation; `PolicySpec` has its features.

    Raises:
        ConfigError: The policy wants a camera or a state that the robot does not have, or of another length.
    """

    def __init__(
        self,
        robot: RobotConfig,
        cameras: Mapping[str, tuple[int, int, int]],
        states: Mapping[str, int],
        model: ModelArm | None,
    ) -> None:
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
        self._wants_velocities = any("joint_velocities" in robot.states[feature] for feature in states)
        self.joints: Joints | None = None
        self._joint_stamp: float | None = None
        self._joint_fault: str | None = None

    def renewed(self) -> bool:
        """Whether every camera has a new image since this was last true."""
        if not self.cameras or not all(camera.renewed for camera in self.cameras):
            return False
        for camera in self.cameras:
            camera.renewed = False
        return True

    def take_joints(self, message: JointState) -> None:
        """Take a joint state; a malformed one is a fault until a good one comes."""
        arm, gripper = self._robot.arm, self._robot.gripper
        try:
            positions, velocities = joint_state_by_name(message, arm.joints, velocities=self._wants_velocities)
            if self._wants_velocities and velocities is None:
                raise ObservationError("The joint state has no velocities, but the policy's state has.")
            opening = None
            if gripper is not None and gripper.joints:
                fingers, _ = joint_state_by_name(message, gripper.joints, velocities=False)
                opening = gripper.opening_scale * float(fingers.sum())
        except ObservationError as error:
            self._joint_fault = str(error)
            return
        self._joint_fault = None
        self.joints = Joints(positions, velocities, opening)
        self._joint_stamp = seconds(message.header.stamp)

    @property
    def fault(self) -> Hold | None:
        """What is wrong with the newest messages; None if nothing is."""
        for camera in self.cameras:
            if camera.fault is not None:
                return Hold("bad_image", f"{camera.source.name}: {camera.fault}")
        return Hold("bad_joint_states", self._joint_fault) if self._joint_fault is not None else None

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
        self.joints = self._joint_stamp = self._joint_fault = None
        for camera in self.cameras:
            camera.forget()

    def snapshot(self, motion: Motion) -> dict[str, NDArray[np.generic]]:
        """What the policy is shown now: images (H, W, 3) uint8 and states (D,) float32.

        Raises:
            ObservationError: An input is missing or malformed.
        """
        if self.joints is None:
            raise ObservationError("There is no joint state yet.")
        images = {camera.source.feature: camera.pixels() for camera in self.cameras}
        return {**images, **{feature: self._state(feature, self.joints, motion) for feature in self._features}}

    def _state(self, feature: str, joints: Joints, motion: Motion) -> NDArray[np.float32]:
        parts = self._robot.states[feature]
        per_unit = 1.0 / self._robot.arm.radians
        values: dict[str, Array | float | None] = {
            "joint_positions": joints.positions * per_unit,
            "joint_velocities": None if joints.velocities is None else joints.velocities * per_unit,
            "finger_opening": joints.opening,
            **motion.commanded,
        }
        if self._model is not None and set(POSE_COMPONENTS) & set(parts):
            values["tcp_position"], matrix = self._model.pose(joints.positions)
            values["tcp_quaternion"] = self._model.quaternion(matrix)
        return np.concatenate([np.atleast_1d(np.asarray(values[part])) for part in parts]).astype(np.float32)


class Camera:
    """The newest image of one camera; a malformed message is a fault until a good one comes."""

    def __init__(self, source: ImageSource, shape: tuple[int, int, int]) -> None:
        self.source = source
        self._height, self._width = shape[1], shape[2]
        self.forget()

    def forget(self) -> None:
        self.stamp: float | None = None
        self.renewed = False
        self.fault: str | None = None
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
        self.stamp, self.renewed = seconds(message.header.stamp), True

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
        if pixels.shape[:2] == (self._height, self._width):
            return pixels
        from PIL import Image as PillowImage

        image = PillowImage.fromarray(pixels)
        return np.asarray(image.resize((self._width, self._height), PillowImage.Resampling.BILINEAR))

    def _read(self, message: Image | CompressedImage) -> NDArray[np.uint8]:
        compressed = self.source.transport == "compressed"
        pixels = compressed_to_array(message) if compressed else image_to_array(message)
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
