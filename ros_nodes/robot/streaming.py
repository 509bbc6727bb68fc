"""The command stream of an active policy node: publishers, and the timers that feed and watch them."""

from __future__ import annotations

import time

import numpy as np
from rclpy.clock import Clock
from rclpy.node import Node
from std_msgs.msg import Float64MultiArray

from ros_nodes.robot.interfaces.base import Command, CommandedArm
from ros_nodes.robot.messages import COMMAND, clock_time
from ros_nodes.robot.policy_setup import PolicySetup
from ros_nodes.robot.safety import Decision

CONFLICT_PERIOD = 0.2  # how often other commanders are looked for [s]
GRIPPER_PERIOD = 0.1  # an unchanged gripper command is repeated this often [s]


class Streaming:
    """Sends what the controller decides; `steady` is the clock of the timers, unless the time is a simulation's."""

    def __init__(self, node: Node, setup: PolicySetup, steady: Clock) -> None:
        self._node, self._setup = node, setup
        self._simulated = node.get_parameter("use_sim_time").value
        self._period = 1.0 / node.get_parameter("command_rate").value
        limits = setup.safety.limits
        self._arm = CommandedArm(
            limits.joint_names, self._period, limits.position_low, limits.position_high, setup.model
        )
        interface, gripper = setup.interface, setup.robot.gripper
        self._commands = node.create_publisher(interface.message_type, interface.topic, COMMAND)
        self._publishers = [self._commands]
        if gripper is not None:
            self._publishers.append(node.create_publisher(Float64MultiArray, gripper.topic, COMMAND))
        self._gripped: tuple[float, float] | None = None  # last opening [m], and when [s]
        self._last: Decision | None = None
        clock = node.get_clock() if self._simulated else steady
        self._ticks = node.create_timer(self._period, self._tick, clock=clock)
        self._looks = node.create_timer(CONFLICT_PERIOD, self._look_for_others, clock=steady)

    def now(self) -> float:
        """Time of the step grid [s]: steady, or the simulation's."""
        return clock_time(self._node) if self._simulated else time.monotonic()

    def end(self) -> None:
        """Hold once more and stop."""
        self._node.destroy_timer(self._ticks)
        self._node.destroy_timer(self._looks)
        self._setup.controller.disable()
        self._send()
        for publisher in self._publishers:
            self._node.destroy_publisher(publisher)

    def _tick(self) -> None:
        self._send()
        controller = self._setup.controller
        controller.after_tick(self.now())
        period = round(1e9 * controller.grid.period)
        if period != self._ticks.timer_period_ns:
            self._ticks.timer_period_ns = period

    def _send(self) -> None:
        now = self.now()
        decision = self._setup.controller.tick(now, clock_time(self._node))
        measured = self._setup.safety.measured
        last, self._last = self._last, decision
        if decision is None or decision.positions is None or measured is None:
            return
        velocities = 0.0 * decision.positions
        if last is not None and last.positions is not None and decision.hold is None:
            limit = self._setup.safety.limits.max_velocity  # a late command catches up by a longer step
            velocities = np.clip((decision.positions - last.positions) / self._period, -limit, limit)
        command = Command(decision.positions, velocities, measured, self._node.get_clock().now().to_msg())
        self._commands.publish(self._setup.interface.message(command, self._arm))
        if decision.gripper is not None:
            self._grip(decision.gripper, now)

    def _grip(self, opening: float, now: float) -> None:
        """Send the gripper's opening [m], unless it was sent just before."""
        last, at = self._gripped or (None, now)
        if last != opening or not 0.0 <= now - at < GRIPPER_PERIOD:
            self._publishers[-1].publish(Float64MultiArray(data=[opening]))
            self._gripped = opening, now

    def _look_for_others(self) -> None:
        """Two commanders would pull the arm to and fro: then nothing is sent."""
        topics = [publisher.topic_name for publisher in self._publishers]
        crowded = [topic for topic in topics if self._node.count_publishers(topic) > 1]
        self._setup.controller.conflict = (
            f"another node publishes on {', '.join(crowded)} too; end one of them" if crowded else None
        )
