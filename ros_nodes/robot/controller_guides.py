"""Commands that do not come from the policy: the slow move home, and those of a person.

Free of ROS and of clocks.
"""

from __future__ import annotations

from collections.abc import Mapping

from ceed_vla.ros_nodes.robot.controller_states import Event
from ceed_vla.ros_nodes.robot.intervention.person import Charge, Person
from ceed_vla.ros_nodes.robot.motion import HomeMove
from ceed_vla.ros_nodes.robot.safety import JOINT_STATES, MAX_DT, Decision, Hold, SafetyFilter


class Guides:
    """What commands the arm instead of the policy's stream, if anything does.

    Args:
        safety: The filter for the commands.
        person: Who may take over; None without a device.

    Attributes:
        home: The move home that an operator requested; None without one.
    """

    def __init__(self, safety: SafetyFilter, person: Person | None) -> None:
        self.home: HomeMove | None = None
        self._safety = safety
        self._person = person

    @property
    def charge(self) -> Charge:
        """Who is in charge, apart from a move home."""
        return Charge.POLICY if self._person is None else self._person.charge

    @property
    def event(self) -> Event | None:
        """The event of a command that is sent now; None if the policy commands."""
        if self.charge is Charge.PERSON:
            return Event.PERSON
        return Event.HOME if self.home is not None else None

    @property
    def hold(self) -> Hold | None:
        """Why the arm holds because the person's device is lost."""
        return None if self._person is None else self._person.hold

    def forget(self) -> None:
        """Return to the policy: an operator decided so, or motion is forbidden."""
        self.home = None
        if self._person is not None:
            self._person.forget()

    def restart(self) -> None:
        """Begin from the measured pose: a person in charge must take over anew."""
        if self._person is not None:
            self._person.restart()

    def update(self, now: float) -> bool:
        """Let the person take over or give back, at steady time `now` [s]; return whether who is in
        charge has changed.
        """
        if self._person is None:
            return False
        changed = self._person.update(now, self._safety.last_command)
        if changed:
            self.home = None
        return changed

    def command(
        self, dt: float, ages: Mapping[str, float | None], opening: float | None
    ) -> Decision:
        """Return the command of this tick, for which images do not matter.

        Args:
            dt: Time since the last command [s].
            ages: Input -> age [s], None if it never arrived.
            opening: Measured opening of the gripper [m]; None if it is not measured.
        """
        last = self._safety.last_command
        assert last is not None
        dt = min(dt, MAX_DT)
        gripper = None
        if self.charge is Charge.PERSON and self._person is not None:
            wanted = self._person.command(last, dt)
            commanded = self._safety.last_opening
            gripper = self._person.opening(opening if commanded is None else commanded)
        else:
            assert self.home is not None
            wanted = self.home.command(last, dt, self._safety.limits.max_acceleration)
        ages = {**dict.fromkeys(ages, 0.0), JOINT_STATES: ages[JOINT_STATES]}
        return self._safety.command(wanted, gripper, dt=dt, ages=ages, hold=None)

    def arrived(self, decision: Decision) -> bool:
        """Whether this command ends the move home."""
        sent = decision.positions
        if self.event is not Event.HOME or self.home is None:
            return False
        return sent is not None and decision.hold is None and self.home.reached_by(sent)
