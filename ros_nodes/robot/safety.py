"""The last check of every command, free of ROS: what may be sent to the arm now, and why not more.

A command passes in this order: latched stop, enabled, joint states plausible and inputs fresh, the caller's own reason
to hold, joint set, finite numbers; then it is clamped to the position limits, to the neighbourhood of the measured
position, to the velocity and the acceleration limit. A hold repeats the last command, so an arm never stops by a jump.

This is software: it is no safety-rated stop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.kinematics import Array
from ros_nodes.robot.plausibility import PHYSICAL_VELOCITY, Plausibility, by_name

JOINT_STATES = "joint_states"
CLAMPS = ("position", "step", "velocity", "acceleration", "gripper")
# Longest time between two commands that counts for `max_velocity` [s]: after a stall the command catches up slowly.
MAX_DT = 0.05
# Joint states that do not change for so long [s] while commands went on by so much [rad] are no measurements.
FROZEN_TIME, FROZEN_WAY = 0.5, 0.05


@dataclass(frozen=True)
class SafetyLimits:
    """What an arm may do.

    `ConfigError`: Wrong lengths, limits that are not finite or in the wrong order, a timeout that is not positive.
    """

    joint_names: tuple[str, ...]  # J, in the order of every array here
    position_low: Array  # (J,) [rad]
    position_high: Array  # (J,) [rad]
    max_velocity: Array  # (J,) [rad/s]: change of the command per second
    max_step: Array  # (J,) [rad]: distance of a command from the measured position
    timeouts: Mapping[str, float]  # input name -> largest age [s]; "joint_states" must be one of them
    gripper_low: float = 0.0  # opening [m]
    gripper_high: float = 0.1  # opening [m]
    # (J,) that the joints reach physically [rad/s], for `Plausibility`; empty: the larger of `max_velocity` and
    # `PHYSICAL_VELOCITY`.
    physical_velocity: Array = field(default_factory=lambda: np.empty(0))
    max_acceleration: Array | None = None  # (J,) of commands [rad/s^2]; a hold stops at once all the same

    def __post_init__(self) -> None:
        names = tuple(self.joint_names)
        object.__setattr__(self, "joint_names", names)
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"joint_names are {list(names)}; give every joint once.")
        if not np.size(self.physical_velocity):
            object.__setattr__(self, "physical_velocity", np.maximum(self.max_velocity, PHYSICAL_VELOCITY))
        for name in ("position_low", "position_high", "max_velocity", "max_step", "physical_velocity"):
            value = np.array(getattr(self, name), dtype=np.float64)
            if value.shape != (len(names),) or not np.isfinite(value).all():
                raise ConfigError(f"{name} is {value.tolist()}; give one finite number for each of {list(names)}.")
            if not name.startswith("position") and (value <= 0).any():
                raise ConfigError(f"{name} is {value.tolist()}; every value must be positive.")
            object.__setattr__(self, name, value)
        if (self.position_low >= self.position_high).any():
            joint = names[int((self.position_low >= self.position_high).argmax())]
            raise ConfigError(f"The lower position limit of {joint} is not below the upper one.")
        if JOINT_STATES not in self.timeouts:
            raise ConfigError(f"timeouts has {sorted(self.timeouts)}; {JOINT_STATES!r} must have one.")
        wrong = {name: value for name, value in self.timeouts.items() if not 0 < value < math.inf}
        if wrong:
            raise ConfigError(f"The timeouts {wrong} must be positive and finite [s].")
        if not -math.inf < self.gripper_low < self.gripper_high < math.inf:
            raise ConfigError(
                f"The gripper limits [{self.gripper_low}, {self.gripper_high}] must be finite and in order."
            )


@dataclass(frozen=True)
class Hold:
    """Why the arm holds."""

    code: str  # docs/robots.md explains each; holds are counted by it
    detail: str  # the same for a person, with values and limits


@dataclass(frozen=True)
class Decision:
    """What to send."""

    # (J,) [rad], always finite and inside the limits; None if there was no command yet and nobody knows where the arm
    # is: send nothing then.
    positions: Array | None
    gripper: float | None  # opening [m]; None if it was not commanded since `SafetyFilter.enable`
    hold: Hold | None  # why this repeats the last command; None in normal motion
    clamped: tuple[str, ...] = ()  # which of `CLAMPS` changed what was asked for


class SafetyFilter:
    """Decides every command. Disabled at first; the emergency stop is latched and disables.

    `reset` only unlatches: as on a machine, motion starts again by a separate `enable`.

    Attributes:
        enabled: Whether motion is allowed (unless stopped).
        follows: Whether commands reach the arm; False in a dry run.
        stopped: Why the emergency stop is latched; None if it is not.
        clamps: Kind -> commands that it changed.
        holds: Code -> commands that were replaced by a hold.
    """

    def __init__(self, limits: SafetyLimits) -> None:
        self.limits = limits
        self.enabled, self.follows = False, True
        self.stopped: str | None = None
        self.clamps: Counter[str] = Counter(dict.fromkeys(CLAMPS, 0))
        self.holds: Counter[str] = Counter()
        self._measured: Array | None = None
        self._fault: Hold | None = Hold("no_joint_states", "no joint state has come yet")
        self._latched: Hold | None = None  # joint states that cannot be true came while motion was enabled
        self._plausibility = Plausibility(
            limits.joint_names, limits.position_low, limits.position_high, limits.physical_velocity
        )
        self._last: Array | None = None  # last command, inside the limits
        # The newest positions, since when they are the same though commands moved [s], and the command then.
        self._still: tuple[Array, float, Array | None] | None = None
        self._speed: Array = np.zeros(len(limits.joint_names))  # of the last command [rad/s]
        self._gripper: float | None = None

    # ---- inputs -------------------------------------------------------------------------------------------------

    @property
    def measured(self) -> Array | None:
        """Last good joint positions (J,) [rad]; None before the first."""
        return None if self._measured is None else self._measured.copy()

    @property
    def last_command(self) -> Array | None:
        """Last command (J,) [rad], which a hold repeats; None before the first."""
        return None if self._last is None else self._last.copy()

    def measure(
        self, names: Sequence[str], positions: Sequence[float], stamps: float | Sequence[float] | None = None
    ) -> Hold | None:
        """Take positions [rad] of joints, matched by name; others are ignored. Returns why the arm holds, or None.

        While motion is enabled a state that cannot be true is latched. Otherwise the arm may be elsewhere all at once,
        as in a simulation that is reset, and only a position outside the limits counts. Jumps and frozen states are not
        found without `stamps`, the times of measurement [s].
        """
        wanted, times = self.limits.joint_names, None
        try:
            measured = by_name(names, positions, wanted, "positions")
            if stamps is not None:
                times = by_name(names, np.broadcast_to(stamps, len(names)).tolist(), wanted, "stamps")
        except ObservationError as error:
            self._fault = Hold("bad_joint_states", str(error))
            return self._fault
        outside = self._plausibility.outside(measured)
        doubt = outside or self._plausibility.jump(measured, times)
        frozen = "" if times is None else self._frozen(measured, float(times.min()))
        if (doubt or frozen) and self.enabled and self._latched is None:
            code = "implausible_joint_states" if doubt else "frozen_joint_states"
            self._latched = Hold(code, f"{doubt or frozen}; see where the arm is, then enable")
        self._fault = Hold("implausible_joint_states", outside) if outside else None
        if not outside:
            self._measured = measured
        return self._latched or self._fault

    def pose_fault(self, age: float | None) -> Hold | None:
        """Why nobody knows where the arm is, or None; `age` of the newest joint state [s], None if none came."""
        return self._latched or self._fault or self._age_fault(JOINT_STATES, age)

    def enable(self, age: float | None = 0.0, *, moving: bool = False) -> Hold | None:
        """Allow motion from the measured position on; forgets what is latched and what the gripper was told.

        `age` is as in `pose_fault`. An arm that is `moving` goes on from the last command: the measured one is behind.
        """
        if self.stopped is not None:
            return Hold("estop", f"the emergency stop is latched ({self.stopped}); reset it first")
        late = self._age_fault(JOINT_STATES, age)
        if self._fault is not None:
            return self._fault
        if late is not None:
            return Hold("stale", late.detail)
        assert self._measured is not None
        self._latched = self._still = self._gripper = None
        if not moving:
            self._last = np.clip(self._measured, self.limits.position_low, self.limits.position_high)
        self.enabled = True
        return None

    def restart(self, age: float | None) -> Hold | None:
        """Go on from the measured position without an operator: as `enable`, but what is latched stays so."""
        return self._latched or self.enable(age)

    def disable(self) -> None:
        """Hold until `enable`."""
        self.enabled = False

    def estop(self, reason: str = "requested") -> None:
        """Latch the stop. The first reason stays."""
        self.stopped = self.stopped or reason
        self.enabled = False

    def reset(self) -> None:
        """Unlatch the stop; motion still needs `enable`."""
        self.stopped = None

    # ---- the decision -------------------------------------------------------------------------------------------

    def command(
        self,
        positions: Array | None,
        gripper: float | None = None,
        *,
        dt: float,
        ages: Mapping[str, float | None],
        hold: Hold | None = None,
    ) -> Decision:
        """Judge one command.

        Args:
            positions: (J,) wanted [rad]; None only together with `hold`.
            gripper: Wanted opening [m]; None keeps the last one.
            dt: Time since the last command [s]. The command changes by at most ``max_velocity * min(dt, MAX_DT)``.
            ages: Input name -> age [s], None if it never came. Every input in ``limits.timeouts`` is checked.
            hold: The caller's own reason to hold: "starved", a worker that failed, ...

        `ConfigError`: There are neither positions nor a reason to hold.
        """
        if positions is None and hold is None:
            raise ConfigError("There is no command; pass a reason to hold.")
        wanted = np.empty(0) if positions is None else np.asarray(positions, dtype=np.float64)
        late = next(filter(None, (self._age_fault(name, ages.get(name)) for name in self.limits.timeouts)), None)
        fault = self.forbidden or self._latched or self._fault or late
        reason = fault or hold or self._command_fault(wanted, gripper, dt)
        known = self.pose_fault(ages.get(JOINT_STATES)) is None
        if self._last is None and self._measured is not None and known:
            self._last = np.clip(self._measured, self.limits.position_low, self.limits.position_high)
        if reason is not None:
            self.holds[reason.code] += 1
            self._speed = np.zeros_like(self._speed)
            return Decision(self.last_command, self._gripper, reason)
        dt, before = min(dt, MAX_DT), self._last
        self._last, clamped = self._clamp(wanted, dt)
        assert before is not None
        self._speed = (self._last - before) / dt
        if gripper is not None:
            self._gripper = float(np.clip(gripper, self.limits.gripper_low, self.limits.gripper_high))
            clamped += ("gripper",) if self._gripper != gripper else ()
        self.clamps.update(clamped)
        return Decision(self.last_command, self._gripper, None, clamped)

    @property
    def stopping_distance(self) -> Array:
        """How far (J,) the joints get while they brake from the last command [rad]; 0 without `max_acceleration`."""
        brake = self.limits.max_acceleration
        return np.zeros_like(self._speed) if brake is None else self._speed**2 / (2.0 * brake)

    @property
    def forbidden(self) -> Hold | None:
        """Why an operator does not allow motion; None if it is allowed."""
        if self.stopped is not None:
            return Hold("estop", f"emergency stop ({self.stopped})")
        return None if self.enabled else Hold("disabled", "not enabled")

    def _age_fault(self, name: str, age: float | None) -> Hold | None:
        limit = self.limits.timeouts[name]
        if age is None:
            return Hold("stale", f"{name} never came")
        if not age <= limit:  # NaN too
            return Hold("stale", f"{name} is {age:.2f} s old, the limit is {limit:.2f} s")
        if age < -limit:
            detail = f"{name} lies {-age:.2f} s in the future, the limit is {limit:.2f} s"
            return Hold("clock", f"{detail}; did the clock go back?")
        return None

    def _frozen(self, measured: Array, stamp: float) -> str:
        """How the same positions (J,) come again and again while the command moves on; "" if they do not."""
        still, command = self._still, self._last
        if still is None or still[2] is None or stamp < still[1] or not np.array_equal(measured, still[0]):
            self._still = measured, stamp, command
            return ""
        way = 0.0 if command is None else float(np.abs(command - still[2]).max())
        if way < 0.1 * FROZEN_WAY:  # an arm at rest: its time to follow begins with the command that moves it
            self._still = measured, stamp, still[2]
        if not self.follows or stamp - still[1] <= FROZEN_TIME:
            return ""
        if way <= min(FROZEN_WAY, 0.5 * float(self.limits.max_step.min())):
            return ""
        return f"the joint states are the same for {stamp - still[1]:.2f} s, while the command moved {way:.3f} rad"

    def _command_fault(self, wanted: Array, gripper: float | None, dt: float) -> Hold | None:
        if not dt > 0:  # NaN too
            return Hold("clock", f"{dt} s passed since the last command; did the clock go back?")
        joints = len(self.limits.joint_names)
        if wanted.shape != (joints,):
            return Hold("joint_set", f"a command of shape {wanted.shape} for {joints} joints")
        if not np.isfinite(wanted).all() or not math.isfinite(gripper or 0.0):
            return Hold("not_finite", f"the command is {wanted.tolist()}, gripper {gripper}")
        return None

    def _clamp(self, wanted: Array, dt: float) -> tuple[Array, tuple[str, ...]]:
        """The nearest allowed command to `wanted` (J,), and what changed it.

        Velocity and acceleration come last: an arm that was pushed away is approached, not jumped to.
        """
        limits, last, measured = self.limits, self._last, self._measured
        assert last is not None
        assert measured is not None
        clamped = []
        reach = limits.max_velocity * dt
        slowest, fastest = last - reach, last + reach
        if limits.max_acceleration is not None:  # never faster than what can stop where it shall
            gain = limits.max_acceleration * dt
            lowest = np.maximum(limits.position_low, measured - limits.max_step)
            way = np.clip(wanted, lowest, np.minimum(limits.position_high, measured + limits.max_step)) - last
            stop = np.sqrt(gain**2 + 2.0 * limits.max_acceleration * np.abs(way)) - gain
            slowest = last + dt * np.minimum(np.maximum(self._speed - gain, -stop), self._speed + gain)
            fastest = last + dt * np.maximum(np.minimum(self._speed + gain, stop), self._speed - gain)
        for kind, low, high in (
            ("position", limits.position_low, limits.position_high),
            ("step", measured - limits.max_step, measured + limits.max_step),
            ("velocity", last - reach, last + reach),
            ("acceleration", slowest, fastest),
        ):
            inside = np.clip(wanted, low, high)
            if not np.array_equal(inside, wanted):
                clamped.append(kind)
            wanted = inside
        # A measured position outside the limits drags the command there; `last` is inside, so this is a way back.
        return np.clip(wanted, limits.position_low, limits.position_high), tuple(clamped)
