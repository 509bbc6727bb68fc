"""A person takes over from the policy: devices, who is in charge, and the arm's commands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.ros_nodes.robot.controller_states import ControllerState
from ceed_vla.ros_nodes.robot.intervention.base import Body, Device, Wish
from ceed_vla.ros_nodes.robot.intervention.guides import LeaderGuide
from ceed_vla.ros_nodes.robot.intervention.joy import Gamepad
from ceed_vla.ros_nodes.robot.intervention.leader import LeaderArm
from ceed_vla.ros_nodes.robot.intervention.patience import Patience
from ceed_vla.ros_nodes.robot.intervention.person import Charge, Person
from ceed_vla.ros_nodes.robot.intervention.twist import TwistDevice
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.ros_nodes.robot.yaml_fields import Fields
from tests.ros_nodes.loop import EVEN, JOINTS, Loop

TABLETOP = load_robot_config()
BODY = Body(JOINTS, 0.0, 0.08, lambda fingers: 2.0 * fingers)


def device(kind: type[Device], **settings: Any) -> Device:
    fields = Fields(Path("robot.yaml"), "intervention", {"topic": "device", **settings})
    made = kind(fields, BODY)
    fields.finish()
    return made


# ---- devices -------------------------------------------------------------------------------------


def joy(axes: list[float], *pressed: int) -> Any:
    return SimpleNamespace(axes=axes, buttons=[int(index in pressed) for index in range(8)])


def test_a_gamepad() -> None:
    axes = {"x": 1, "y": 0, "yaw": 3}
    pad = device(Gamepad, axes=axes, inverted=["y"], open=0, close=1, linear=0.2, threshold=0.2)
    wish = pad.read(joy([0.1, -0.1, 0.0, 0.19]), 0.0)
    assert not wish.active
    assert wish.twist is not None
    assert not wish.twist.any()
    wish = pad.read(joy([0.6, 1.0, 0.0, -1.0], 1), 0.0)
    assert wish.active
    assert wish.button is None
    np.testing.assert_allclose(wish.twist, [0.2, -0.1, 0.0, 0.0, 0.0, -0.5])
    assert wish.opening == 0.0
    assert pad.read(joy([0.0] * 4, 0), 0.0) == Wish(True, pytest.approx(np.zeros(6)), None, 0.08)
    with_button = device(Gamepad, axes=axes, button=5)
    assert with_button.read(joy([0.0] * 4, 5), 0.0).button
    assert with_button.read(joy([0.0] * 4), 0.0).button is False
    for axes_now, text in (([0.0], "has 1 axes"), ([0.0, math.nan, 0, 0], "must be finite")):
        with pytest.raises(ObservationError, match=text):
            pad.read(joy(axes_now), 0.0)
    with pytest.raises(ObservationError, match="has 0 buttons"):
        with_button.read(SimpleNamespace(axes=[0.0] * 4, buttons=[]), 0.0)


def twist(*values: float) -> Any:
    x, y, z, roll, pitch, yaw = (*values, *[0.0] * (6 - len(values)))
    linear = SimpleNamespace(x=x, y=y, z=z)
    return SimpleNamespace(
        twist=SimpleNamespace(linear=linear, angular=SimpleNamespace(x=roll, y=pitch, z=yaw))
    )


def test_a_twist() -> None:
    mouse = device(TwistDevice, linear=0.2, angular=1.0, threshold=0.05)
    assert not mouse.read(twist(0.009, 0.0, 0.0, 0.0, 0.0, 0.04), 0.0).active
    wish = mouse.read(twist(0.5, -0.1), 0.0)
    assert wish.active
    np.testing.assert_allclose(wish.twist, [0.2, -0.1, 0.0, 0.0, 0.0, 0.0])
    with pytest.raises(ObservationError, match=r"velocities are .* must be finite"):
        mouse.read(twist(math.inf), 0.0)


def joints(*positions: float, names: tuple[str, ...] = JOINTS) -> Any:
    return SimpleNamespace(name=list(names), position=list(positions))


def test_a_leader_arm() -> None:
    leader = device(LeaderArm, joints=["a", "b"], gripper=["c"], threshold=0.2)
    names = ("c", "b", "a")
    for step in range(10):
        wish = leader.read(joints(0.01, 2.0, 1.0, names=names), 0.02 * step)
        assert not wish.active
    assert wish.joints is not None
    assert (wish.joints.tolist(), wish.opening) == ([1.0, 2.0], 0.02)
    for step in range(10, 20):  # 0.5 rad/s
        wish = leader.read(joints(0.01, 2.0, 1.0 + 0.01 * (step - 9), names=names), 0.02 * step)
    assert wish.active
    with pytest.raises(ObservationError, match="lacks b"):
        leader.read(joints(0.0, 0.0, names=("a", "c")), 1.0)
    with pytest.raises(ObservationError, match="must be finite"):
        leader.read(joints(0.0, math.nan, 0.0, names=names), 1.0)


ROBOT = """
images: {observation.images.front: {topic: front}}
joint_states: {topic: joint_states}
state: {observation.state: [joint_positions]}
arm: {joints: [a, b]}
action: {kind: joint_position, dt: 0.1}
limits: {position: {low: [-3, -3], high: [3, 3]}, velocity: [1, 1], step: [1, 1]}
interfaces: {forward_position: {topic: commands}}
intervention: {INTERVENTION}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: wheel, topic: wheel", "is 'wheel'; choose one of joy, leader, twist"),
        ("kind: joy, topic: joy, axes: {x: 0}", "is joy, which needs arm.model"),
        ("kind: leader, topic: lead, joints: [a]", "names 1 joints; the arm has 2"),
        ("kind: leader, topic: lead, gripper: [c]", "the robot's file has no gripper"),
        ("kind: leader, topic: lead, release: -1", r"must lie in \[0, 10\]"),
        ("kind: leader, topic: lead, speed: 1", "intervention.speed is unknown"),
        ("kind: leader", "intervention.topic is missing"),
    ],
)
def test_robot_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "robot.yaml").write_text(ROBOT.replace("INTERVENTION", text))
    with pytest.raises(ConfigError, match=message):
        load_robot_config(tmp_path / "robot.yaml")


