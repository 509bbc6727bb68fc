"""The last check of every command before it is sent to the arm. Free of ROS.

The pose rule: motion starts and restarts only from a pose that has been trusted for 0.2 s. Trust
takes at least three consecutive joint states that agree within the velocity limits, with no two
further apart than `limits.step`. If that pose is further than `limits.step` from the last trusted
pose, nothing restarts and `enable` is refused; only `reset` followed by `enable` accepts it. No
command and no hold is further than `limits.step` from the last trusted pose, and a pose that turns
out to be wrong is never repeated. States that stay wrong through both `reset` and `enable` cannot
be detected.

The checks of a command, in order: latched stop, enabled, pose trusted and inputs fresh, the
caller's own reason to hold, joint set, finite numbers. The command is then clamped to the position
limits, to the neighbourhood of the measured position, to the velocity limit and to the acceleration
limit. Motion that starts outside the position limits returns inside within these. A hold repeats
the last command, so the arm stops without a jump; if the arm has left that command by more than
`limits.step`, nothing is sent.

This is software, not a safety-rated stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.frozen_states import FROZEN_TIME, FROZEN_WAY, FrozenStates
from ceed_vla.ros_nodes.robot.pose_trust import JointBounds, PoseTrust, by_name
from ceed_vla.ros_nodes.robot.safety_checks import age_fault, clamp, command_fault, displaced
from ceed_vla.ros_nodes.robot.safety_decisions import (
    CLAMPS,
    DISPLACED,
    MOVED,
    NOT_ENABLED,
    SYNCHRONIZE,
    UNSETTLED,
    Decision,
    Hold,
)
from ceed_vla.ros_nodes.robot.safety_limits import JOINT_STATES, NEAR, SafetyLimits

__all__ = [
    "CLAMPS",
    "DISPLACED",
    "FROZEN_TIME",
    "FROZEN_WAY",
    "JOINT_STATES",
    "MAX_DT",
    "MOVED",
    "NEAR",
    "NOT_ENABLED",
    "SYNCHRONIZE",
    "UNSETTLED",
    "Decision",
    "Hold",
    "SafetyFilter",
    "SafetyLimits",
]

# Longest time between two commands that counts for `max_velocity` [s]: after a stall, commands
# catch up slowly.
MAX_DT = 0.05


class SafetyFilter:
    """Checks every command. Motion is disabled at first, and by the latched emergency stop.

    `reset` only unlatches the stop; as on a machine, a separate `enable` starts motion again.

    Attributes:
        enabled: Whether motion is allowed (unless stopped).
        follows: Whether commands reach the arm; False in a dry run.
        stopped: Why the emergency stop is latched; None if it is not.
        clamps: Kind -> number of commands that it changed.
        clamped: Number of commands that any of them changed.
        holds: Code -> number of commands that a hold replaced.
    """

    def __init__(self, limits: SafetyLimits) -> None:
        self.limits = limits
        self.enabled = False
        self.follows = True
        self.stopped: str | None = None
        self.clamps: Counter[str] = Counter(dict.fromkeys(CLAMPS, 0))
        self.clamped = 0
        self.holds: Counter[str] = Counter()
        self._fault: Hold | None = Hold("no_joint_states", "no joint state has come yet")
        # Impossible joint states that arrived while motion was enabled.
        self._latched: Hold | None = None
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
        self._last: Array | None = None  # last command; at first the measured pose
        self._frozen = FrozenStates()
        self._speed: Array = np.zeros(len(limits.joint_names))  # of the last command [rad/s]
        self._gripper: float | None = None

    # ---- inputs ----------------------------------------------------------------------------------

    @property
    def measured(self) -> Array | None:
        """Last trusted joint positions (J,) [rad]; None before the first one."""
        return None if self._trust.pose is None else self._trust.pose.copy()

    @property
    def trusted(self) -> bool:
        """Whether the newest joint state is trusted."""
        return self._trust.trusted

    @property
    def last_command(self) -> Array | None:
        """Last command (J,) [rad]; None before the first one."""
        return None if self._last is None else self._last.copy()

    @property
    def last_opening(self) -> float | None:
        """Last commanded opening of the gripper [m]; None before the first one after `enable`."""
        return self._gripper

    def measure(
        self, names: Sequence[str], positions: Sequence[float], stamps: float | Sequence[float]
    ) -> Hold | None:
        """Take a joint state.

        While motion is enabled, an impossible state is latched until `enable`.

        Args:
            names: Joints in any order; joints without limits are ignored.
            positions: One position per name [rad].
            stamps: Time at which each joint was measured [s], or one time for all.

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
        frozen = self._frozen.take(
            measured,
            float(times.min()),
            self._last,
            max_step=self.limits.max_step,
            follows=self.follows,
        )
        doubt = outside or jump
        if (doubt or frozen) and self.enabled and self._latched is None:
            code = "implausible_joint_states" if doubt else "frozen_joint_states"
            self._latched = Hold(code, f"{doubt or frozen}; see where the arm is, then enable")
        self._fault = Hold("implausible_joint_states", outside) if outside else None
        return self._latched or self._fault or self._untrusted()

    def pose_fault(self, age: float | None) -> Hold | None:
        """Return why the arm's pose is unknown, or None.

        `age` is the age of the newest joint state [s]; None if none has arrived.
        """
        return (
            self._latched
            or self._fault
            or age_fault(self.limits, JOINT_STATES, age)
            or self._untrusted()
        )

    def enable(self, age: float | None, *, moving: bool = False) -> Hold | None:
        """Allow motion from the measured position on; clear the latched fault and the gripper's
        command.

        Args:
            age: As in `pose_fault`.
            moving: Whether the arm is in motion under this filter's commands. They then continue
                from the last command, because the measured position lags behind it.

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
        self._frozen.forget()
        self._gripper = None
        if not moving:
            self._last = measured
        self.enabled = True
        return None

    def restart(self, age: float | None, *, resumed: bool = False) -> Hold | None:
        """Continue from the measured position without an operator: as `enable`, but a latched fault
        refuses it. If `resumed` after a hold, the gripper's command stays valid.
        """
        gripper = self._gripper
        refused = self._latched or self.enable(age)
        if refused is None and resumed:
            self._gripper = gripper
        return refused

    def disable(self, why: str = NOT_ENABLED) -> None:
        """Hold until `enable`; while motion is disabled, the first reason is retained."""
        if self.enabled or why != NOT_ENABLED:
            self._why_disabled = why
        self.enabled = False

    def estop(self, reason: str = "requested") -> None:
        """Latch the stop; the first reason is retained."""
        self.stopped = self.stopped or reason
        self.disable()

    def reset(self) -> str:
        """Unlatch the stop and accept the pose at which the joint states settle.

        Motion still needs `enable`.

        Returns:
            How that pose differs from the last trusted one; "" if it does not, or if no pose has
            settled yet.
        """
        elsewhere = self._trust.elsewhere
        self.stopped = None
        self._trust.accept()
        return elsewhere

    # ---- commands --------------------------------------------------------------------------------

    def command(
        self,
        positions: Array | None,
        gripper: float | None = None,
        *,
        dt: float,
        ages: Mapping[str, float | None],
        hold: Hold | None = None,
    ) -> Decision:
        """Check one command.

        Args:
            positions: Requested positions (J,) [rad]; None only together with `hold`.
            gripper: Requested opening [m]; None repeats the last one.
            dt: Time since the last command [s]. The command changes by at most ``max_velocity *
                min(dt, MAX_DT)``.
            ages: Input name -> age [s], None if it never arrived. Every input in
                ``limits.timeouts`` is checked.
            hold: The caller's own reason to hold: "starved", a worker that failed, ...

        Returns:
            What to send. A hold repeats the last command.

        Raises:
            ConfigError: There are neither positions nor a reason to hold.
        """
        if positions is None and hold is None:
            raise ConfigError("There is no command; pass a reason to hold.")
        wanted = np.empty(0) if positions is None else np.asarray(positions, dtype=np.float64)
        faults = (age_fault(self.limits, name, ages.get(name)) for name in self.limits.timeouts)
        late = next(filter(None, faults), None)
        fault = self.forbidden or self._latched or self._fault or late or self._untrusted()
        reason = fault or hold or command_fault(self.limits, wanted, gripper, dt)
        age = ages.get(JOINT_STATES)
        if self._last is None and self._trust.pose is not None and self.pose_fault(age) is None:
            self._last = self._trust.pose.copy()
        if reason is not None:
            self.holds[reason.code] += 1
            self._speed = np.zeros_like(self._speed)
            return Decision(self._held(age), self._gripper, reason)
        dt = min(dt, MAX_DT)
        before = self._last
        pose = self._trust.pose
        assert before is not None
        assert pose is not None
        allowed, clamped = clamp(
            self.limits, wanted, last=before, measured=pose, speed=self._speed, dt=dt
        )
        if np.any(np.abs(allowed - before) > self.limits.max_velocity * dt + NEAR):
            self.holds[DISPLACED] += 1
            self._speed = np.zeros_like(self._speed)
            return Decision(None, self._gripper, displaced(self.limits, before, pose))
        self._last = allowed
        self._speed = (allowed - before) / dt
        if gripper is not None:
            self._gripper = float(
                np.clip(gripper, self.limits.gripper_low, self.limits.gripper_high)
            )
            clamped += ("gripper",) if self._gripper != gripper else ()
        self.clamps.update(clamped)
        self.clamped += bool(clamped)
        return Decision(self.last_command, self._gripper, None, clamped)

    @property
    def stopping_distance(self) -> Array:
        """Distance (J,) of the joints while they brake from the last command [rad]; 0 without
        `max_acceleration`.
        """
        brake = self.limits.max_acceleration
        return np.zeros_like(self._speed) if brake is None else self._speed**2 / (2.0 * brake)

    @property
    def forbidden(self) -> Hold | None:
        """Why motion is not allowed by an operator; None if it is allowed."""
        if self.stopped is not None:
            return Hold("estop", f"emergency stop ({self.stopped})")
        return None if self.enabled else Hold("disabled", self._why_disabled)

    def _untrusted(self) -> Hold | None:
        """Return why the newest joint state is not trusted; None if it is."""
        if self._trust.trusted:
            return None
        elsewhere = self._trust.elsewhere
        if elsewhere:
            remedy = "see where the arm is, then call ~/reset, which accepts the pose, and ~/enable"
            return Hold(MOVED, f"{elsewhere}; {remedy}")
        return Hold(UNSETTLED, self._trust.unsettled)

    def _held(self, age: float | None) -> Array | None:
        """Return the last command (J,) [rad]; None if repeating it could move the arm."""
        last = self._last
        pose = self._trust.pose
        if not self.limits.commands_joints:
            return self.last_command
        if last is None or pose is None:
            return None
        near = np.abs(last - pose) <= self.limits.max_step + NEAR
        newest = self._trust.newest
        if newest is not None and age_fault(self.limits, JOINT_STATES, age) is None:
            near &= np.abs(last - newest) <= self.limits.max_step + NEAR
        return self.last_command if near.all() else None

    def _stale_pose(self, age: float | None) -> Hold | None:
        late = age_fault(self.limits, JOINT_STATES, age)
        return None if late is None else Hold("stale", late.detail)
