"""The last check of every command, free of ROS: what may be sent to the arm now, and why not more.

The rule of the pose. Motion starts, and restarts, only from a pose that has been trusted for 0.2 s:
at least three joint states in a row that agree with each other within what the velocity limits
allow, none further than `limits.step` from another. If that pose lies further than `limits.step`
from the last trusted one, nothing restarts and `enable` is refused; only `reset` and then `enable`
accept it. No command, and no hold, is further than `limits.step` from the last trusted pose, and a
pose that turns out to be wrong is never repeated. States that stay wrong through both `reset` and
`enable` cannot be detected.

A command passes in this order: latched stop, enabled, pose trusted and inputs fresh, the caller's
own reason to hold, joint set, finite numbers; then it is clamped to the position limits, to the
neighbourhood of the measured position, to the velocity and the acceleration limit. A hold repeats
the last command, so an arm never stops by a jump; where the arm has left that command by more than
`limits.step`, nothing is sent.

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
from ceed_vla.ros_nodes.robot.pose_trust import PHYSICAL_VELOCITY, JointBounds, PoseTrust, by_name

JOINT_STATES = "joint_states"
CLAMPS = ("position", "step", "velocity", "acceleration", "gripper")
# Longest time between two commands that counts for `max_velocity` [s]: after a stall the command
# catches up slowly.
MAX_DT = 0.05
# Joint states that do not change for so long [s] while commands went on by so much [rad] are no
# measurements.
FROZEN_TIME, FROZEN_WAY = 0.5, 0.05
# Codes of holds: the pose is not trusted yet; it is another than before; the arm has left the last
# command.
UNSETTLED = "unsettled_pose"
MOVED = "moved_pose"
DISPLACED = "displaced"
SYNCHRONIZE = "Are the clocks of both computers synchronized (chrony, PTP)?"
NOT_ENABLED = "not enabled"  # why motion is disabled by an operator
NEAR = 1e-9  # rounding of a distance that may be `limits.step` [rad]


@dataclass(frozen=True)
class SafetyLimits:
    """What an arm may do.

    `ConfigError`: Wrong lengths, limits that are not finite or in the wrong order, a timeout that
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
    # (J,) that the joints reach physically [rad/s], for `PoseTrust`; empty: the larger of
    # `max_velocity` and `PHYSICAL_VELOCITY`.
    physical_velocity: Array = field(default_factory=lambda: np.empty(0))
    max_acceleration: Array | None = (
        None  # (J,) of commands [rad/s^2]; a hold stops at once all the same
    )
    # Whether commands are joint positions. A twist moves the tool and leaves the posture to its
    # controller, so that the commanded joints may differ from the measured ones; its hold is a zero
    # twist.
    commands_joints: bool = True

    def __post_init__(self) -> None:
        names = tuple(self.joint_names)
        object.__setattr__(self, "joint_names", names)
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"joint_names are {list(names)}; give every joint once.")
        if not np.size(self.physical_velocity):
            object.__setattr__(
                self, "physical_velocity", np.maximum(self.max_velocity, PHYSICAL_VELOCITY)
            )
        for name in (
            "position_low",
            "position_high",
            "max_velocity",
            "max_step",
            "physical_velocity",
        ):
            value = np.array(getattr(self, name), dtype=np.float64)
            if value.shape != (len(names),) or not np.isfinite(value).all():
                raise ConfigError(
                    f"{name} is {value.tolist()}; give one finite number for each of {list(names)}."
                )
            if not name.startswith("position") and (value <= 0).any():
                raise ConfigError(f"{name} is {value.tolist()}; every value must be positive.")
            object.__setattr__(self, name, value)
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


@dataclass(frozen=True)
class Hold:
    """Why the arm holds."""

    code: str  # docs/robots.md explains each; holds are counted by it
    detail: str  # the same for a person, with values and limits


