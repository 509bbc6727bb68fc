"""From messages of a robot to the rows of a data set. Free of ROS: messages only need the fields of
their types, and images are serialized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ObservationError
from ceed_vla.ros_nodes.record.commanded import ActionMaker, Commanded
from ceed_vla.ros_nodes.record.sampling import Frame, FrameSampler, Losses
from ceed_vla.ros_nodes.robot.images import CameraImage, read_compressed, read_image
from ceed_vla.ros_nodes.robot.robot_config import CommandSource, RobotConfig
from ceed_vla.ros_nodes.robot.state_vector import measured_fields, state_vector

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm

COMMANDED = "commands"
PERSON = "person"  # `Commanded.source` of an intervention: `Charge.PERSON`


@dataclass(frozen=True)
class Row:
    """One frame of the data set.

    Attributes:
        images: Feature -> image, not decoded.
        values: Feature -> array: the states, and ``action``.
        intervention: Whether a person commanded the arm, from this frame to the next.
    """

    images: Mapping[str, CameraImage]
    values: Mapping[str, NDArray[np.float32]]
    intervention: bool


class EpisodeRows:
    """Joins the messages of a robot's topics to rows.

    Args:
        robot: The robot's file.
        model: The arm's kinematics; None if nothing needs it.
        patience: See `FrameSampler`.
        longest_gap: See `FrameSampler`.

    Attributes:
        faults: Input -> why its last message was not used.
        bad: Input -> number of messages that were not used.
    """

    def __init__(
        self,
        robot: RobotConfig,
        model: ModelArm | None,
        *,
        patience: float = 0.2,
        longest_gap: float = 0.5,
    ) -> None:
        self._robot = robot
        self._model = model
        self._maker = ActionMaker(robot, model)
        self._fields = measured_fields(robot)
        self._joints = (*robot.arm.joints, *(robot.gripper.joints if robot.gripper else ()))
        self._read: dict[str, Callable[[bytes], CameraImage]] = {
            image.feature: read_compressed if image.transport == "compressed" else read_image
            for image in robot.images
        }
        self._names = {image.feature: image.name for image in robot.images}
        self._newest: dict[str, float] = {}  # input -> its newest stamp [s]
        self.faults: dict[str, str] = {}
        self.bad: dict[str, int] = {}
        self._sampler = FrameSampler(
            robot.action.dt,
            [*self._names.values(), *self._joints, COMMANDED],
            following=[COMMANDED],
            counted=list(self._names.values()),
            patience=patience,
            longest_gap=longest_gap,
        )

    # ---- messages --------------------------------------------------------------------------------

    def take_image(self, feature: str, message: bytes) -> None:
        """Take a serialized image of a camera."""
        name = self._names[feature]
        try:
            image = self._read[feature](message)
        except ObservationError as error:
            self._refuse(name, str(error))
        else:
            self._put(name, image.stamp, image)

    def take_joints(self, message: Any, prefix: str = "") -> None:
        """Take a sensor_msgs/JointState with some of the robot's joints; `prefix` is that of the
        topic, see `RobotConfig.joint_topics`.
        """
        stamp = _seconds(message)
        names = [prefix + name for name in message.name]
        columns = {field: getattr(message, field) for field in self._fields.values()}
        for name in self._joints:
            if name not in names:
                continue
            place = names.index(name)
            arm = name in self._robot.arm.joints
            values = {
                field: float(column[place]) if place < len(column) else math.nan
                for field, column in columns.items()
                if arm or field == "position"
            }
            wrong = [field for field, value in values.items() if not math.isfinite(value)]
            if wrong:
                self._refuse(name, f"its {wrong[0]} is {values[wrong[0]]}")
            else:
                self._put(name, stamp, values)

    def take_commands(self, message: Any) -> None:
        """Take a sensor_msgs/JointState of the robot's command topic."""
        named = dict(zip(message.name, message.position, strict=False))
        self._take_commanded(named, _seconds(message), str(message.header.frame_id))

    def take_positions(self, message: Any, stamp: float) -> None:
        """Take a std_msgs/Float64MultiArray of the command topic: the joints in order, and behind
        them those of the gripper, if the command source names any.

        Args:
            message: It has no stamp.
            stamp: Time of its arrival [s].
        """
        source = self._robot.commands
        names = (*source.joints, *source.gripper)
        self._take_commanded(dict(zip(names, message.data, strict=False)), stamp, "")

    def _take_commanded(self, named: Mapping[str, float], stamp: float, who: str) -> None:
        wanted = self._robot.commands.joints
        missing = [name for name in wanted if name not in named]
        missing += self._missing_gripper(named)
        joints = np.array([named.get(name, math.nan) for name in wanted])
        opening = self._opening(named)
        if missing:
            self._refuse(COMMANDED, f"it lacks {', '.join(missing)}")
        elif not np.isfinite(joints).all() or not math.isfinite(opening or 0.0):
            self._refuse(COMMANDED, "its positions are not finite")
        else:
            self._put(COMMANDED, stamp, Commanded(joints, opening, who))

    def _missing_gripper(self, named: Mapping[str, float]) -> list[str]:
        """What a command lacks to say what the gripper does."""
        gripper = self._robot.gripper
        source = self._robot.commands
        if gripper is None or gripper.action == "none":
            return []
        if source.gripper:
            return [name for name in source.gripper if name not in named]
        if source.topic == CommandSource().topic:  # the node's, before its first gripper command
            return []
        return [] if "gripper" in named else ["gripper (see commands.gripper)"]

    def _opening(self, named: Mapping[str, float]) -> float | None:
        """The gripper's opening in a command [m]; None without one."""
        source = self._robot.commands
        gripper = self._robot.gripper
        if gripper is None:
            return None
        if source.gripper:
            fingers = [named[name] for name in source.gripper if name in named]
            complete = len(fingers) == len(source.gripper)
            return float(gripper.measured.ours(sum(fingers))) if complete else None
        value = named.get("gripper")
        return None if value is None else float(value)

    def _put(self, name: str, stamp: float, value: Any) -> None:
        self._newest[name] = max(self._newest.get(name, -math.inf), stamp)
        self._sampler.put(name, stamp, value)

    @property
    def clock(self) -> float:
        """The messages' time [s]: the second newest stamp of all inputs, because the newest may be
        of a driver with another clock.
        """
        stamps = sorted(self._newest.values())
        return stamps[-2] if len(stamps) > 1 else -math.inf

    def _refuse(self, name: str, why: str) -> None:
        self.faults[name] = why
        self.bad[name] = self.bad.get(name, 0) + 1

    # ---- the episode -----------------------------------------------------------------------------

    def start(self, time: float) -> None:
        """Begin an episode at a time of the messages' clock [s]."""
        self._maker.clipped = 0
        self._sampler.start(time)

    def stop(self, time: float) -> None:
        """End the episode at a time of the messages' clock [s]."""
        self._sampler.stop(time)

    def finish(self) -> None:
        """Make no more rows until `start`."""
        self._sampler.finish()

    def done(self, now: float) -> bool:
        """Whether the episode has no more rows at the time `now` [s]."""
        return self._sampler.done(now)

    def rows(self, now: float) -> Iterator[Row]:
        """Yield the rows that are complete at the time `now` [s]."""
        for frame in self._sampler.ready(now):
            yield self._row(frame)

    def silent(self, since: float) -> list[str]:
        """Inputs without a message since a time [s]."""
        return self._sampler.silent(since)

    @property
    def losses(self) -> Losses:
        """What the present episode lacked."""
        return self._sampler.losses

    @property
    def gap(self) -> str:
        """Why the episode has ended by itself; "" if it has not."""
        return self._sampler.gap

    @property
    def frames(self) -> int:
        """Rows so far."""
        return self._sampler.frames

    @property
    def clipped(self) -> int:
        """Actions of the present episode that were larger than a full action."""
        return self._maker.clipped

    def _row(self, frame: Frame) -> Row:
        opening = self._measured_opening(frame.values)
        commanded = _known(frame.values[COMMANDED], opening)
        following = _known(frame.following[COMMANDED], opening)
        joints = {
            part: np.array([frame.values[name][field] for name in self._robot.arm.joints])
            for part, field in self._fields.items()
        }
        parts = self._maker.state_parts(commanded)
        values = {
            feature: state_vector(self._robot, self._model, feature, joints, opening, parts)
            for feature in self._robot.states
        }
        values["action"] = self._maker.action(commanded, following)
        images = {feature: frame.values[name] for feature, name in self._names.items()}
        by_person = commanded.source == following.source == PERSON  # during the whole step
        return Row(images, values, by_person)

    def _measured_opening(self, values: Mapping[str, Any]) -> float | None:
        gripper = self._robot.gripper
        if gripper is None or not gripper.joints:
            return None
        fingers: Sequence[float] = [values[name]["position"] for name in gripper.joints]
        return float(gripper.measured.ours(sum(fingers)))


def _known(commanded: Commanded, opening: float | None) -> Commanded:
    """A command with the measured opening [m] if the gripper was not commanded yet."""
    return replace(commanded, opening=opening) if commanded.opening is None else commanded


def _seconds(message: Any) -> float:
    """The stamp of a message's header [s]."""
    stamp = message.header.stamp
    return float(stamp.sec) + 1e-9 * float(stamp.nanosec)
