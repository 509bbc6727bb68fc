"""The newest image of every camera and the newest joint state, their ages, and the observation that
a policy receives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import JointState

from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.camera import Camera
from ceed_vla.ros_nodes.robot.images import Seen, Shown
from ceed_vla.ros_nodes.robot.joint_table import JointTable
from ceed_vla.ros_nodes.robot.messages import seconds
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.pose_trust import by_name
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig
from ceed_vla.ros_nodes.robot.safety import JOINT_STATES, SYNCHRONIZE, Hold
from ceed_vla.ros_nodes.robot.state_vector import measured_fields, state_vector

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm

MOVED = 0.05  # joint motion after which a camera's image must have changed [rad]
AT_ONCE = 0.1  # largest gap between the stamps of an image and of the pose it shows [s]


@dataclass
class _Look:
    """A camera's image that repeats, and the arm's pose at its first stamp."""

    changed: float | None  # stamp of the image's first copy [s]
    pose: Array | None  # of the arm at that time (J,) [rad]; None if unknown
    moved: float | None = None  # stamp of the joint state that is `MOVED` away from `pose` [s]
    stuck: bool = False


class Observations:
    """Stores the newest messages and returns a policy's observation; `PolicySpec` has its features.

    A camera that repeats one image for longer than `frozen_after` [s] while the arm moves is a
    fault; 0 disables this check.

    Attributes:
        table: The newest state of every joint.
        opening: Measured opening of the gripper [m]; None without a gripper.

    `ConfigError`: The policy needs a camera or a state that the robot does not have, or one of
    another length.
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
                    f"The policy's {feature} has {length} values; "
                    f"{', '.join(robot.states[feature])} of {robot.source} make "
                    f"{robot.state_dim(feature)} (arm joints: {', '.join(robot.arm.joints)})."
                )
        self.cameras = [Camera(images[feature], shape) for feature, shape in cameras.items()]
        self._features = tuple(states)
        # Only these fields are read: some drivers send NaN as velocities.
        self._measured = measured_fields(robot, states)
        self.table = JointTable(
            (*robot.arm.joints, *(robot.gripper.joints if robot.gripper else ()))
        )
        self._looks: dict[str, _Look] = {}  # of every camera
        # component -> (J,) of the arm [rad], [rad/s], [N m]; empty at first
        self._joints: dict[str, Array] = {}
        self.opening: float | None = None
        self._delays: dict[str, float | None] = {}  # input -> age of its newest message on arrival
        self._joint_stamp: float | None = None
        self._joint_fault: str | None = None

    def renewed(self) -> bool:
        """Return whether every camera has a new image since this was last true, with stamps as
        close as the cameras' rate allows.
        """
        if not self.cameras or not all(camera.renewed for camera in self.cameras):
            return False
        stamps = [camera.stamp or 0.0 for camera in self.cameras]
        newest = self.cameras[stamps.index(max(stamps))]
        together = max(stamps) - min(stamps) <= 0.5 * min(newest.gaps, default=math.inf)
        # With the next image of the camera that is behind, the stamps may be closer.
        for camera in self.cameras:
            camera.renewed = not together and camera is newest
        return together

    def take_joints(
        self, message: JointState
    ) -> tuple[Sequence[str], Sequence[float], list[float]]:
        """Take a joint state; a malformed one is a fault until a good one arrives.

        Returns the arguments of `SafetyFilter.measure`: names, positions and stamps of all known
        joints.
        """
        merged, stamps = self.table.take(message)
        gripper, opening = self._robot.gripper, None
        try:
            joints = {
                part: by_name(
                    merged.name,
                    getattr(merged, values),
                    self._robot.arm.joints,
                    part.removeprefix("joint_"),
                )
                for part, values in self._measured.items()
            }
            if gripper is not None and gripper.joints:
                fingers = by_name(merged.name, merged.position, gripper.joints, "positions")
                opening = gripper.measured.ours(float(fingers.sum()))
        except ObservationError as error:
            self._joint_fault = str(error)
        else:
            self._joint_fault = None
            self._joint_stamp = seconds(merged.header.stamp)
            self._joints, self.opening = joints, opening
        return merged.name, merged.position, stamps

    @property
    def fault(self) -> Hold | None:
        """The fault of the newest messages; None if they are good."""
        for camera in self.cameras:
            if camera.fault is not None:
                return Hold("bad_image", f"{camera.source.name}: {camera.fault}")
        if self._joint_fault is not None:
            return Hold("bad_joint_states", self._joint_fault)
        return self._frozen()

    def look_anew(self) -> None:
        """Restart the check for frozen images, because an operator inspected the arm: its earlier
        motion says nothing about the present images.
        """
        self._looks.clear()

    def _frozen(self) -> Hold | None:
        """Return a fault if a camera repeats the image from before the arm moved.

        A camera that sends nothing is stale instead.
        """
        for camera in self.cameras if self._frozen_after and self._joints else ():
            name = camera.source.name
            pose = self._joints["joint_positions"]
            taken = camera.stamp or 0.0
            state = self._joint_stamp or 0.0
            known = abs(state - taken) < AT_ONCE
            look = self._looks.get(name)
            if look is None or look.changed != camera.changed or look.pose is None:
                self._looks[name] = _Look(camera.changed, pose if known else None)
                continue
            if np.abs(pose - look.pose).max() <= MOVED:
                look.moved = None
            elif look.moved is None and known:
                look.moved = state
            since = 0.0 if look.changed is None else taken - look.changed
            if since > self._frozen_after and look.moved is not None and taken >= look.moved:
                look.stuck = True
            if look.stuck:  # until another image arrives
                detail = f"{name} repeats the same image for {since:.2f} s while the arm moved"
                return Hold("frozen_image", f"{detail}; is its driver stuck?")
        return None

    def arrived(self, name: str, now: float) -> None:
        """Record that a message of an input arrived at the clock's time `now` [s]."""
        self._delays[name] = self.ages(now)[name]

    def explain(self, stale: Hold, timeouts: Mapping[str, float]) -> Hold:
        """Return the cause of a `stale` input, as far as the messages show it; `timeouts` are the
        inputs' timeouts [s].
        """
        if self.table.lacks and stale.detail.startswith(JOINT_STATES):
            return Hold("bad_joint_states", self.table.lacks)
        if self.fault is not None:
            return self.fault
        name = stale.detail.partition(" ")[0]
        delay = self._delays.get(name)
        if delay is None or abs(delay) <= timeouts.get(name, math.inf):
            return stale
        return Hold(stale.code, f"{stale.detail}; it arrives with such stamps. {SYNCHRONIZE}")

    def ages(self, now: float) -> dict[str, float | None]:
        """Input -> age of its newest good message at the clock's time `now` [s]; None if none has
        arrived.
        """
        stamps = {JOINT_STATES: self._joint_stamp, **{c.source.name: c.stamp for c in self.cameras}}
        return {name: None if stamp is None else now - stamp for name, stamp in stamps.items()}

    @property
    def image_stamp(self) -> float | None:
        """Stamp of the oldest of the newest images [s]; None if an image is missing or the policy
        has no cameras.
        """
        known = [camera.stamp for camera in self.cameras if camera.stamp is not None]
        return min(known) if known and len(known) == len(self.cameras) else None

    def forget(self) -> None:
        """Drop all messages: after a jump of the clock their stamps are invalid."""
        self.opening = self._joint_stamp = self._joint_fault = None
        self._joints = {}
        self.table.forget()
        self.look_anew()
        for camera in self.cameras:
            camera.forget()

    def snapshot(self, motion: Motion) -> dict[str, Shown | NDArray[np.generic]]:
        """Return the policy's observation: images that `images.decode` turns into pixels, and
        states (D,) float32.

        `judge` then takes the result of decoding. `ObservationError`: An input is missing or
        malformed.
        """
        if not self._joints:
            raise ObservationError("There is no joint state yet.")
        images = {camera.source.feature: camera.show() for camera in self.cameras}
        return {**images, **{feature: self._state(feature, motion) for feature in self._features}}

    def suspects(self) -> dict[str, Shown]:
        """Return the images that must be decoded to find whether a camera's fault is over; `judge`
        takes their results too.
        """
        return {camera.source.feature: camera.show() for camera in self.cameras if camera.suspect}

    def judge(self, seen: Seen) -> None:
        """Take the result of decoding the images that were last returned."""
        for camera in self.cameras:
            feature = camera.source.feature
            if feature in seen.problems:
                camera.judge(seen.problems[feature], blank=feature in seen.blank)

    def _state(self, feature: str, motion: Motion) -> NDArray[np.float32]:
        return state_vector(
            self._robot, self._model, feature, self._joints, self.opening, motion.commanded
        )


def _check(robot: RobotConfig, wanted: Iterable[str], have: Mapping[str, Any], key: str) -> None:
    """Refuse a policy that needs a feature that the robot's file does not have under `key`."""
    for feature in wanted:
        if feature not in have:
            has = ", ".join(have) or "none"
            raise ConfigError(
                f"The policy needs {feature!r}; {robot.source} has {has}. Add it under {key}."
            )