@dataclass(frozen=True)
class Decision:
    """What to send."""

    # (J,) [rad], always finite and inside the limits; None if there was no command yet and nobody
    # knows where the arm is: send nothing then.
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
        self.enabled = False
        self.follows = True
        self.stopped: str | None = None
        self.clamps: Counter[str] = Counter(dict.fromkeys(CLAMPS, 0))
        self.holds: Counter[str] = Counter()
        self._fault: Hold | None = Hold("no_joint_states", "no joint state has come yet")
        self._latched: Hold | None = (
            None  # joint states that cannot be true came while motion was enabled
        )
        self._trust = PoseTrust(
            JointBounds(
                limits.joint_names,
                limits.position_low,
                limits.position_high,
                limits.physical_velocity,
                limits.max_step,
                limits.timeouts[JOINT_STATES],
            )
        )
        self._why_disabled = NOT_ENABLED
        self._last: Array | None = None  # last command, inside the limits
        # The newest positions, since when they are the same though commands moved [s], and the
        # command then.
        self._still: tuple[Array, float, Array | None] | None = None
        self._speed: Array = np.zeros(len(limits.joint_names))  # of the last command [rad/s]
        self._gripper: float | None = None

    # ---- inputs ----------------------------------------------------------------------------------

    @property
    def measured(self) -> Array | None:
        """Last trusted joint positions (J,) [rad]; None before the first."""
        return None if self._trust.pose is None else self._trust.pose.copy()

    @property
    def last_command(self) -> Array | None:
        """Last command (J,) [rad]; None before the first."""
        return None if self._last is None else self._last.copy()

    def measure(
        self, names: Sequence[str], positions: Sequence[float], stamps: float | Sequence[float]
    ) -> Hold | None:
        """Take a joint state.

        While motion is enabled, a state that cannot be true is latched until `enable`.

        Args:
            names: Joints in any order; those that are not in the limits are ignored.
            positions: One for each name [rad].
            stamps: When each joint was measured [s], or one time for all.

        Returns:
            Why the pose is not trusted now; None if it is.
        """
        wanted = self.limits.joint_names
        try:
            measured = by_name(names, positions, wanted, "positions")
            every = np.broadcast_to(stamps, len(names)).tolist()
            times = by_name(names, every, wanted, "stamps")
        except ObservationError as error:
            self._fault = Hold("bad_joint_states", str(error))
            return self._fault
        outside, jump = self._trust.take(measured, times)
        frozen = self._frozen(measured, float(times.min()))
        doubt = outside or jump
        if (doubt or frozen) and self.enabled and self._latched is None:
            code = "implausible_joint_states" if doubt else "frozen_joint_states"
            self._latched = Hold(code, f"{doubt or frozen}; see where the arm is, then enable")
        self._fault = Hold("implausible_joint_states", outside) if outside else None
        return self._latched or self._fault or self._untrusted()

    def pose_fault(self, age: float | None) -> Hold | None:
        """Why the arm's pose is not known, or None; `age` of the newest joint state [s], None if
        none came.
        """
        return (
            self._latched or self._fault or self._age_fault(JOINT_STATES, age) or self._untrusted()
        )

    def enable(self, age: float | None, *, moving: bool = False) -> Hold | None:
        """Allow motion from the measured position on; forgets what is latched and what the gripper
        was told.

        Args:
            age: As in `pose_fault`.
            moving: The arm is in motion under this filter's commands, which go on from the last
                one: the measured position is behind it.

        Returns:
            Why motion is not allowed; None if it is.
        """
        if self.stopped is not None:
            return Hold("estop", f"the emergency stop is latched ({self.stopped}); reset it first")
        refused = self._fault or self._stale_pose(age) or self._untrusted()
        if refused is None and not moving and not self._trust.settled:
            refused = Hold(UNSETTLED, self._trust.unsettled)
        if refused is not None:
            return refused
        measured = self.measured
        assert measured is not None  # a trusted pose
        self._latched = None
        self._still = None
        self._gripper = None
        if not moving:
            self._last = np.clip(measured, self.limits.position_low, self.limits.position_high)
        self.enabled = True
        return None

    def restart(self, age: float | None) -> Hold | None:
        """Go on from the measured position without an operator: as `enable`, but what is latched
        stays so.
        """
        return self._latched or self.enable(age)

    def disable(self, why: str = NOT_ENABLED) -> None:
        """Hold until `enable`; the first reason stays while motion is disabled."""
        if self.enabled or why != NOT_ENABLED:
            self._why_disabled = why
        self.enabled = False

    def estop(self, reason: str = "requested") -> None:
        """Latch the stop. The first reason stays."""
        self.stopped = self.stopped or reason
        self.disable()

    def reset(self) -> str:
        """Unlatch the stop and accept the pose in which the joint states settle; motion still needs
        `enable`.

        Returns how that pose differs from the last trusted one; "" if it does not, or none has
        settled yet.
        """
        elsewhere = self._trust.elsewhere
        self.stopped = None
        self._trust.accept()
        return elsewhere

    # ---- the decision ----------------------------------------------------------------------------

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
            dt: Time since the last command [s]. The command changes by at most ``max_velocity *
                min(dt, MAX_DT)``.
            ages: Input name -> age [s], None if it never came. Every input in ``limits.timeouts``
                is checked.
            hold: The caller's own reason to hold: "starved", a worker that failed, ...

        `ConfigError`: There are neither positions nor a reason to hold.
        """
        if positions is None and hold is None:
            raise ConfigError("There is no command; pass a reason to hold.")
        wanted = np.empty(0) if positions is None else np.asarray(positions, dtype=np.float64)
        late = next(
            filter(None, (self._age_fault(name, ages.get(name)) for name in self.limits.timeouts)),
            None,
        )
        fault = self.forbidden or self._latched or self._fault or late or self._untrusted()
        reason = fault or hold or self._command_fault(wanted, gripper, dt)
        age = ages.get(JOINT_STATES)
        if self._last is None and self._trust.pose is not None and self.pose_fault(age) is None:
            self._last = np.clip(
                self._trust.pose, self.limits.position_low, self.limits.position_high
            )
        if reason is not None:
            self.holds[reason.code] += 1
            self._speed = np.zeros_like(self._speed)
            return Decision(self._held(age), self._gripper, reason)
        dt = min(dt, MAX_DT)
        before = self._last
        assert before is not None
        allowed, clamped = self._clamp(wanted, dt)
        if np.any(np.abs(allowed - before) > self.limits.max_velocity * dt + NEAR):
            self.holds[DISPLACED] += 1
            self._speed = np.zeros_like(self._speed)
            return Decision(None, self._gripper, self._displaced(before))
        self._last = allowed
        self._speed = (allowed - before) / dt
        if gripper is not None:
            self._gripper = float(
                np.clip(gripper, self.limits.gripper_low, self.limits.gripper_high)
            )
            clamped += ("gripper",) if self._gripper != gripper else ()
        self.clamps.update(clamped)
        return Decision(self.last_command, self._gripper, None, clamped)

    @property
    def stopping_distance(self) -> Array:
        """How far (J,) the joints get while they brake from the last command [rad]; 0 without
        `max_acceleration`.
        """
        brake = self.limits.max_acceleration
        return np.zeros_like(self._speed) if brake is None else self._speed**2 / (2.0 * brake)

    @property
    def forbidden(self) -> Hold | None:
        """Why an operator does not allow motion; None if it is allowed."""
        if self.stopped is not None:
            return Hold("estop", f"emergency stop ({self.stopped})")
        return None if self.enabled else Hold("disabled", self._why_disabled)

    def _untrusted(self) -> Hold | None:
        """Why the newest joint state is not trusted."""
        if self._trust.trusted:
            return None
        elsewhere = self._trust.elsewhere
        if elsewhere:
            remedy = "see where the arm is, then call ~/reset, which accepts the pose, and ~/enable"
            return Hold(MOVED, f"{elsewhere}; {remedy}")
        return Hold(UNSETTLED, self._trust.unsettled)

    def _held(self, age: float | None) -> Array | None:
        """The last command (J,) [rad]; None where repeating it could move the arm."""
        last = self._last
        pose = self._trust.pose
        if not self.limits.commands_joints:
            return self.last_command
        if last is None or pose is None:
            return None
        near = np.abs(last - pose) <= self.limits.max_step + NEAR
        newest = self._trust.newest
        if newest is not None and self._age_fault(JOINT_STATES, age) is None:
            near &= np.abs(last - newest) <= self.limits.max_step + NEAR
        return self.last_command if near.all() else None

    def _stale_pose(self, age: float | None) -> Hold | None:
        late = self._age_fault(JOINT_STATES, age)
        return None if late is None else Hold("stale", late.detail)

    def _age_fault(self, name: str, age: float | None) -> Hold | None:
        limit = self.limits.timeouts[name]
        if age is None:
            return Hold("stale", f"{name} never came")
        if not age <= limit:  # NaN too
            return Hold("stale", f"{name} is {age:.2f} s old, the limit is {limit:.2f} s")
        if age < -limit:
            detail = f"{name} lies {-age:.2f} s in the future, the limit is {limit:.2f} s"
            return Hold("clock", f"{detail}; did the clock go back? {SYNCHRONIZE}")
        return None

    def _frozen(self, measured: Array, stamp: float) -> str:
        """How the same positions (J,) come again and again while the command moves on; "" if they
        do not.
        """
        still, command = self._still, self._last
        if (
            still is None
            or still[2] is None
            or stamp < still[1]
            or not np.array_equal(measured, still[0])
        ):
            self._still = measured, stamp, command
            return ""
        way = 0.0 if command is None else float(np.abs(command - still[2]).max())
        # an arm at rest: its time to follow begins with the command that moves it
        if way < 0.1 * FROZEN_WAY:
            self._still = measured, stamp, still[2]
        if not self.follows or stamp - still[1] <= FROZEN_TIME:
            return ""
        if way <= min(FROZEN_WAY, 0.5 * float(self.limits.max_step.min())):
            return ""
        return (
            f"the joint states are the same for {stamp - still[1]:.2f} s, while the command moved "
            f"{way:.3f} rad"
        )

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
        """The nearest command to `wanted` (J,) within position and step limits, and what changed
        it.

        It is further from the last command than the velocity allows only where the arm was moved
        away from that.
        """
        limits = self.limits
        last = self._last
        measured = self._trust.pose
        assert last is not None
        assert measured is not None
        clamped = []
        reach = limits.max_velocity * dt
        step = limits.max_step if limits.commands_joints else np.full_like(limits.max_step, np.inf)
        lowest = np.maximum(limits.position_low, measured - step)
        highest = np.minimum(limits.position_high, measured + step)
        slowest = last - reach
        fastest = last + reach
        if limits.max_acceleration is not None:  # never faster than what can stop where it shall
            gain = limits.max_acceleration * dt
            way = np.clip(wanted, lowest, highest) - last
            stop = np.sqrt(gain**2 + 2.0 * limits.max_acceleration * np.abs(way)) - gain
            slowest = last + dt * np.minimum(
                np.maximum(self._speed - gain, -stop), self._speed + gain
            )
            fastest = last + dt * np.maximum(
                np.minimum(self._speed + gain, stop), self._speed - gain
            )
        for kind, low, high in (
            ("position", limits.position_low, limits.position_high),
            ("step", measured - step, measured + step),
            ("velocity", last - reach, last + reach),
            ("acceleration", slowest, fastest),
        ):
            inside = np.clip(wanted, low, high)
            if not np.array_equal(inside, wanted):
                clamped.append(kind)
            wanted = inside
        # Braking must not lead away from the measured position, nor a position outside the limits
        # out of them.
        return np.clip(wanted, lowest, highest), tuple(clamped)

    def _displaced(self, last: Array) -> Hold:
        """The hold of an arm that something else has moved away from the `last` command (J,)
        [rad].
        """
        pose = self._trust.pose
        assert pose is not None
        way = np.abs(last - pose) - self.limits.max_step
        joint = int(way.argmax())
        return Hold(
            DISPLACED,
            f"{self.limits.joint_names[joint]} is at {pose[joint]:.4g} rad, the last command at "
            f"{last[joint]:.4g}, further than limits.step ({self.limits.max_step[joint]:.3g}); "
            "motion goes on from the pose",
        )