# ---- who is in charge ----------------------------------------------------------------------------


class Cell:
    """A person with a leader arm beside the last command, at 100 Hz."""

    def __init__(self, *, by_button: bool = False) -> None:
        guide = LeaderGuide(JOINTS, np.array([0.1, 0.1]), None)
        self.person = Person(guide, Patience(timeout=0.2, release=0.3, by_button=by_button))
        self.now = 5.0
        self.last: np.ndarray | None = np.zeros(2)

    def run(
        self,
        seconds: float,
        *,
        active: bool = False,
        leader: float | None = 0.0,
        pressed: bool | None = None,
    ) -> Charge:
        for _ in range(round(100 * seconds)):
            self.now += 0.01
            if leader is not None:
                self.person.take(Wish(active, joints=np.full(2, leader)), self.now)
            if pressed is not None:
                self.person.press(pressed, self.now)
            self.person.update(self.now, self.last)
        return self.person.charge


def test_a_person_takes_over_and_gives_back() -> None:
    cell = Cell()
    assert cell.run(1.0) is Charge.POLICY
    assert cell.run(0.01, active=True) is Charge.PERSON
    assert cell.run(1.0, active=True) is Charge.PERSON
    assert cell.run(0.25) is Charge.PERSON  # a short rest
    assert cell.run(0.1) is Charge.POLICY
    assert cell.person.counts == {"taken": 1, "lost": 0}


def test_a_button_takes_over_and_gives_back_at_once() -> None:
    cell = Cell(by_button=True)
    assert cell.run(0.5, active=True, pressed=False) is Charge.POLICY
    assert cell.run(0.01, pressed=True) is Charge.PERSON
    assert cell.run(0.01, pressed=False) is Charge.POLICY
    assert cell.run(0.1, pressed=True) is Charge.PERSON
    assert cell.run(0.5) is Charge.NOBODY  # the button's topic is silent
    assert cell.run(0.1, pressed=False) is Charge.NOBODY
    assert cell.run(0.1, pressed=True) is Charge.PERSON


