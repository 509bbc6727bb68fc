"""The command stream of an active policy node: its publishers, and the timers that drive and
monitor them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from rclpy.clock import Clock
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.topic_endpoint_info import TopicEndpointInfo
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ceed_vla.ros_nodes.robot.controller import UNNAMED, PolicyController
from ceed_vla.ros_nodes.robot.interfaces.base import Command
from ceed_vla.ros_nodes.robot.messages import COMMAND, clock_time
from ceed_vla.ros_nodes.robot.policy_setup import PolicySetup
from ceed_vla.ros_nodes.robot.safety import Decision

CONFLICT_PERIOD = 0.2  # time between two checks for other commanders [s]
GRIPPER_PERIOD = 0.1  # time after which an unchanged gripper command is repeated [s]


def command_message(
    setup: PolicySetup,
    decision: Decision | None,
    last: Decision | None,
    stamp: Time,
    group: str = "",
) -> Any | None:
    """Return the message to an arm's controller for a decision that follows the `last` one; None to
    send nothing. `group` is the arm, if there are several.
    """
    measured = setup.safety.measured
    if decision is None or decision.positions is None or measured is None:
        return None
    speeds = np.zeros_like(decision.positions)
    if last is not None and last.positions is not None and decision.hold is None:
        limit = setup.safety.limits.max_velocity  # a late command follows by a longer step
        speeds = np.clip((decision.positions - last.positions) / setup.arm.period, -limit, limit)
    part, arm = setup.parts[group]
    command = Command(decision.positions[part], speeds[part], measured[part], stamp)
    return setup.interface.message(command, arm)


class Streaming:
    """Sends the controller's decisions.

    Ticks are timed by the clock `steady`, or by simulated time with use_sim_time. `told` is called
    after every tick. A dry run sends nothing to the arm: ``~/preview_command`` has the commands
    instead, and ``~/planned`` the rest of every chunk that takes over. ``~/commanded`` has every
    command that is sent, for recordings.
    """

    def __init__(
        self, node: Node, setup: PolicySetup, steady: Clock, told: Callable[[], None]
    ) -> None:
        self._node = node
        self._setup = setup
        self._told = told
        self._dry = node.get_parameter("dry_run").value
        self._simulated = node.get_parameter("use_sim_time").value
        interface = setup.interface
        gripper = setup.robot.gripper
        # by group of joints, "" without groups
        self._commands = {
            group: node.create_publisher(
                interface.message_class, self._topic(group, topic), COMMAND
            )
            for group, topic in interface.topics.items()
        }
        self._publishers = list(self._commands.values())
        self._planned = None
        self._shown = 0  # the last chunk on ~/planned
        if self._dry:
            self._planned = node.create_publisher(JointTrajectory, "~/planned", COMMAND)
            self._publishers.append(self._planned)
        elif gripper is not None:
            self._publishers.append(
                node.create_publisher(Float64MultiArray, gripper.topic, COMMAND)
            )
        self._commanded = node.create_publisher(JointState, "~/commanded", COMMAND)
        self._gripped: tuple[float, float] | None = None  # last opening [m], and when [s]
        self._ticked = time.monotonic()  # time of the last tick [s]
        self._last: Decision | None = None
        clock = node.get_clock() if self._simulated else steady
        self._paced = time.monotonic(), self.now()  # time of the last check for other commanders
        self._ticks = node.create_timer(setup.arm.period, self._tick, clock=clock)
        self._looks = node.create_timer(CONFLICT_PERIOD, self._look_for_others, clock=steady)
        self._note_others()  # before motion can be allowed

    def _topic(self, group: str, topic: str) -> str:
        """Topic of the commands of a group, whose controller has `topic`."""
        if not self._dry:
            return topic
        return f"~/preview_command_{group}" if group else "~/preview_command"

    def now(self) -> float:
        """Time of the step grid [s]: steady, or the simulation's."""
        return clock_time(self._node) if self._simulated else time.monotonic()

    def end(self) -> None:
        """Repeat the pose once more and stop."""
        self._node.destroy_timer(self._ticks)
        self._node.destroy_timer(self._looks)
        stamp = self._node.get_clock().now()
        self._send(self._setup.controller.end(1e-9 * stamp.nanoseconds), stamp.to_msg())
        for publisher in (*self._publishers, self._commanded):
            self._node.destroy_publisher(publisher)

    def _tick(self) -> None:
        controller = self._setup.controller
        self._ticked = time.monotonic()
        stamp = self._node.get_clock().now()  # of what is sent: its moment bounded the motion
        decision = controller.tick(self.now(), 1e-9 * stamp.nanoseconds)
        self._send(decision, stamp.to_msg())
        controller.after_tick(self.now())
        period = round(1e9 * controller.grid.period)
        if period != self._ticks.timer_period_ns:
            self._ticks.timer_period_ns = period
        self._show_chunk(controller)
        self._told()

    def _show_chunk(self, controller: PolicyController) -> None:
        """In a dry run, publish the motion of arm and gripper that a new chunk would command."""
        chunk, _ = controller.stream.upcoming
        if chunk in (0, self._shown) or self._planned is None or controller.stream.partial:
            return
        self._shown = chunk
        dt = controller.grid.action_dt
        message = JointTrajectory(joint_names=[*self._setup.arm.joints, "gripper"])
        message.header.stamp = self._node.get_clock().now().to_msg()
        for index, (joints, opening) in enumerate(controller.planned()):
            time_from_start = Duration(nanoseconds=round(1e9 * dt * (index + 1))).to_msg()
            positions = [*joints.tolist(), math.nan if opening is None else opening]
            message.points.append(
                JointTrajectoryPoint(positions=positions, time_from_start=time_from_start)
            )
        self._planned.publish(message)

    def _send(self, decision: Decision | None, stamp: Time) -> None:
        sent = False
        for group, publisher in self._commands.items():
            message = command_message(self._setup, decision, self._last, stamp, group)
            if message is not None:
                publisher.publish(message)
                sent = True
        self._last = decision
        if sent and decision is not None and not self._dry:
            self._tell(decision, stamp)
            if decision.gripper is not None:
                self._grip(decision.gripper, self.now())

    def _tell(self, decision: Decision, stamp: Time) -> None:
        """Publish what is commanded: arm joints [rad], and the gripper's opening [m] if there is
        one; the frame says by whom.
        """
        assert decision.positions is not None
        names = list(self._setup.arm.joints)
        positions = decision.positions.tolist()
        if decision.gripper is not None:
            names.append("gripper")
            positions.append(decision.gripper)
        message = JointState(name=names, position=positions)
        message.header.stamp = stamp
        charge = self._setup.controller.charge
        message.header.frame_id = str(charge) if decision.hold is None else "hold"
        self._commanded.publish(message)

    def _grip(self, opening: float, now: float) -> None:
        """Send the gripper's opening [m], unless it was sent just before."""
        last, at = self._gripped or (None, now)
        if last != opening or not 0.0 <= now - at < GRIPPER_PERIOD:
            gripper = self._setup.robot.gripper
            assert gripper is not None
            self._publishers[-1].publish(Float64MultiArray(data=[gripper.told(opening)]))
            self._gripped = opening, now

    def _look_for_others(self) -> None:
        """Check for other commanders, with which the arm would move to and fro; if there are any,
        nothing is sent. Also measure the pace of simulated time.
        """
        self._measure_pace()
        self._note_others()
        if self._simulated:
            self._setup.controller.watch_ticks(time.monotonic() - self._ticked)
        self._told()  # no tick may follow

    def _note_others(self) -> None:
        self._setup.controller.note_conflict(self._other_commanders() or self._other_drivers())

    def _measure_pace(self) -> None:
        """Measure the number of real seconds per second of the step grid."""
        wall_before, before = self._paced
        wall = time.monotonic()
        now = self.now()
        self._paced = wall, now
        passed = now - before
        if self._simulated and before > 0.0 and 0.02 < passed < 20.0:
            self._setup.controller.stream.pace = (wall - wall_before) / passed

    def _other_commanders(self) -> str | None:
        """Return which other nodes publish on a command topic of this node."""
        topics = [publisher.topic_name for publisher in self._publishers]
        crowded = [topic for topic in topics if self._node.count_publishers(topic) > 1]
        if not crowded:
            return None
        own = self._node.get_fully_qualified_name()
        nodes = {name for topic in crowded for name in self._publishers_of(topic)} - {own}
        others = ", ".join(sorted(nodes)) or f"a second {own}"
        return f"{others} publishes on {', '.join(crowded)} too; end one of them"

    def _other_drivers(self) -> str | None:
        """Return which joints have several publishers, and which nodes these may be."""
        for name in self._setup.robot.joint_topics:
            topic = self._node.resolve_topic_name(name)
            if self._node.count_publishers(topic) < 2:  # a tenth of the time to read their names
                continue
            nodes = self._publishers_of(topic)
            shared = self._setup.sources.shared(len(nodes), time.monotonic(), name)
            if shared:
                return (
                    f"{len(nodes)} publishers of {topic} send {', '.join(shared)}: the candidates "
                    f"are {', '.join(sorted(set(nodes)))}; end one of them"
                )
        return None

    def _publishers_of(self, topic: str) -> list[str]:
        """Return the full names of the nodes that publish on a topic, one per publisher."""
        return [_name_of(one) for one in self._node.get_publishers_info_by_topic(topic)]


def _name_of(endpoint: TopicEndpointInfo) -> str:
    """Return the full name of a publisher's node, or `UNNAMED`."""
    if endpoint.node_name == "_NODE_NAME_UNKNOWN_":  # of rmw_dds_common
        return UNNAMED
    return f"{endpoint.node_namespace.rstrip('/')}/{endpoint.node_name}"
