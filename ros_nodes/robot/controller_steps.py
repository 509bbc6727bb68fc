"""Executes the steps of a policy's stream, one command at a time. Free of ROS and of clocks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.chunk_stream import Target
from ceed_vla.ros_nodes.robot.mode import ANSWER, WAITING
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.policy_stream import PolicyStream
from ceed_vla.ros_nodes.robot.safety import Decision, Hold, SafetyFilter

FIRST_CHUNK = Hold(WAITING, ANSWER)


class Blend:
    """Leads commands gently from a pose to their target.

    Args:
        seconds: Time until commands equal their target [s]; 0: at once.
        origin: Pose (J,) [rad] at which commands begin.
    """

    def __init__(self, seconds: float, origin: Array) -> None:
        self.origin = origin
        self._seconds = seconds
        self._share = 1.0  # of the way from the origin to the target

    def restart(self, origin: Array) -> None:
        """Begin at `origin` (J,) [rad]."""
        self.origin = origin
        self._share = 0.0

    def advance(self, dt: float) -> None:
        """Advance by `dt` [s] of motion."""
        self._share = min(self._share + dt / self._seconds, 1.0) if self._seconds else 1.0

    def mix(self, wanted: Array) -> Array:
        """Return the command (J,) [rad] for the target `wanted` (J,) [rad]."""
        command: Array = self.origin + self._share * (wanted - self.origin)
        return command


class StepRunner:
    """Takes the actions of a `stream`, one per step of its grid, and interpolates the commands.

    The safety filter belongs to the controller, which passes it to the methods that need it.

    Attributes:
        blend: Blends commands in when motion begins.
        hold: Why the running step has no action; None if it has one.
    """

    def __init__(self, motion: Motion, stream: PolicyStream, blend: Blend) -> None:
        self.blend = blend
        self.hold: Hold | None = None
        self._motion = motion
        self._stream = stream
        self._due = False  # the running step is over; the next step waits for the pending answer
        self._seam = False  # the next command is the first one of its chunk
        self._from: Array = motion.joints  # (J,) [rad], start of the running step, ...
        self._from_part = 0.0  # ... and its tick of the step
        self._wanted: Array = motion.joints  # (J,) [rad], the last command without blending
        self._lag: Array | float = 0.0  # (J,) [rad], last target minus the command that was sent

    def drop(self) -> None:
        """Drop all chunks."""
        self._stream.stop()
        self.hold = None
        self._lag = 0.0
        self._seam = False
        self._due = False

    def receive(self, now: float, safety: SafetyFilter) -> None:
        """Take the policy's answer if there is one, at steady time `now` [s].

        This is the only place where an answer meets the step grid. The answer ends a step that
        holds, completes a chunk whose first steps run, begins the step that waits for it, or
        replaces the action of a step that has just begun.
        """
        was_partial = self._stream.partial
        accepted = self._stream.take_answer(now)
        if accepted and self.hold is not None:
            self._stream.end_step()  # the arm is still, so the next step can begin at once
            self._due = True
        elif was_partial and not self._stream.partial:
            # Steps begin when answers to images arrive, so the running step takes longer.
            self._stream.extend_step()
            self._from = self._wanted
            self._from_part = 0.0
        if not self._stream.arrived:
            return
        if self._due:
            self._begin_step(safety)
            return
        target = self._stream.redo()
        if target is not None:
            # The answer came just after the step began, and determines the rest of the step.
            self._motion.restore(self._stream.before)
            self._from = self._wanted
            self._from_part = self._stream.grid.part
            self._execute(target, safety)

    def command(
        self,
        safety: SafetyFilter,
        hold: Hold | None,
        dt: float,
        clock: float,
        ages: Mapping[str, float | None],
    ) -> Decision:
        """Return the command of this tick.

        Args:
            safety: The filter for the command.
            hold: Why the arm must hold; None if it may move.
            dt: Time since the last command [s].
            clock: Time on the clock of the messages' stamps [s].
            ages: Input -> age [s], None if it never arrived.

        Returns:
            What to send. A hold that is not the stream's own drops all chunks.
        """
        if not self._stream.started:
            return self._start(safety, hold, dt, ages)
        self._catch_up(safety)
        wanted = self._interpolate(dt, blocked=hold is not None)
        decision = safety.command(
            wanted, self._motion.gripper, dt=dt, ages=ages, hold=hold or self.hold
        )
        if decision.hold is None:
            assert decision.positions is not None
            self._lag = wanted - decision.positions
            self._stream.commanded(clock)
        elif decision.hold is not self.hold:
            self.drop()
        return decision

    def take_seam(self) -> bool:
        """Whether the command that is sent now is the first one of its chunk."""
        seam = self._seam
        self._seam = False
        return seam

    def after_tick(self, now: float, safety: SafetyFilter) -> None:
        """Begin the next step if this tick was the last of the running one, and request the next
        chunk if it is due, at steady time `now` [s].
        """
        if not self._stream.started:
            return
        if self._stream.grid.at_end and not self._due:
            if self._stream.pending is None or self._stream.arrived:
                self._begin_step(safety)
            else:
                self._due = True
        self._stream.request_after_tick(now)

    def _start(
        self, safety: SafetyFilter, hold: Hold | None, dt: float, ages: Mapping[str, float | None]
    ) -> Decision:
        """Hold without a chunk; start the stream as soon as nothing objects."""
        decision = safety.command(None, None, dt=dt, ages=ages, hold=hold or FIRST_CHUNK)
        held = decision.positions
        if decision.hold is FIRST_CHUNK and held is not None:
            self._motion.resume(held)
            self._from = held
            self._wanted = held
            self.blend.origin = held
            self._stream.start()
        return decision

    def _catch_up(self, safety: SafetyFilter) -> None:
        """Begin the steps that must have begun by this tick."""
        if self._due:
            self._begin_step(safety)  # with the running chunk, because the answer is late
        while self._stream.started and self._stream.grid.overdue:
            self._begin_step(safety)  # its first tick was missed

    def _interpolate(self, dt: float, *, blocked: bool) -> Array:
        """Return the target command (J,) [rad] of this tick, `dt` [s] after the last one.

        The blend advances only while the arm moves, so not while it is `blocked`.
        """
        if not blocked and self.hold is None:
            self.blend.advance(dt)
        grid = self._stream.grid
        share = (grid.part - self._from_part) / (grid.ticks_per_step - self._from_part)
        self._wanted = self._from + share * (self._motion.joints - self._from)
        return self.blend.mix(self._wanted)

    def _begin_step(self, safety: SafetyFilter) -> None:
        """Take the action of the step that begins at the last sent tick."""
        target = self._stream.next_step()
        held = safety.last_command if self.hold is not None else None
        if held is not None:
            self.blend.origin = held
        self._due = False
        self._from = self._motion.joints if held is None else held
        self._from_part = 0.0
        self._execute(target, safety)

    def _execute(self, target: Target, safety: SafetyFilter) -> None:
        """Set the end of the running step from its action, or hold if it has none."""
        if target.action is None:
            self.hold = self._hold(target)
            return
        self.hold = None
        self._seam = target.seam
        # Increments would run away from an arm that cannot follow. They are limited to the reach of
        # one step at full speed and a stop.
        limits = safety.limits
        base = self._motion.joints - self._lag
        reach = limits.max_velocity * self._stream.grid.action_dt + safety.stopping_distance
        self._motion.advance(
            np.asarray(target.action), base, reach, limits.position_low, limits.position_high
        )

    def _hold(self, target: Target) -> Hold:
        """Return the hold for a step without an action."""
        detail = "the chunk ended before the next one came"
        if target.source == WAITING:
            detail = ANSWER
        error = self._stream.statistics.last_error
        if error:
            detail = f"{detail} (last error: {error})"
        return Hold(self._stream.failure or target.source, detail)
