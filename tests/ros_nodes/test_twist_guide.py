"""A person's twists through the safety filter, whose acceleration is limited."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ceed_vla.kinematics import Array, matrix_rpy
from ceed_vla.ros_nodes.robot.arm_model import arm_model
from ceed_vla.ros_nodes.robot.controller_guides import Guides
from ceed_vla.ros_nodes.robot.intervention.base import Wish
from ceed_vla.ros_nodes.robot.intervention.patience import Patience
from ceed_vla.ros_nodes.robot.intervention.person import Person
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_setup import make_person, safety_limits
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.ros_nodes.robot.safety import JOINT_STATES, SafetyFilter

TABLETOP = load_robot_config()
MODEL = arm_model(TABLETOP)
DT = 0.01  # [s]
AGES = {JOINT_STATES: 0.0}


class Bench:
    """The tabletop arm, which goes where it is commanded, and a person with a gamepad."""

    def __init__(self, acceleration: float | None) -> None:
        limits = safety_limits(
            TABLETOP,
            TABLETOP.interfaces["forward_position"],
            MODEL,
            (),
            defaults(POLICY_PARAMETERS),
        )
        joints = len(TABLETOP.arm.joints)
        most = None if acceleration is None else np.full(joints, acceleration)
        self.limits = replace(limits, max_acceleration=most)
        self.safety = SafetyFilter(self.limits)
        self.now = 10.0
        self.joints = np.array(TABLETOP.arm.home)
        for _ in range(40):
            self._measure()
        assert self.safety.enable(0.0) is None
        self.safety.command(self.joints, dt=DT, ages=AGES)
        pad = type("Pad", (), {"moves_tcp": True})()
        robot = replace(
            TABLETOP,
            intervention=type("Intervention", (), {"device": pad, "patience": PATIENCE})(),
        )
        person = make_person(robot, MODEL, self.limits)
        assert isinstance(person, Person)
        self.person = person
        self.guides = Guides(self.safety, person)

    def _measure(self) -> None:
        self.now += DT
        self.safety.measure(TABLETOP.arm.joints, self.joints, self.now)

    def move(self, twist: list[float], seconds: float) -> None:
        for _ in range(round(seconds / DT)):
            self.person.take(Wish(True, twist=np.array(twist)), self.now)
            self.guides.update(self.now)
            decision = self.guides.command(DT, AGES, None)
            assert decision.hold is None, decision.hold
            assert decision.positions is not None
            self.joints = decision.positions
            self._measure()

    @property
    def pose(self) -> tuple[Array, Array]:
        assert MODEL is not None
        return MODEL.pose(self.joints)


PATIENCE = Patience(timeout=0.25, release=0.5, by_button=False)


@pytest.mark.parametrize("acceleration", [None, 2.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_tool_moves_straight_and_as_fast_as_asked(
    acceleration: float | None, axis: int
) -> None:
    bench = Bench(acceleration)
    twist = [0.0] * 6
    twist[axis] = 0.1 if axis < 2 else -0.1
    begin, turned = bench.pose
    bench.move(twist, 1.5)
    end, after = bench.pose
    np.testing.assert_allclose(end - begin, 1.5 * np.array(twist[:3]), atol=0.003)
    np.testing.assert_allclose(matrix_rpy(after @ turned.T), 0.0, atol=0.01)


def test_the_arm_brakes_before_the_edge_of_the_workspace_and_turns_back() -> None:
    bench = Bench(2.0)
    assert TABLETOP.action.pose is not None
    edge = TABLETOP.action.pose.workspace_high[1]
    bench.move([0.0, 0.25, 0.0, 0.0, 0.0, 0.0], 4.0)
    assert edge - 0.002 < bench.pose[0][1] < edge + 0.005
    begin = bench.pose[0]
    bench.move([0.0, -0.25, 0.0, 0.0, 0.0, 0.0], 1.0)
    np.testing.assert_allclose(bench.pose[0] - begin, [0.0, -0.25, 0.0], atol=0.02)


def test_an_arm_that_braked_moves_on_from_where_it_stopped() -> None:
    bench = Bench(2.0)
    bench.move([0.0, 0.2, 0.0, 0.0, 0.0, 0.0], 1.0)
    bench.move([0.0] * 6, 0.4)
    stopped = bench.pose[0]
    for _ in range(20):
        before = bench.pose[0][1]
        bench.move([0.0, 0.2, 0.0, 0.0, 0.0, 0.0], DT)
        assert bench.pose[0][1] >= before - 1e-6
    np.testing.assert_allclose(bench.pose[0][[0, 2]], stopped[[0, 2]], atol=0.003)
