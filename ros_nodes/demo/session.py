"""Simulated robot and policy node as two processes, driven only through topics and services."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger

from ceed_vla.errors import NodeError
from ceed_vla.ros_nodes.demo.bag import BagWriter, record
from ceed_vla.ros_nodes.demo.report import status_values
from ceed_vla.ros_nodes.robot.interfaces.base import ActionInterface
from ceed_vla.ros_nodes.robot.messages import COMMAND, LATCHED

# Until both nodes answer, which includes loading the policy, and exporting it the first time [s].
START_TIMEOUT = 300.0
CALL_TIMEOUT = 10.0  # of a service call [s]
DISCOVERY = 0.2  # from a ready service until its server has discovered this client's reader [s]
SETTLE = 0.3  # after a new episode, until the policy node has received the arm's pose [s]
_QUEUED = 1000  # messages that a slow recorder may lag behind


class Session:
    """Two node processes in a ROS domain of their own, and a bag of their messages.

    They stay on this machine unless the environment sets another discovery range. `NodeError`: Any
    method may raise it.

    Args:
        folder: Folder for their output ("sim.log", "policy.log") and "bag.mcap".
        interface: Action interface of the policy node, whose commands are recorded.
        policy_arguments: Further ``--ros-args`` of the policy node.
        sim_arguments: Further ``--ros-args`` of the simulated robot.
        bag: Whether their messages are recorded in a bag.
    """

    def __init__(
        self,
        folder: Path,
        domain: int,
        interface: ActionInterface,
        policy_arguments: list[str],
        sim_arguments: list[str],
        *,
        bag: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # rclpy.init reads this, here and in the child processes
        os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        self.policy: dict[str, str] = {}  # newest diagnostics of the policy node
        self.speed = 0.0  # of the fastest joint [rad/s]
        self.heard = 0  # stamp of the newest joint state [ns]; a busy recorder lags behind
        self.solved = False  # whether the simulation has reported success since the last reset
        self._folder, self._domain = folder, domain
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._clients: dict[str, Any] = {}  # of services, by name
        self._context = Context()
        rclpy.init(args=[], context=self._context, domain_id=domain)
        self.node = rclpy.create_node("demo", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.bag = BagWriter(folder / "bag.mcap")
        self._subscribe(interface, bag=bag)
        self.start("sim", "ceed_vla.ros_nodes.simulated.sim_node", sim_arguments)
        arguments = ["-p", "autostart:=true", "-p", "start_enabled:=false", *policy_arguments]
        self.start("policy", "ceed_vla.ros_nodes.robot.policy_node", arguments)

    def _subscribe(self, interface: ActionInterface, *, bag: bool) -> None:
        sensor = QoSProfile(depth=_QUEUED, reliability=ReliabilityPolicy.BEST_EFFORT)
        command = QoSProfile(depth=_QUEUED)
        topics = {
            "/front/image_raw": (Image, sensor),
            "/wrist/image_raw": (Image, sensor),
            "/joint_states": (JointState, command),
            "/gripper_controller/commands": (Float64MultiArray, command),
            "/policy/instruction": (String, LATCHED),
            "/sim/success": (Bool, LATCHED),
            "/diagnostics": (DiagnosticArray, command),
            f"/{interface.topic}": (interface.message_class, command),
        }
        for name, (kind, qos) in topics.items() if bag else ():
            record(self.node, self.bag, name, kind, qos)
        self.node.create_subscription(Bool, "/sim/success", self._on_success, LATCHED)
        self.node.create_subscription(JointState, "/joint_states", self._on_joint_states, COMMAND)
        self.node.create_subscription(
            DiagnosticArray, "/diagnostics", self._on_diagnostics, COMMAND
        )

    def _on_success(self, message: Bool) -> None:
        self.solved = message.data  # true once; false again with every reset

    def _on_joint_states(self, message: JointState) -> None:
        self.speed = max(map(abs, message.velocity), default=0.0)
        self.heard = 10**9 * message.header.stamp.sec + message.header.stamp.nanosec

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.policy = status_values(message, "action_interface") or self.policy

    def start(self, name: str, module: str, arguments: list[str]) -> None:
        """Start another node, which ends with the others."""
        with (self._folder / f"{name}.log").open("wb") as output:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, "--ros-args", *arguments],
                env=os.environ | {"ROS_DOMAIN_ID": str(self._domain)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches only this process, which ends the children in order
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return when both nodes answer and the policy is loaded."""
        begun = (None, "unconfigured", "inactive")  # a node that cannot start exits
        self._wait(lambda: self.policy.get("state") not in begun, "policy", START_TIMEOUT)

    def enable(self, on: bool) -> None:
        """Enable the policy's motion, or disable it."""
        end = time.monotonic() + CALL_TIMEOUT
        request = SetBool.Request(data=on)
        response = self.call("/policy/enable", SetBool, request)
        # transient: on a busy machine, after a new episode, before the first joint state
        passing = ("stale", "unsettled_pose", "no_joint_states")
        while response.message.startswith(passing) and time.monotonic() < end:
            self.spin(0.1)
            response = self.call("/policy/enable", SetBool, request)
        if not response.success:
            raise NodeError(
                f"The policy node does not {'enable' if on else 'disable'}: {response.message}"
            )

    def reset_episode(self, seed: int, task: str) -> str:
        """Draw a scene in the simulation and accept the arm's new pose; return the instruction."""
        parameters = [Parameter("seed", value=seed), Parameter("task", value=task)]
        request = SetParameters.Request(
            parameters=[parameter.to_parameter_msg() for parameter in parameters]
        )
        for result in self.call("/sim/set_parameters", SetParameters, request).results:
            if not result.successful:
                raise NodeError(f"The simulation refuses the episode: {result.reason}")
        self.solved = False
        response = self.call("/sim/reset_episode", Trigger, Trigger.Request())
        if not response.success:
            raise NodeError(f"The simulation does not reset: {response.message}")
        # The arm jumps to its new pose, which the policy node accepts only from an operator.
        self.spin(SETTLE)
        self.call("/policy/reset", Trigger, Trigger.Request())
        return str(response.message)

    def spin(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Record for a time [s] or until a condition holds; return whether it holds."""
        end = time.monotonic() + seconds
        while not (reached := until()) and (left := end - time.monotonic()) > 0.0:
            for name, process in self._processes.items():
                if process.poll() is not None:
                    last = self._last_words(name)
                    raise NodeError(f"The {name} node ended with code {process.returncode}. {last}")
            self._executor.spin_once(timeout_sec=min(left, 0.2))
        return reached

    def kill_policy(self) -> int:
        """Kill the policy node (SIGKILL); return the time [ns since the epoch]."""
        process = self._processes.pop("policy")
        moment = time.time_ns()
        process.kill()
        process.wait()
        self._clients.clear()  # a node that takes its place has to discover new ones
        return moment

    def close(self) -> None:
        """End both nodes, then the bag. May be called twice."""
        try:
            # the policy node first, so that the arm comes to rest
            for process in reversed(self._processes.values()):
                process.terminate()  # no effect on a process that has ended
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5.0)
        finally:  # also after a second interrupt
            for process in self._processes.values():
                process.kill()
                process.wait()
        self.bag.close()
        if self._context.ok():
            self._executor.shutdown()
            self.node.destroy_node()
            rclpy.try_shutdown(context=self._context)

    def call(self, service: str, kind: Any, request: Any) -> Any:
        """Call a service, and return its response.

        A new client waits a moment: a server that has not discovered its reader yet would answer
        in vain (ros2/rmw_fastrtps, issue 842).
        """
        client = self._clients.get(service)
        if client is None:
            client = self._clients[service] = self.node.create_client(kind, service)
            self._wait(client.service_is_ready, f"service {service}", CALL_TIMEOUT)
            self.spin(DISCOVERY)
        self._wait(client.service_is_ready, f"service {service}", CALL_TIMEOUT)
        future = client.call_async(request)
        self._wait(future.done, f"answer of {service}", CALL_TIMEOUT)
        return future.result()

    def _wait(self, until: Callable[[], bool], what: str, timeout: float) -> None:
        if not self.spin(timeout, until):
            raise NodeError(f"No {what} after {timeout:.0f} s. {self._last_words('sim', 'policy')}")

    def _last_words(self, *names: str) -> str:
        """Return the last line that each node printed, and the file with the rest."""
        lines = []
        for name in names:
            path = self._folder / f"{name}.log"
            text = path.read_text(errors="replace").strip().splitlines()
            lines.append(f"{path}: {text[-1] if text else '(empty)'}")
        return "Last lines: " + "; ".join(lines)
