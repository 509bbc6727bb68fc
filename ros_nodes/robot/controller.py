"""The policy node's control loop: turns observations into commands at a fixed rate, without ROS or
clocks.

`controller_states` has the states and their transitions; this module implements them.

Time is a grid of steps of ``action_dt``, each ``N`` ticks long. A step has one end target. The
command of tick i of N lies on the straight line from the previous target to this one, so commands
stay continuous at the seam of two chunks. When `SafetyFilter` or an input objects, the arm holds
and all chunks are dropped. Motion then resumes from the held pose, or from the measured pose if the
pose was unknown meanwhile. After a long outage, a restart of the robot or a conflict, an operator
must allow motion again. A chunk is requested with the last images that are in time for the step at
which it takes over, and the grid is moved so that these images are fresh.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.controller_guides import Guides
from ceed_vla.ros_nodes.robot.controller_objections import (
    Objections,
    after_conflict,
    with_remedy,
)
from ceed_vla.ros_nodes.robot.controller_pose import PoseWatch
from ceed_vla.ros_nodes.robot.controller_states import ControllerState, Event, StateMachine
from ceed_vla.ros_nodes.robot.controller_steps import FIRST_CHUNK, Blend, StepRunner
from ceed_vla.ros_nodes.robot.intervention.person import Charge, Person
from ceed_vla.ros_nodes.robot.loop_statistics import LoopStatistics
from ceed_vla.ros_nodes.robot.mode import WAITING, Mode, State
from ceed_vla.ros_nodes.robot.motion import HomeMove, Motion
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.outage import RESUME_WITHIN, Outage
from ceed_vla.ros_nodes.robot.policy_stream import PolicyStream
from ceed_vla.ros_nodes.robot.safety import (
    JOINT_STATES,
    MOVED,
    NOT_ENABLED,
    Decision,
    Hold,
    SafetyFilter,
)
from ceed_vla.ros_nodes.robot.step_grid import StepGrid

STALLED = 1.0  # real time without a tick after which the simulated clock counts as stopped [s]
UNNAMED = "a node of unknown name"  # right after its discovery the middleware may not know it
HOME_SPEED = 0.2  # speed of the fastest joint on the way home [rad/s]
NOT_BY_WAITING = ("estop", "conflict", MOVED)  # refusals of `enable` that need an operator


class PolicyController:
    """Sends the actions of a `stream` through the `safety` filter, at the rate of its grid.

    Motion begins gently: for `blend_in` [s] after `enable`, commands lie between the pose at that
    moment and the policy's target. `safety` stores whether motion is allowed; operators change that
    at any time, and it applies from the next tick on.

    Attributes:
        stream: The policy's chunk stream; it owns the step grid.
        machine: State machine with the present state.
        ages: `Observations.ages`.
        hold: Why the arm held at the last tick; None in motion.
        outage: Duration of the fault that holds the arm.
    """

    def __init__(
        self,
        observations: Observations,
        motion: Motion,
        safety: SafetyFilter,
        stream: PolicyStream,
        blend_in: float,
        resume_within: float = RESUME_WITHIN,
        person: Person | None = None,
    ) -> None:
        self.stream = stream
        self.machine = StateMachine()
        self.ages = observations.ages
        self.hold = safety.forbidden
        self.outage = Outage(resume_within)
        self._observations = observations
        self._motion = motion
        self._safety = safety
        self._steps = StepRunner(motion, stream, Blend(blend_in, motion.joints))
        self._pose = PoseWatch()
        self._guides = Guides(safety, person)
        self._insists = False  # whether every tick tries `enable` again
        self._objections = Objections(observations, stream)
        self._clock_fault: Hold | None = None
        self._last_tick: float | None = None
        self._lent = 0.0  # time that ticks have allowed for motion before it passed [s]

    @property
    def grid(self) -> StepGrid:
        """The step grid of the stream; only the stream moves it."""
        return self.stream.grid

    @property
    def statistics(self) -> LoopStatistics:
        """The statistics of the stream."""
        return self.stream.statistics

    # ---- operators -------------------------------------------------------------------------------

    def enable(
        self, now: float, *, insist: bool = False, home: Sequence[float] = ()
    ) -> Hold | None:
        """Allow motion from the measured pose on, without a chunk.

        Args:
            now: The clock's time [s].
            insist: If refused, try again at every tick until joint states arrive.
            home: Pose (J,) [rad] to move to slowly, without the policy; motion is then disabled.

        Returns:
            Why motion is refused and disabled at once; None if it is allowed.
        """
        refused = self._refusal(now, home)
        self._insists = insist and refused is not None and refused.code not in NOT_BY_WAITING
        self._guides.forget()
        if refused is not None:
            self.hold = refused
            self._safety.disable()
            self._steps.drop()
            return refused
        if home:
            self._guides.home = HomeMove(np.array(home), HOME_SPEED)
        self._observations.look_anew()
        self._start_here(now, resumed=False)
        if self.machine.commanding:
            self.machine.take(Event.ENABLE)
        self.stream.try_again()
        self.hold = None if home else self._objections.first() or FIRST_CHUNK
        return None

    def _refusal(self, now: float, home: Sequence[float]) -> Hold | None:
        """Allow motion in the safety filter; return why it must be disabled again, or None."""
        moving = self._safety.enabled and (self.hold is None or self.hold.code == WAITING)
        moving = moving and self.machine.commanding and self._pose_fault(now) is None
        refused = self._objections.conflict_hold()
        if refused is None:
            refused = self._safety.enable(self.ages(now)[JOINT_STATES], moving=moving)
        if refused is None and self.stream.broken is not None and not home:
            refused = self.stream.objection()
        if refused is not None or not home:
            return refused
        limits = self._safety.limits
        if np.any(np.clip(home, limits.position_low, limits.position_high) != home):
            return Hold("no_home", "arm.home lies outside the position limits")
        return None

    @property
    def state(self) -> State:
        """The present state, including changes since the last tick."""
        hold = self.hold
        forbidden = self._safety.forbidden
        conflict = self._objections.conflict
        if conflict is not None and self._safety.stopped is None:
            return State(Mode.DISABLED, "conflict", conflict)
        if forbidden is not None and not self._insists:
            hold = forbidden
        elif self.stream.broken is not None and self._guides.event is None:
            hold = self._objections.first()
        if hold is None and self._guides.charge is Charge.PERSON:
            return State(Mode.GUIDED, detail="a person commands the arm")
        return State.of(hold)

    @property
    def charge(self) -> Charge:
        """Who is in charge: the policy, or a person."""
        return self._guides.charge

    def note_conflict(self, reason: str | None) -> None:
        """Record what else commands the arm or publishes its joints; None if nothing does.

        A conflict disables motion, and motion stays disabled after the conflict. The first reason
        is kept; if it lacks a node's name, the next one replaces it.
        """
        before = self._objections.conflict or ""
        present = self._safety.forbidden or Hold("", "")
        nameless = UNNAMED in before and present.detail == after_conflict(before)
        if reason is not None and (nameless or self._safety.enabled or self._insists):
            self._forbid(after_conflict(reason))
        self._objections.conflict = reason

    def interrupt(self, why: str) -> None:
        """Forbid motion until an operator allows it again; no effect if motion is not allowed."""
        if self._safety.enabled or self._insists:
            self._forbid(with_remedy(why))

    def disable(self) -> None:
        """Hold once, then send nothing until `enable`."""
        self._forbid(NOT_ENABLED)

    def _forbid(self, why: str) -> None:
        self._insists = False
        self._guides.forget()
        self.outage.forget()
        self._safety.disable(why)
        self._steps.drop()

    def end(self, clock: float) -> Decision | None:
        """Send the last command once more, and then nothing until motion restarts."""
        self.disable()
        event = self._end(blind=False) or Event.FORBID
        return self._fall_silent(event, self.grid.nominal, clock, None)

    def estop(self, reason: str) -> None:
        """Latch the stop: hold once, then send nothing until `reset` and `enable`."""
        self._safety.estop(reason)
        self.disable()

    def reset(self) -> str:
        """Unlatch the stop and accept the arm's pose; disabled motion stays disabled.

        Motion that is allowed is disabled if the pose is not trusted at present: accepting it must
        not be what lets the arm move on.

        Returns how the pose differs from the last trusted pose; "" if it does not.
        """
        self._insists = False
        if not self._safety.trusted:
            self.interrupt("~/reset accepted a pose that was not trusted")
        return self._safety.reset()

    # ---- control loop ----------------------------------------------------------------------------

    def tick(self, now: float, clock: float) -> Decision | None:
        """Run one period of the loop.

        Args:
            now: Steady time [s].
            clock: The same moment on the clock of the messages' stamps [s].

        Returns:
            The command; None to send nothing.
        """
        passed = self.grid.nominal if self._last_tick is None else now - self._last_tick
        self._last_tick = now
        self._watch_clock(passed, clock)
        self.stream.count_tick(now, passed)
        # A tick that follows a late one comes sooner, but must not allow less time for motion; a
        # later tick then counts for less.
        dt = max(passed - self._lent, self.grid.nominal)
        self._lent = max(0.0, self._lent + dt - passed) if passed > 0.0 else 0.0
        self.receive(now)
        refused = self.enable(clock, insist=True) if self._insists else None
        self._watch_faults(now, clock)
        hold = refused or self._objections.first()
        known = self._pose_fault(clock) is None
        regained = known and self._pose.unknown
        end = self._end(blind=self._pose.note_pose(known=known, now=now))
        if end is not None:
            return self._fall_silent(end, dt, clock, hold)
        if not self._may_command(clock, known=known, regained=regained):
            self.hold = self._silent_hold(clock, hold)
            return None
        if self._guides.update(now):
            self._change_charge(clock)
            hold = self._objections.first()
        return self._command(now, dt, clock, self._guides.hold or hold)

    def after_tick(self, now: float) -> None:
        """Do the slow work that can follow the command: the next step and the chunk request."""
        self._steps.after_tick(now, self._safety)

    def observed(self, now: float) -> None:
        """Handle a new image; request the next chunk if the next images would be late for it."""
        if self._observations.renewed():
            self.stream.images_came(now)

    def receive(self, now: float) -> None:
        """Take the policy's answer if there is one; call it as soon as the answer arrives, so that
        its step begins in time.
        """
        self._steps.receive(now, self._safety)

    def planned(self) -> list[tuple[Array, float | None]]:
        """Targets of the running chunk's remaining steps: joints (J,) [rad], opening [m]."""
        motion = self._motion.copy()
        steps = []
        for action in self.stream.upcoming[1]:
            motion.advance(np.asarray(action, dtype=np.float64))
            steps.append((motion.joints, motion.gripper))
        return steps

    # ---- holds and the end of motion -------------------------------------------------------------

    def watch_ticks(self, since: float) -> None:
        """Detect a stopped simulated clock, `since` [s] of real time after the last tick."""
        if since > STALLED and self._safety.enabled:
            detail = f"no tick for {since:.1f} s: /clock has stopped, and with it the commands"
            self.hold = Hold("clock", detail)

    def _watch_clock(self, dt: float, clock: float) -> None:
        """Watch for a step back of the clock: the inputs' stamps then lie in the future, so new
        inputs are needed.
        """
        self._objections.allowed_at = min(self._objections.allowed_at, clock)
        if dt <= 0.0:
            self._clock_fault = Hold(
                "clock", f"the clock went back by {-dt:.2f} s; waiting for new inputs"
            )
            self._observations.forget()
            self.stream.try_again()
            self._pose.forget_time()
            self._steps.drop()
        elif self._clock_fault is not None and None not in self.ages(clock).values():
            self._clock_fault = None

    def _watch_faults(self, now: float, clock: float) -> None:
        """Forbid motion if it must not resume by itself: after a long outage, or if the pose has
        changed.
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

    def _end(self, *, blind: bool) -> Event | None:
        """Return the event that forbids commands at any pose; None if commands are possible.

        `blind` is whether the pose has been unknown for too long. An unlatched stop ends here.
        """
        if self._safety.stopped is not None:
            return Event.ESTOP
        if self.machine.state is ControllerState.STOPPED:
            self.machine.take(Event.RESET)
        if self._safety.forbidden is not None or self._objections.conflict is not None:
            return Event.FORBID
        return Event.BLIND if blind else None

    def _may_command(self, clock: float, *, known: bool, regained: bool) -> bool:
        """Return whether a command may be sent.

        After silence, motion starts from the measured pose, because others may have moved the arm.
        The same holds if the pose is `regained` during a hold: no command follows an old pose.
        """
        if self._pose.left(self._safety.measured, self._safety.limits.max_step):
            self._go_silent(Event.ELSEWHERE)
        commanding = self.machine.commanding
        if not known or (commanding and not regained):
            return commanding
        self._pose.refusal = self._safety.restart(
            self.ages(clock)[JOINT_STATES], resumed=commanding
        )
        if self._pose.refusal is not None:
            self._go_silent(Event.ELSEWHERE)
            return False
        self._start_here(clock, resumed=commanding)
        self.machine.take(Event.RESUME if commanding else Event.RESTART)
        return True

    def _start_here(self, clock: float, *, resumed: bool) -> None:
        """Start from the measured pose without a chunk; if `resumed`, the gripper's command stays
        valid.
        """
        self._steps.drop()
        self._guides.restart()
        self.statistics.paused()
        measured = self._safety.measured
        assert measured is not None
        self._motion.restart(measured, None if resumed else self._observations.opening)
        self._objections.allowed_at = clock
        self._steps.blend.restart(measured)

    def _go_silent(self, event: Event) -> None:
        """Send nothing until motion restarts from the measured pose."""
        self.machine.take(event)
        self._pose.forget_hold()
        self._steps.drop()
        self.statistics.paused()

    def _fall_silent(
        self, event: Event, dt: float, clock: float, hold: Hold | None
    ) -> Decision | None:
        """Send the last command once more, so that a twist ends too; then send nothing."""
        if not self.machine.commanding:
            self.machine.take(event)
            self.hold = self._silent_hold(clock, hold)
            return None
        self._go_silent(event)
        decision = self._safety.command(
            None, None, dt=dt, ages=self.ages(clock), hold=hold or Hold("disabled", "")
        )
        self.hold = self._cause(decision.hold)
        if decision.positions is None or self._objections.conflict is not None:
            return None
        return decision

    # ---- one command -----------------------------------------------------------------------------

    def _command(self, now: float, dt: float, clock: float, hold: Hold | None) -> Decision | None:
        """Return the command of this tick, and change the state."""
        event = self._guides.event
        if event is not None:
            decision = self._guides.command(dt, self.ages(clock), self._observations.opening)
            if self._guides.arrived(decision):
                self.disable()
        else:
            decision = self._steps.command(self._safety, hold, dt, clock, self.ages(clock))
        self.hold = self._cause(decision.hold)
        if decision.positions is None:
            self._go_silent(Event.ELSEWHERE)
            return None
        if self.hold is None:
            self._pose.forget_hold()
            self.machine.take(event or Event.ACTION)
        else:
            self._pose.note_hold(self._safety.measured)
            self.machine.take(Event.NO_CHUNK if self.hold.code == WAITING else Event.FAULT)
        self.statistics.sent(now, decision.positions, self._steps.take_seam())
        return decision

    def _change_charge(self, clock: float) -> None:
        """Drop the policy's chunks, because a person took over, gave back, or is lost."""
        self._steps.drop()
        self._objections.allowed_at = clock  # the next chunk is of images taken from now on
        last = self._safety.last_command
        assert last is not None
        self._steps.blend.restart(last)
        self._motion.grip(self._safety.last_opening)
        if self.machine.state is ControllerState.GUIDED and self.charge is Charge.POLICY:
            self.machine.take(Event.RELEASE)

    # ---- reasons of holds ------------------------------------------------------------------------

    def _pose_fault(self, clock: float) -> Hold | None:
        return self._cause(self._safety.pose_fault(self.ages(clock)[JOINT_STATES]))

    def _cause(self, hold: Hold | None) -> Hold | None:
        """Return the cause of a stale input, if it is known."""
        if hold is None or hold.code != "stale":
            return hold
        return self._clock_fault or self._observations.explain(hold, self._safety.limits.timeouts)

    def _silent_hold(self, clock: float, hold: Hold | None) -> Hold | None:
        """Return why nothing is sent; `hold` is the objection to motion that is allowed."""
        forbidden = self._safety.forbidden
        if self._safety.stopped is not None or forbidden is None:
            hold = forbidden or self._pose_fault(clock) or self._pose.refusal or hold
        return hold or forbidden
