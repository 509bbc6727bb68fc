"""From observations to commands at a fixed rate, free of ROS and of clocks: the policy node's whole
behaviour.

Time is a grid of steps of ``action_dt``, each ``N`` ticks long. A step has one end target; the
command of tick i of N lies on the straight line from the target before to this one, so commands
stay continuous where one chunk follows another. As soon as `SafetyFilter` or an input objects, the
arm holds and everything the policy had planned is dropped; it goes on from where it was held, or
from where it is if that was unknown meanwhile. After a long outage, a restart of the robot or a
conflict it waits for an operator instead. A chunk is asked for with the last images that can still
make the step at which it takes over, and `StepGrid` sees to it that these are fresh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.chunk_stream import Target
from ceed_vla.ros_nodes.robot.mode import WAITING, Mode, State
from ceed_vla.ros_nodes.robot.motion import Motion, toward
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.outage import RESUME_WITHIN, Outage
from ceed_vla.ros_nodes.robot.policy_stream import PolicyStream
from ceed_vla.ros_nodes.robot.safety import (
    JOINT_STATES,
    MAX_DT,
    MOVED,
    NOT_ENABLED,
    Decision,
    Hold,
    SafetyFilter,
)

# How long the last command is repeated while the arm's pose is unknown [s]. Nobody can move the arm
# by hand and restart it faster than this; afterwards it would leap back as its drives come on.
BLIND_HOLD = 5.0
STALLED = 1.0  # real time without a tick after which a simulation's clock counts as stopped [s]
HOME_SPEED = 0.2  # of the fastest joint on the way home [rad/s]
FIRST_CHUNK = Hold(WAITING, "for the first chunk")
NOT_BY_WAITING = ("estop", "conflict", MOVED)  # refusals of `enable` that an operator must see


class PolicyController:
    """Sends the actions of a `stream` through the `safety` filter, at the rate of its grid.

    Motion begins gently: for `blend_in` [s] after `enable` commands lie between the pose then and
    what is wanted.

    Attributes:
        ages: `Observations.ages`.
        hold: Why the arm held at the last tick; None in motion.
        outage: How long the fault has lasted that holds the arm.
    """

    def __init__(
        self,
        observations: Observations,
        motion: Motion,
        safety: SafetyFilter,
        stream: PolicyStream,
        blend_in: float,
        resume_within: float = RESUME_WITHIN,
    ) -> None:
        self._observations = observations
        self._motion = motion
        self._safety = safety
        self.stream = stream
        self.ages = observations.ages
        self.grid = stream.grid
        self.statistics = stream.statistics
        self.hold = safety.forbidden
        self.outage = Outage(resume_within)
        self._conflict: str | None = None
        self._enable_asked = False
        self._blend_in, self._blend = blend_in, 1.0  # share of what is wanted now
        self._held: Array = motion.joints  # the pose that motion blends from
        self._home: Array | None = None  # the pose that `enable` was told to move to
        self._enabled_at = -math.inf  # images from before are of another situation
        self._silent = True
        self._not_yet: Hold | None = None  # why motion does not restart, though the pose is known
        self._anchor: Array | None = (
            None  # the pose (J,) at which the hold that lasts began [rad]; None in motion
        )
        self._blind_since: float | None = None  # steady time since which the arm's pose is unknown
        self._clock_fault: Hold | None = None
        self._last_tick: float | None = None
        self._boundary = (
            False  # the step that runs is done, the next one waits for the answer that is due
        )
        self._start: Array = motion.joints  # where the step that runs starts, ...
        self._start_part = 0.0  # ... and at which of its ticks
        self._wanted: Array = motion.joints  # the last command before it was judged, ...
        self._lag: Array | float = 0.0  # ... and what the safety filter took from it [rad]
        self._before_step = motion.copy()
        self._step_hold: Hold | None = None
        self._seam = False

    # ---- what operators do -----------------------------------------------------------------------

    def enable(
        self, now: float, *, insist: bool = False, home: Sequence[float] = ()
    ) -> Hold | None:
        """Allow motion from the measured pose on, with nothing planned; `now` is the clock's time
        [s].

        With `home` (J,) [rad] it moves there slowly, without the policy; then motion is disabled.
        Returns why not, or None; then motion is disabled at once. With `insist` it is tried again
        at every tick until joint states come.
        """
        moving = self._safety.enabled and (self.hold is None or self.hold.code == WAITING)
        moving = moving and not self._silent and self._pose_fault(now) is None
        refused = self._conflict_hold()
        if refused is None:
            refused = self._safety.enable(self.ages(now)[JOINT_STATES], moving=moving)
        if refused is None and self.stream.broken is not None and not home:
            refused = self.stream.objection()
        limits = self._safety.limits
        if (
            refused is None
            and home
            and np.any(np.clip(home, limits.position_low, limits.position_high) != home)
        ):
            refused = Hold("no_home", "arm.home lies outside the position limits")
        self._enable_asked = insist and refused is not None and refused.code not in NOT_BY_WAITING
        self._home = np.array(home) if home and refused is None else None
        if refused is None:
            self._observations.look_anew()
            self._start_here(now, resumed=False)
            self.stream.try_again()
            self.hold = None if home else self._objection() or FIRST_CHUNK
        else:
            self.hold = refused
            self._safety.disable()
            self._drop_plans()
        return refused

    @property
    def state(self) -> State:
        """What is true now, whatever was at the last tick."""
        hold = self.hold
        forbidden = self._safety.forbidden
        if self._conflict is not None and self._safety.stopped is None:
            return State(Mode.DISABLED, "conflict", self._conflict)
        if forbidden is not None and not self._enable_asked:
            hold = forbidden
        elif self.stream.broken is not None and self._home is None:
            hold = self._objection()
        return State.of(hold)

    def note_conflict(self, reason: str | None) -> None:
        """Note what else commands the arm or publishes its joints; None if nothing does.

        A conflict disables motion, which stays so when the conflict ends.
        """
        if reason is not None:
            self.interrupt(f"there was a conflict: {reason}")
        self._conflict = reason

    def interrupt(self, why: str) -> None:
        """Forbid motion until an operator allows it again; nothing changes if it is not allowed
        now.
        """
        if self._safety.enabled or self._enable_asked:
            self._forbid(f"{why}; see where the arm is, then call ~/enable")

    def disable(self) -> None:
        """Hold once, then send nothing until `enable`."""
        self._forbid(NOT_ENABLED)

    def _forbid(self, why: str) -> None:
        self._enable_asked = False
        self._home = None
        self.outage.forget()
        self._safety.disable(why)
        self._drop_plans()

    def end(self, clock: float) -> Decision | None:
        """The last command once more, and then none until motion begins where the arm is."""
        self.disable()
        return self._fall_silent(self.grid.nominal, clock, None)

    def estop(self, reason: str) -> None:
        """Latch the stop: hold once, then send nothing until `reset` and `enable`."""
        self._safety.estop(reason)
        self.disable()

    def reset(self) -> str:
        """Unlatch the stop and accept the arm's pose; motion that is disabled stays so.

        Returns how the pose differs from the last trusted one; "" if it does not.
        """
        self._enable_asked = False
        return self._safety.reset()

    # ---- the loop --------------------------------------------------------------------------------

    def tick(self, now: float, clock: float) -> Decision | None:
        """The command at steady time `now` [s], which is `clock` in the messages' stamps [s]; None
        to send nothing.
        """
        dt = now - self._last_tick if self._last_tick is not None else self.grid.nominal
        self._last_tick = now
        self._watch_clock(dt, clock)
        self.grid.count(now, dt)
        # a tick that only makes up for a late one is no faster motion
        dt = max(dt, self.grid.nominal)
        self.receive(now)
        refused = self.enable(clock, insist=True) if self._enable_asked else None
        self._watch_faults(now, clock)
        hold = refused or self._objection()
        if self._stays_silent(now, clock):
            return self._fall_silent(dt, clock, hold)
        if self._home is not None:
            decision = self._step_home(dt, clock, self._home)
        else:
            decision = (
                self._move(dt, clock, hold) if self.stream.started else self._wait(dt, clock, hold)
            )
        self.hold = self._cause(decision.hold)
        if decision.hold is None:
            self._anchor = None
        elif self._anchor is None:
            self._anchor = self._safety.measured
        if decision.positions is None:
            self._go_silent()
            return None
        self.statistics.sent(now, decision.positions, self._seam)
        self._seam = False
        return decision

    def after_tick(self, now: float) -> None:
        """What takes time and can wait until the command is sent: the next step, and asking for a
        chunk.
        """
        if not self.stream.started:
            return
        if self.grid.at_end and not self._boundary:
            if self.stream.pending is None or self.stream.arrived:
                self._begin_step()
            else:
                self._boundary = True
        plan = self.stream.ask_if_due(now)
        if plan is not None and plan.deadline_s is not None:
            self.grid.delay()

    def planned(self) -> list[tuple[Array, float | None]]:
        """Where the steps to come of the running chunk end: joints (J,) [rad], opening [m]."""
        motion = self._motion.copy()
        steps = []
        for action in self.stream.upcoming[1]:
            motion.advance(np.asarray(action, dtype=np.float64))
            steps.append((motion.joints, motion.gripper))
        return steps

    def observed(self, now: float) -> None:
        """An image has come; asks for the next chunk if the next images would come too late for
        it.
        """
        if not self._observations.renewed():
            return
        self.grid.images.append(now)
        if not self.stream.started:
            return
        plan = self.stream.ask_if_due(now)
        if plan is not None and plan.deadline_s is not None:
            slack = plan.frozen_steps + self.grid.remaining(now) - self.stream.lead
            self.grid.align(slack * self.grid.action_dt, self.grid.until_images(now))

    def receive(self, now: float) -> None:
        """Take the policy's answer if there is one; called as soon as it comes, so that its step
        begins in time.
        """
        partial = self.stream.partial
        if self.stream.receive(now) and self._step_hold is not None:
            self.grid.begin_now()  # nothing moves: the next step need not wait for its boundary
            self._boundary = True
        elif partial and not self.stream.partial:
            # The rest is there: steps begin when answers to images come, so the one that runs takes
            # longer.
            self.grid.begin_now()
            self.grid.begin_step()
            self._start, self._start_part = self._wanted, 0.0
        if not self.stream.arrived:
            return
        if self._boundary:
            self._begin_step()
        elif self.grid.part <= self.stream.grace * self.grid.ticks_per_step and (
            target := self.stream.redo()
        ):
            # It came just after the step had begun, and decides on the rest of it.
            self._motion.restore(self._before_step)
            self._start, self._start_part = self._wanted, self.grid.part
            self._execute(target)

    def _watch_clock(self, dt: float, clock: float) -> None:
        """After a step back, the stamps of the inputs are of a time that is still to come: wait for
        new ones.
        """
        self._enabled_at = min(self._enabled_at, clock)
        if dt <= 0.0:
            self._clock_fault = Hold(
                "clock", f"the clock went back by {-dt:.2f} s; waiting for new inputs"
            )
            self._observations.forget()
            self.stream.try_again()
            self._blind_since = None
            self._drop_plans()
        elif self._clock_fault is not None and None not in self.ages(clock).values():
            self._clock_fault = None

    def watch_ticks(self, since: float) -> None:
        """Note that no tick came for so long [s] of real time, though time is a simulation's."""
        if since > STALLED and self._safety.enabled:
            detail = f"no tick for {since:.1f} s: /clock has stopped, and with it the commands"
            self.hold = Hold("clock", detail)

    def _watch_faults(self, now: float, clock: float) -> None:
        """Forbid motion where it must not resume by itself: after a long outage, or from another
        pose than before.
        """
        if not self._safety.enabled:
            return
        fault = self._safety.pose_fault(self.ages(clock)[JOINT_STATES])
        if fault is not None and fault.code == MOVED:
            self._forbid(f"{fault.code}: {fault.detail}")
            return
        why = self.outage.over(self.hold, self.ages(clock).values(), now)
        if why:
            self.interrupt(why)

    def _cause(self, hold: Hold | None) -> Hold | None:
        """What made an input stale, where that is known."""
        if hold is None or hold.code != "stale":
            return hold
        return self._clock_fault or self._observations.explain(hold, self._safety.limits.timeouts)

    def _pose_fault(self, clock: float) -> Hold | None:
        return self._cause(self._safety.pose_fault(self.ages(clock)[JOINT_STATES]))

    def _stays_silent(self, now: float, clock: float) -> bool:
        """Whether nothing is sent. Out of silence, motion starts from wherever others moved the arm
        meanwhile.

        So it does when joint states come back after a hold: no command follows from a pose of
        before.
        """
        known = self._pose_fault(clock) is None
        blind_since = self._blind_since
        if known:
            self._blind_since = None
        elif blind_since is None:
            self._blind_since = now
        elif now - blind_since > BLIND_HOLD:
            return True
        if self._safety.forbidden is not None or self._conflict is not None:
            return True
        if self._left_anchor():
            self._go_silent()
        if not known or not (self._silent or blind_since is not None):
            return self._silent
        self._not_yet = self._safety.restart(self.ages(clock)[JOINT_STATES])
        if self._not_yet is not None:
            self._go_silent()
            return True
        self._start_here(clock, resumed=not self._silent)
        self._silent = False
        return False

    def _left_anchor(self) -> bool:
        """Whether something else has moved the arm since the hold began."""
        measured = self._safety.measured
        if self._anchor is None or measured is None:
            return False
        return bool(np.any(np.abs(measured - self._anchor) > self._safety.limits.max_step))

    def _go_silent(self) -> None:
        """Send nothing until motion restarts from the measured pose."""
        self._silent = True
        self._anchor = None
        self._drop_plans()
        self.statistics.paused()

    def _start_here(self, clock: float, *, resumed: bool) -> None:
        """Plan nothing, and start from the measured pose; what the gripper was told stays true if
        it is `resumed`.
        """
        self._drop_plans()
        self.statistics.paused()
        measured = self._safety.measured
        assert measured is not None
        self._motion.restart(measured, None if resumed else self._observations.opening)
        self._enabled_at = clock
        self._blend, self._held = 0.0, measured

    def _fall_silent(self, dt: float, clock: float, hold: Hold | None) -> Decision | None:
        """The last command once more, so that a twist ends too; then nothing."""
        if self._silent:
            forbidden = self._safety.forbidden
            if self._safety.stopped is not None or forbidden is None:
                hold = forbidden or self._pose_fault(clock) or self._not_yet or hold
            self.hold = hold or forbidden
            return None
        self._go_silent()
        decision = self._safety.command(
            None, None, dt=dt, ages=self.ages(clock), hold=hold or Hold("disabled", "")
        )
        self.hold = self._cause(decision.hold)
        if decision.positions is None or self._conflict is not None:
            return None
        return decision

    def _wait(self, dt: float, clock: float, hold: Hold | None) -> Decision:
        """Hold with nothing planned; begin as soon as nobody objects."""
        hold = hold or FIRST_CHUNK
        decision = self._safety.command(None, None, dt=dt, ages=self.ages(clock), hold=hold)
        if decision.hold is FIRST_CHUNK and decision.positions is not None:
            self._motion.resume(decision.positions)
            self._start = self._wanted = self._held = decision.positions
            self.stream.start()
            self.grid.begin_now()
        return decision

    def _move(self, dt: float, clock: float, hold: Hold | None) -> Decision:
        if self._boundary:
            self._begin_step()  # with the running chunk: the answer is late
        while self.grid.part > self.grid.ticks_per_step + 1e-6 and self.stream.started:
            self._begin_step()  # its first tick was missed
        if hold is None and self._step_hold is None:
            self._blend = min(self._blend + dt / self._blend_in, 1.0) if self._blend_in else 1.0
        share = (self.grid.part - self._start_part) / (self.grid.ticks_per_step - self._start_part)
        self._wanted = self._start + share * (self._motion.joints - self._start)
        blended = self._held + self._blend * (self._wanted - self._held)
        decision = self._safety.command(
            blended,
            self._motion.gripper,
            dt=dt,
            ages=self.ages(clock),
            hold=hold or self._step_hold,
        )
        if decision.hold is None:
            assert decision.positions is not None
            self._lag = blended - decision.positions
            self.stream.commanded(clock)
        elif decision.hold is not self._step_hold:
            self._drop_plans()  # after its own holds the stream goes on by itself
        return decision

    def _step_home(self, dt: float, clock: float, home: Array) -> Decision:
        """One command on the way home, on which images do not matter."""
        last = self._safety.last_command
        assert last is not None
        dt = min(dt, MAX_DT)
        wanted = toward(last, home, HOME_SPEED, dt, self._safety.limits.max_acceleration)
        ages = {
            **dict.fromkeys(self.ages(clock), 0.0),
            JOINT_STATES: self.ages(clock)[JOINT_STATES],
        }
        decision = self._safety.command(wanted, None, dt=dt, ages=ages, hold=None)
        if decision.positions is None:
            return decision
        if decision.hold is None and np.allclose(decision.positions, home, rtol=0.0, atol=1e-9):
            self.disable()
        return decision

    def _begin_step(self) -> None:
        """Take the action of the step that begins at the tick that was sent last."""
        self._boundary = False
        self.statistics.slips += self.grid.begin_step()
        held = self._safety.last_command if self._step_hold is not None else None
        self._start = self._motion.joints if held is None else held
        self._start_part = 0.0
        self._held = self._held if held is None else held
        self._before_step = self._motion.copy()
        self._execute(self.stream.target())

    def _execute(self, target: Target) -> None:
        if target.action is None:
            detail = (
                "for the first chunk"
                if target.source == WAITING
                else "the chunk ended before the next one came"
            )
            error = self.statistics.last_error
            code = self.stream.failure or target.source
            self._step_hold = Hold(code, f"{detail} (last error: {error})" if error else detail)
            return
        self._step_hold, self._seam = None, target.seam
        # Increments run away from an arm that cannot follow: they end where a step at full speed
        # does, and a stop.
        limits = self._safety.limits
        base = self._motion.joints - self._lag
        stop = self._safety.stopping_distance
        reach = limits.max_velocity * self.grid.action_dt + stop
        self._motion.advance(
            np.asarray(target.action), base, reach, limits.position_low, limits.position_high
        )

    def _objection(self) -> Hold | None:
        """Why the arm must hold though the safety filter has no reason."""
        if self._conflict is not None:
            return self._conflict_hold()
        objection = self.stream.objection()
        taken = self._observations.image_stamp
        if objection is None and taken is not None and taken < self._enabled_at:
            return Hold(WAITING, "for images taken after motion was enabled")
        return objection

    def _conflict_hold(self) -> Hold | None:
        return None if self._conflict is None else Hold("conflict", self._conflict)

    def _drop_plans(self) -> None:
        self.stream.stop()
        self._step_hold, self._lag = None, 0.0
        self._seam = self._boundary = False
