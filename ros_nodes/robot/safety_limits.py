"""The limits that `SafetyFilter` enforces, validated on construction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.pose_trust import PHYSICAL_VELOCITY

JOINT_STATES = "joint_states"  # the input of every arm
NEAR = 1e-9  # rounding error of a distance that may equal `limits.step` [rad]
_ARRAYS = ("position_low", "position_high", "max_velocity", "max_step", "physical_velocity")


@dataclass(frozen=True)
class SafetyLimits:
    """The limits of an arm.

    Raises:
        ConfigError: Arrays have wrong lengths, limits are not finite or not in order, or a timeout
            is not positive.
    """

    joint_names: tuple[str, ...]  # J, in the order of every array here
    position_low: Array  # (J,) [rad]
    position_high: Array  # (J,) [rad]
    max_velocity: Array  # (J,) [rad/s]: change of the command per second
    # (J,) [rad]: distance of a command from the measured position, and of a new pose from the last
    max_step: Array
    # input name -> largest age [s]; "joint_states" must be one of them
    timeouts: Mapping[str, float]
    gripper_low: float = 0.0  # opening [m]
    gripper_high: float = 0.1  # opening [m]
    # (J,) largest physical velocities [rad/s], for `PoseTrust`; empty: the larger of `max_velocity`
    # and `PHYSICAL_VELOCITY`.
    physical_velocity: Array = field(default_factory=lambda: np.empty(0))
    # (J,) acceleration of commands [rad/s^2]; a hold stops at once regardless
    max_acceleration: Array | None = None
    # Whether commands are joint positions. A twist moves the tool and leaves the posture to its
    # controller, so the commanded joints may differ from the measured ones; its hold is a zero
    # twist.
    commands_joints: bool = True

    def __post_init__(self) -> None:
        names = tuple(self.joint_names)
        object.__setattr__(self, "joint_names", names)
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"joint_names are {list(names)}; give every joint once.")
        if not np.size(self.physical_velocity):
            physical = np.maximum(self.max_velocity, PHYSICAL_VELOCITY)
            object.__setattr__(self, "physical_velocity", physical)
        for name in _ARRAYS:
            object.__setattr__(self, name, self._checked_array(name))
        if (self.position_low >= self.position_high).any():
            joint = names[int((self.position_low >= self.position_high).argmax())]
            raise ConfigError(f"The lower position limit of {joint} is not below the upper one.")
        if JOINT_STATES not in self.timeouts:
            raise ConfigError(
                f"timeouts has {sorted(self.timeouts)}; {JOINT_STATES!r} must have one."
            )
        wrong = {name: value for name, value in self.timeouts.items() if not 0 < value < math.inf}
        if wrong:
            raise ConfigError(f"The timeouts {wrong} must be positive and finite [s].")
        if not -math.inf < self.gripper_low < self.gripper_high < math.inf:
            raise ConfigError(
                f"The gripper limits [{self.gripper_low}, {self.gripper_high}] must be finite and "
                "in order."
            )

    def _checked_array(self, name: str) -> Array:
        """Return a copy (J,) of the limit `name`, with one finite number per joint, positive unless
        it is a position.
        """
        value = np.array(getattr(self, name), dtype=np.float64)
        if value.shape != (len(self.joint_names),) or not np.isfinite(value).all():
            raise ConfigError(
                f"{name} is {value.tolist()}; give one finite number for each of "
                f"{list(self.joint_names)}."
            )
        if not name.startswith("position") and (value <= 0).any():
            raise ConfigError(f"{name} is {value.tolist()}; every value must be positive.")
        return value