def test_a_button_that_stays_pressed_takes_over_nothing_anew() -> None:
    cell = Cell(by_button=True)
    for lose in (lambda: cell.run(0.5), cell.person.restart):
        assert cell.run(0.1, pressed=True) is Charge.PERSON
        lose()
        assert cell.run(0.5, active=True, pressed=True) is Charge.NOBODY
        assert cell.run(0.1, pressed=False) is Charge.NOBODY


def test_the_policy_does_not_drive_against_a_held_button() -> None:
    cell = Cell(by_button=True)
    assert cell.run(0.1, pressed=True) is Charge.PERSON
    cell.person.forget()  # the next task of a queue begins
    assert cell.run(0.1, pressed=True) is Charge.PERSON
    cell.run(0.5)  # the device is lost
    assert cell.run(0.1, active=True, pressed=True) is Charge.NOBODY
    cell.person.forget()  # an operator's ~/enable
    assert cell.run(0.1, active=True, pressed=True) is Charge.PERSON
    assert cell.run(0.1, active=True, pressed=False) is Charge.POLICY


def test_a_leader_that_is_not_aligned_is_refused() -> None:
    cell = Cell()
    assert cell.run(0.5, active=True, leader=0.25) is Charge.POLICY
    assert cell.person.refused == (
        "the leader's shoulder is 0.25 rad from the arm; at most 0.10 (limits.step): align it"
    )
    assert cell.run(0.1, active=True, leader=0.09) is Charge.PERSON
    assert cell.person.refused == ""


