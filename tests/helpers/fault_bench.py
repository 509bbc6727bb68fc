"""A simulated robot and a policy node, with a relay between them that can corrupt messages."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger

from ceed_vla.ros_nodes.robot.messages import LATCHED, SENSOR
from tests.ros_nodes.conftest import Graph, Status

COMMANDS = "/forward_position_controller/commands"
AT_REST = 0.05  # [rad/s]
_QUEUED = 1000  # commands; this process may be slow, and lost ones would look like a leap
RELAYED = ("-r", "front/image_raw:=/relay/front", "-r", "joint_states:=/relay/joint_states")


class Bench:
    """A simulated robot and a policy node, with this process between them.

    Attributes:
        graph: The processes.
        status: Diagnostics of the policy node.
        states: Joint states as the robot sent them.
        commands: Commands that reached the robot, each with its time [s].
        image: Function applied to front images; it returns None to drop one.
        joints: Function applied to joint states.
    """

    def __init__(self, graph: Graph, *policy: str) -> None:
        self.graph = graph
        self.status = Status(graph)
        self.states: list[JointState] = []
        self.commands: list[tuple[float, np.ndarray]] = []
        self.repair()
        node = graph.node
        self._front = node.create_publisher(Image, "/relay/front", SENSOR)
        self._joints = node.create_publisher(JointState, "/relay/joint_states", SENSOR)
        self.instruction = node.create_publisher(String, "/policy/instruction", LATCHED)
        node.create_subscription(Image, "/front/image_raw", self._pass_image, SENSOR)
        node.create_subscription(JointState, "/joint_states", self._pass_joints, SENSOR)
        node.create_subscription(Float64MultiArray, COMMANDS, self._on_command, _QUEUED)
        graph.start("sim_node", "-p", "publish_instruction:=false")
        # On a busy machine a fault may last long; another test covers its consequences.
        own = ("-p", "autostart:=true", "-p", "start_enabled:=false", "-p", "resume_within:=60.0")
        graph.start("policy_node", *RELAYED, *own, *policy)

    def repair(self) -> None:
        """Relay all messages unchanged."""
        self.image: Callable[[Image], Image | None] = lambda message: message
        self.joints: Callable[[JointState], JointState | None] = lambda message: message

    def begin(self, seed: int) -> None:
        """Start a new scene, with the policy driving."""
        self.repair()
        self.graph.call("/policy/enable", SetBool, SetBool.Request(data=False))
        self.graph.set_parameters("/sim", seed=seed, task="cube_in_bin")
        told = self.graph.call("/sim/reset_episode", Trigger).message
        self.instruction.publish(String(data=told))
        self.graph.spin(0.3)
        self.graph.call("/policy/reset", Trigger)  # the arm has jumped to another pose
        self.enable()
        self.graph.wait(self.moves, "the arm to move")

    def enable(self) -> None:
        """Enable motion as soon as the pose is accepted; this process, the relay, may be slow."""
        answer = self.graph.call("/policy/enable", SetBool, SetBool.Request(data=True))
        for _ in range(20):
            if not answer.message.startswith(("stale", "unsettled_pose")):
                break
            self.graph.spin(0.2)
            answer = self.graph.call("/policy/enable", SetBool, SetBool.Request(data=True))
        assert answer.success, answer.message

    def moves(self) -> bool:
        """Whether the arm moves now."""
        return bool(self.states) and float(np.abs(self.states[-1].velocity[:7]).max()) > 2 * AT_REST

    def check_rest(self) -> None:
        """Assert that the arm comes to rest within a second, and stays at rest."""
        self.graph.spin(0.7)
        first = len(self.states)
        self.graph.spin(0.3)
        calm = self.states[first:]
        assert calm
        assert max(float(np.abs(state.velocity[:7]).max()) for state in calm) < AT_REST
        np.testing.assert_allclose(calm[-1].position[:7], calm[0].position[:7], atol=2e-3)

    def check_goes_on(self, since: int | None = None) -> None:
        """Assert that the arm moves again, and that commands from number `since` on do not jump."""
        self.status.state("moving")
        self.graph.wait(self.moves, "the arm to move again", timeout=10.0)
        for (_, before), (_, after) in itertools.pairwise(
            self.commands[since:] if since is not None else ()
        ):
            assert np.abs(after - before).max() < 0.25  # 3.5 rad/s for at most 50 ms, with a margin

    def _pass_image(self, message: Image) -> None:
        changed = self.image(message)
        if changed is not None:
            self._front.publish(changed)

    def _pass_joints(self, message: JointState) -> None:
        self.states.append(message)
        changed = self.joints(
            JointState(
                header=message.header,
                name=list(message.name),
                position=list(message.position),
                velocity=list(message.velocity),
            )
        )
        if changed is not None:
            self._joints.publish(changed)

    def _on_command(self, message: Float64MultiArray) -> None:
        self.commands.append((time.monotonic(), np.array(message.data)))


def lost(message: object) -> None:
    """Drop a message."""
    return None
