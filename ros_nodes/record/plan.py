"""What a recording stores: features, rate and format. Free of ROS, torch and lerobot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.images import View
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig
from ceed_vla.serving.predictor_types import PolicySpec

FORMATS = ("h264", "av1", "png")
INTERVENTION = "intervention"  # as LeRobot names it
SUCCESS = "next.success"  # as LeRobot names it
_POSE = ("x", "y", "z", "roll", "pitch", "yaw")  # of an end-effector action
_WHOLE = 1e-6  # largest difference of a rate from a whole number that is rounding


@dataclass(frozen=True)
class StoredCamera:
    """How the images of a camera are stored.

    Attributes:
        crop: As `ImageSource.crop`.
        size: Height and width [px] to which they are scaled; None: as they are.
    """

    crop: tuple[int, ...] = ()
    size: tuple[int, int] | None = None

    def view(self, height: int, width: int) -> View:
        """The view that makes a stored image of one of the camera's [px]."""
        if self.size is not None:
            return View(self.size[0], self.size[1], resize=True, crop=self.crop)
        if self.crop:
            height, width = self.crop[2:]
        return View(height, width, crop=self.crop)


@dataclass(frozen=True)
class Plan:
    """Features, rate and format of a data set.

    Attributes:
        root: Folder of the data set.
        fps: Frames per second.
        robot_type: Name of the robot.
        format: One of `FORMATS`: codec of the videos, or png for images within the tables.
        cameras: By feature.
        states: Feature -> length D.
        action_names: Names of the action's dimensions (A,).
        resume: Whether `root` may hold a recording that is continued.
    """

    root: Path
    fps: int
    robot_type: str
    format: str
    cameras: Mapping[str, StoredCamera]
    states: Mapping[str, int]
    action_names: tuple[str, ...]
    resume: bool = False

    def features(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
        """LeRobot's features.

        Args:
            sizes: Camera -> height and width of its images [px].
        """
        kind = "image" if self.format == "png" else "video"
        names = ["height", "width", "channels"]
        found: dict[str, dict[str, Any]] = {
            camera: {"dtype": kind, "shape": (*size, 3), "names": names}
            for camera, size in sizes.items()
        }
        for feature, length in self.states.items():
            found[feature] = {"dtype": "float32", "shape": (length,), "names": None}
        found["action"] = {
            "dtype": "float32",
            "shape": (len(self.action_names),),
            "names": list(self.action_names),
        }
        for flag in (INTERVENTION, SUCCESS):
            found[flag] = {"dtype": "bool", "shape": (1,), "names": None}
        return found


def make_plan(
    robot: RobotConfig, spec: PolicySpec | None, *, root: Path, format: str, resume: bool
) -> Plan:
    """Return the plan of a recording.

    Args:
        robot: The robot's file.
        spec: Of the policy whose features are stored; None: all of the robot's file.
        root: Folder of the data set.
        format: One of `FORMATS`.
        resume: Whether a recording in `root` is continued.

    `ConfigError`: The robot lacks a feature of the policy, or its rate is not a whole number.
    """
    rate = 1.0 / robot.action.dt
    if abs(rate - round(rate)) > _WHOLE:
        raise ConfigError(
            f"{robot.source} makes {rate:.4g} steps per second; a data set needs a whole number. "
            "Give fps instead of dt under action."
        )
    known = {image.feature for image in robot.images} | set(robot.states)
    wanted = {*spec.cameras, *spec.states} if spec else known
    if wanted - known:
        raise ConfigError(
            f"{robot.source} lacks {', '.join(sorted(wanted - known))}, which the policy reads."
        )
    cameras = {
        image.feature: StoredCamera(
            image.crop, (spec.cameras[image.feature][1], spec.cameras[image.feature][2])
        )
        if spec
        else StoredCamera(image.crop)
        for image in robot.images
        if image.feature in wanted
    }
    if not cameras:
        raise ConfigError(f"{robot.source} has no camera; a policy needs one.")
    return Plan(
        root,
        round(rate),
        robot.source.stem,
        format,
        cameras,
        {feature: robot.state_dim(feature) for feature in robot.states if feature in wanted},
        action_names(robot, spec),
        resume,
    )


def action_names(robot: RobotConfig, spec: PolicySpec | None) -> tuple[str, ...]:
    """Names of the dimensions of the robot's actions (A,).

    A policy's are those of its training data, so that a recording for it can be trained on together
    with these.

    `ConfigError`: The policy's actions have another number of dimensions.
    """
    if spec is not None and spec.action_dim != robot.action_dim:
        raise ConfigError(
            f"The actions of {spec.checkpoint} have {spec.action_dim} dimensions, those of "
            f"{robot.source} {robot.action_dim}."
        )
    if spec is not None and len(spec.action_names) == robot.action_dim:
        return spec.action_names
    body = _POSE if robot.action.kind == "ee_delta" else robot.arm.joints
    gripped = robot.gripper is not None and robot.gripper.action != "none"
    return (*body, "gripper") if gripped else tuple(body)