LOSSES: dict[str, Callable[[Cell], object]] = {
    "silent": lambda cell: cell.run(0.5, leader=None),
    "too far": lambda cell: cell.run(0.02, active=True, leader=0.3),
    "not finite": lambda cell: (
        cell.person.refuse("The axes are [nan]; they must be finite."),
        cell.run(0.01, leader=None),
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_device_that_is_lost_never_gives_back_to_the_policy(loss: str) -> None:
    cell = Cell()
    cell.run(0.1, active=True)
    LOSSES[loss](cell)
    assert cell.person.charge is Charge.NOBODY
    assert cell.person.hold is not None
    assert cell.person.hold.code == "intervention"
    assert cell.run(5.0) is Charge.NOBODY  # it sends again, and nobody moves it
    assert cell.run(0.1, active=True) is Charge.PERSON
    LOSSES[loss](cell)
    cell.person.forget()  # an operator enables motion
    assert cell.run(1.0) is Charge.POLICY
    assert cell.person.counts == {"taken": 1, "lost": 2}


def test_a_good_message_does_not_hide_a_bad_one_before_it() -> None:
    cell = Cell()
    cell.run(0.1, active=True)
    cell.person.refuse("The axes are [nan]; they must be finite.")
    assert cell.run(0.01, active=True) is Charge.NOBODY


def followed(
    leader: Sequence[float], *, tolerance: float, last: float | None
) -> list[float | None]:
    """Openings that a person in charge commands with those of the leader's gripper."""
    guide = LeaderGuide(JOINTS, np.ones(2), None, grip_tolerance=tolerance)
    person = Person(guide, Patience(timeout=0.2, release=0.3, by_button=False))
    openings = []
    for index, opening in enumerate(leader):
        now = 1.0 + 0.01 * index
        person.take(Wish(True, joints=np.zeros(2), opening=opening), now)
        person.update(now, np.zeros(2))
        openings.append(person.opening(last))
    return openings


def test_a_leaders_gripper_is_followed_once_it_was_near() -> None:
    openings = followed((0.08, 0.06, 0.035, 0.05), tolerance=0.01, last=0.03)
    assert openings == [None, None, 0.035, 0.05]


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    [(0.01, [None, None, 0.06, 0.08]), (np.inf, [0.08, 0.075, 0.06, 0.08])],
)
def test_where_the_opening_is_unknown_the_person_moves_the_leaders_gripper_first(
    tolerance: float, expected: list[float | None]
) -> None:
    assert followed((0.08, 0.075, 0.06, 0.08), tolerance=tolerance, last=None) == expected


def test_after_the_person_the_first_chunk_is_of_new_images() -> None:
    loop = Loop(camera_rate=5.0, step=0.3)
    loop.run(2.0)
    loop.leader = loop.position.copy()
    loop.hand = True
    loop.run(0.5)
    assert loop.controller.charge is Charge.PERSON
    asked = len(loop.policy.asked)
    loop.hand = False
    while loop.controller.charge is Charge.PERSON:
        loop.run(0.015)
    next_image = loop._next_image
    loop.run(1.0)
    assert loop.controller.machine.state is ControllerState.MOVING
    assert loop.policy.asked[asked][0] >= next_image


def test_nobody_is_in_charge_of_an_arm_that_is_not_commanded() -> None:
    cell = Cell()
    cell.last = None
    assert cell.run(1.0, active=True) is Charge.POLICY


# ---- commands ------------------------------------------------------------------------------------


def test_the_controller_hands_over_without_a_jump() -> None:
    loop = Loop(step=0.3, blend_in=0.3)
    loop.run(2.0)
    assert loop.controller.machine.state is ControllerState.MOVING
    loop.leader = loop.position + 0.2
    loop.hand = True
    begun = loop.now
    loop.run(0.5)
    assert loop.controller.state.mode == "guided"
    np.testing.assert_allclose(loop.position, loop.leader)
    asked = len(loop.policy.asked)
    loop.hand = False
    loop.run(2.0)
    assert loop.controller.machine.state is ControllerState.MOVING
    assert len(loop.policy.asked) > asked
    path = np.diff(loop.path, axis=0)
    assert np.abs(path).max() < 0.05  # 5 rad/s, the limit
    taken = next(
        time for (time, _), step in zip(loop.sent[1:], path, strict=False) if step[0] > 2 * EVEN
    )
    assert taken - begun < 0.05


@pytest.mark.parametrize("fault", ["silent", "far"])
def test_the_controller_holds_when_the_device_is_lost(fault: str) -> None:
    loop = Loop(step=0.3)
    loop.run(2.0)
    loop.leader = loop.position.copy()
    loop.hand = True
    loop.run(0.5)
    loop.leader = None if fault == "silent" else loop.leader + 2.0
    loop.run(1.0)
    assert loop.controller.state.mode == "holding"
    assert loop.controller.state.code == "intervention"
    held = loop.position
    loop.run(3.0)
    np.testing.assert_array_equal(loop.position, held)
    loop.run(3.0)  # longer than `resume_within`
    assert loop.controller.state.mode == "disabled"
    assert loop.controller.enable(loop.now) is None
    loop.hand = False
    loop.run(1.0)
    assert loop.controller.state.mode == "moving"


def test_a_lost_device_and_a_lost_pose_do_not_return_to_the_policy() -> None:
    loop = Loop(step=0.3)
    loop.run(2.0)
    loop.leader = loop.position.copy()
    loop.hand = True
    loop.run(0.5)
    loop.leader = None
    loop.run(0.5)
    assert loop.controller.charge is Charge.NOBODY
    loop.states = False
    loop.run(0.5)
    loop.states = True
    held = loop.position.copy()
    loop.run(2.0)
    assert loop.controller.charge is Charge.NOBODY
    np.testing.assert_array_equal(loop.position, held)


def test_a_person_takes_over_anew_after_the_pose_was_lost() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.leader = loop.position.copy()
    loop.hand = True
    loop.run(0.5)
    loop.states = False
    loop.run(0.5)
    assert loop.controller.state.mode == "holding"
    loop.states = True
    loop.leader = loop.position + 0.1
    begun = len(loop.sent)
    loop.run(1.0)
    assert loop.controller.charge is Charge.PERSON
    assert loop.person.counts["taken"] == 1
    np.testing.assert_allclose(loop.position, loop.leader)
    assert np.abs(np.diff(loop.path[begun:], axis=0)).max() < 0.02


def test_the_person_does_not_need_the_policy_or_images() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.cameras = False
    loop.run(1.0)
    assert loop.controller.state.code == "stale"
    loop.leader = loop.position.copy()
    loop.hand = True
    for _ in range(50):
        loop.leader = loop.leader + 0.01
        loop.run(0.02)
    assert loop.controller.state.mode == "guided"
    np.testing.assert_allclose(loop.position, loop.leader, atol=0.02)
    loop.states = False
    loop.run(0.5)
    assert loop.controller.state.mode == "holding"
