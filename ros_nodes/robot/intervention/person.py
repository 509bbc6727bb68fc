"""Who is in charge: the policy, or a person with a device. Free of ROS and of clocks.

A person takes over by moving the device more than its threshold, or by holding a button, and gives
back by letting go. A device that goes silent, sends values that are not finite, or leads too far
away while it is in charge holds the arm, and so does an arm whose pose was lost meanwhile; only the
person, or an operator's `~/enable`, ends that.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from math import inf

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.intervention.base import Wish
from ceed_vla.ros_nodes.robot.intervention.guides import Guide
from ceed_vla.ros_nodes.robot.intervention.patience import Patience
from ceed_vla.ros_nodes.robot.safety import Hold

INTERVENTION = "intervention"  # code of the hold


class Charge(StrEnum):
    """Who commands the arm."""

    POLICY = "policy"
    PERSON = "person"
    NOBODY = "nobody"  # the person's device is lost


class Person:
    """Decides at every tick who is in charge.

    Args:
        guide: Makes commands of the person's wishes.
        patience: Times.

    Attributes:
        charge: Who is in charge.
        refused: Why the person cannot take over now; "" if nothing objects.
        counts: "taken" and "lost": how often.
    """

    def __init__(self, guide: Guide, patience: Patience) -> None:
        self.charge = Charge.POLICY
        self.refused = ""
        self.counts: Counter[str] = Counter({"taken": 0, "lost": 0})
        self._guide = guide
        self._patience = patience
        self._wish: Wish | None = None
        self._arrived = -1e9  # steady time of the newest good message [s]
        self._pressed = False
        self._let_go = True  # whether a press counts: the button was let go since the last fault
        self._pressed_at = -1e9  # steady time of the newest message about the button [s]
        self._moved = -1e9  # steady time at which the device was last moved [s]
        self._fault = ""  # of the newest message
        self._why = ""  # the device was lost
        self._grips = False  # whether the gripper follows the device
        self._grip_from: float | None = None  # opening of the device at the beginning [m]

    # ---- messages --------------------------------------------------------------------------------

    def take(self, wish: Wish, now: float) -> None:
        """Take what the person wants, at steady time `now` [s]."""
        self._wish = wish
        self._arrived = now
        if wish.active:
            self._moved = now
        if wish.button is not None:
            self.press(wish.button, now)

    def press(self, pressed: bool, now: float) -> None:
        """Take whether the button is pressed, at steady time `now` [s]."""
        self._pressed = pressed
        self._pressed_at = now
        self._let_go = self._let_go or not pressed

    def refuse(self, why: str) -> None:
        """Take a message that cannot be used."""
        self._fault = why

    # ---- the control loop ------------------------------------------------------------------------

    def update(self, now: float, last: Array | None) -> bool:
        """Decide who is in charge at steady time `now` [s]; `last` is the last command (J,) [rad],
        None if nothing is commanded.

        Returns:
            Whether that has changed.
        """
        before = self.charge
        if last is None:
            return False
        wants = self._wants(now)
        lost = self._lost(now, last)
        self._fault = ""  # a good message after it does not hide it before this tick
        if self.charge is Charge.PERSON:
            if lost:
                self.charge = Charge.NOBODY
                self._why = lost
                self.counts["lost"] += 1
            elif not wants:
                self.charge = Charge.POLICY
        elif wants and not lost:
            self.charge = Charge.PERSON
            self._guide.begin(last)
            self._grips = False
            self._grip_from = None
            self.counts["taken"] += before is Charge.POLICY
        if lost and self.charge is Charge.NOBODY:
            self._begin_anew()
        asks = wants and self.charge is Charge.POLICY
        # a silent device asks for nothing, unless its button is pressed
        asks = asks and (self._patience.by_button or now - self._arrived <= self._patience.timeout)
        self.refused = lost if asks else ""
        return before is not self.charge

    def command(self, last: Array, dt: float) -> Array:
        """The person's command (J,) [rad] after the `last` one, `dt` [s] later."""
        assert self._wish is not None
        return self._guide.command(self._wish, last, dt)

    def opening(self, last: float | None) -> float | None:
        """Opening of the gripper that the person wants [m]; None to leave it at the `last` one.

        A leader's gripper is followed only once it has been near the last opening, so that taking
        over does not drop what the robot holds. If that is unknown (None), it is followed once the
        person has moved it.
        """
        wanted = None if self._wish is None else self._wish.opening
        if wanted is None:
            return None
        tolerance = self._guide.grip_tolerance
        if self._grip_from is None:
            self._grip_from = wanted
        if last is not None:
            self._grips = self._grips or abs(wanted - last) <= tolerance
        else:
            moved = abs(wanted - self._grip_from) > tolerance
            self._grips = self._grips or moved or tolerance == inf
        return wanted if self._grips else None

    @property
    def hold(self) -> Hold | None:
        """Why the arm holds because nobody is in charge; None if somebody is."""
        if self.charge is not Charge.NOBODY:
            return None
        again = "let go of the button and press it again" if self._patience.by_button else "move it"
        remedy = f"{again} to take over, or call ~/enable to return to the policy"
        return Hold(INTERVENTION, f"{self._why} while the person was in charge; {remedy}")

    def restart(self) -> None:
        """Hold for the person to take over anew, because the arm may have moved meanwhile."""
        if self.charge is Charge.PERSON:
            self.charge = Charge.NOBODY
            self._why = "the arm's pose was unknown"
            self._begin_anew()

    def forget(self) -> None:
        """Return to the policy, because motion is enabled or disabled anew.

        A motion of the device before that does not count. A button does that is still held: the
        policy does not command the arm against it.
        """
        self.charge = Charge.POLICY
        self._moved = -1e9
        self._let_go = True

    def _begin_anew(self) -> None:
        """Let only what the person does from now on take over: a motion, or another press."""
        self._moved = -1e9
        self._let_go = self._let_go and not self._pressed

    def _wants(self, now: float) -> bool:
        """Whether the person wants to be in charge."""
        if self._patience.by_button:
            return (
                self._pressed and self._let_go and now - self._pressed_at <= self._patience.timeout
            )
        # between messages: a silent device does not say that it was let go
        return self._wish is not None and self._arrived - self._moved <= self._patience.release

    def _lost(self, now: float, last: Array) -> str:
        """Why the device cannot be in charge; "" if it can."""
        if self._fault:
            return self._fault
        if self._wish is None or now - self._arrived > self._patience.timeout:
            return f"the device sent nothing for {self._patience.timeout:g} s"
        if self._patience.by_button and now - self._pressed_at > self._patience.timeout:
            return f"the button's topic sent nothing for {self._patience.timeout:g} s"
        return self._guide.misaligned(self._wish, last)
