"""Fixtures: a ROS graph for each test with real node processes on loopback and a test node, and a
tiny checkpoint.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTLE = 0.2  # until a server has discovered both halves of a new client [s]
_serial = itertools.count()


class Graph:
    """Processes and one test node in a ROS domain of their own.

    Attributes:
        domain: ROS domain of this test.
        node: The test's node; its callbacks run in `wait` and `spin`.
    """

    def __init__(self, folder: Path) -> None:
        rclpy = pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")
        from rclpy.context import Context
        from rclpy.executors import SingleThreadedExecutor

        self.domain = 10 + (7 * os.getpid() + next(_serial)) % 90
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._rclpy, self._context = rclpy, Context()
        rclpy.init(args=[], context=self._context, domain_id=self.domain)
        self.node = rclpy.create_node("test", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start policy_node or sim_node (a digit starts another one) with ``--ros-args``; its
        output goes to a file.
        """
        environment = os.environ | {
            "ROS_DOMAIN_ID": str(self.domain),
            "ROS_LOG_DIR": str(self.folder / "log"),
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(ROOT), str(self.folder), os.environ.get("PYTHONPATH")))
            ),
        }
        modules = {
            "p": "robot.policy_node",
            "r": "record.record_node",
            "s": "simulated.sim_node",
        }
        module = modules[name[0]]
        with (self.folder / f"{name}.txt").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"ceed_vla.ros_nodes.{module}", "--ros-args", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self.processes[name]

    def output(self, name: str) -> str:
        """Return what a process has printed so far."""
        return (self.folder / f"{name}.txt").read_text(errors="replace")

    def listen(self, topic: str, message_type: Any, qos: Any = 10) -> list[Any]:
        """Return a list that grows with the messages of a topic."""
        messages: list[Any] = []
        self.node.create_subscription(message_type, topic, messages.append, qos)
        return messages

    def spin(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Handle messages for a time [s], or until a condition holds."""
        end = time.monotonic() + seconds
        while not until() and (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def wait(
        self,
        until: Callable[[], Any],
        what: str,
        timeout: float = 30.0,
        heard: Callable[[], list[str]] = list,
    ) -> Any:
        """Handle messages until `until()` is true, and return it; fail with all output after
        `timeout` [s].

        The failure shows the first and the last five different lines of `heard`.
        """
        end = time.monotonic() + timeout
        while not (result := until()):
            if time.monotonic() > end:
                said = "\n".join(
                    f"--- {name}\n{self.output(name)[-3000:]}" for name in self.processes
                )
                lines = list(dict.fromkeys(heard()))
                lines = lines if len(lines) < 10 else [*lines[:5], "...", *lines[-5:]]
                pytest.fail("\n".join((f"waited {timeout:.0f} s for {what}", said, *lines)))
            self._executor.spin_once(timeout_sec=0.05)
        return result

    def call(
        self, service: str, service_type: Any, request: Any = None, timeout: float = 20.0
    ) -> Any:
        """Call a service and return its response; a question is asked again after 3 s.

        A server that has not discovered a new client's reader answers it in vain
        (ros2/rmw_fastrtps, issue 842); `settle` makes that rare.
        """
        client = self.node.create_client(service_type, service)
        try:
            self.wait(client.service_is_ready, f"the service {service}", timeout)
            self.spin(SETTLE)
            request = request or service_type.Request()
            future = client.call_async(request)
            if service_type.__name__.startswith("Get"):
                self.spin(3.0, future.done)
                future = future if future.done() else client.call_async(request)
            self.wait(future.done, f"an answer of {service}", timeout)
            return future.result()
        finally:
            self.node.destroy_client(client)

    def set_parameters(self, node: str, **values: Any) -> Any:
        """Set parameters of another node; return the results."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        parameters = [
            Parameter(name, value=value).to_parameter_msg() for name, value in values.items()
        ]
        request = SetParameters.Request(parameters=parameters)
        return self.call(f"{node}/set_parameters", SetParameters, request).results

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM, timeout: float = 15.0) -> int:
        """Send a signal to a process and return its exit code."""
        process = self.processes[name]
        process.send_signal(how)
        return process.wait(timeout)

    def close(self) -> None:
        """End all processes."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._executor.shutdown()
        self.node.destroy_node()
        self._rclpy.try_shutdown(context=self._context)


class Status:
    """The newest diagnostics of the policy node."""

    def __init__(self, graph: Any) -> None:
        from diagnostic_msgs.msg import DiagnosticArray

        self._graph = graph
        self._messages = graph.listen("/diagnostics", DiagnosticArray)

    def wait(
        self, fits: Callable[[str, dict[str, str]], bool], what: str, timeout: float = 120.0
    ) -> dict[str, str]:
        """Return the values of the first status from now on with ``fits(message, values)``."""
        start = len(self._messages)

        def look() -> dict[str, str] | None:
            for array in self._messages[start:]:
                for status in array.status:
                    values = {pair.key: pair.value for pair in status.values}
                    if fits(status.message, values):
                        return {**values, "message": status.message}
            return None

        found = self._graph.wait(
            look,
            what,
            timeout,
            lambda: [one.message for array in self._messages[start:] for one in array.status],
        )
        assert isinstance(found, dict)
        return found

    def state(self, state: str, *contains: str) -> dict[str, str]:
        """Wait until the node reports a state, with these texts in its message."""
        return self.wait(
            lambda message, values: (
                values.get("state") == state and all(text in message for text in contains)
            ),
            f"the state {state} {contains}",
        )


def tiny_act(folder: Path, joints: int, spread: float) -> tuple[Any, Any, Any]:
    """Write an ACT checkpoint with random weights, in the form that lerobot-train writes: chunks of
    6 steps, 4 executed.

    Args:
        folder: Folder of the checkpoint.
        joints: Length of state and action.
        spread: Standard deviation of both.

    Returns:
        Policy, preprocessor and postprocessor.
    """
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    camera, state = "observation.images.top", "observation.state"
    config = ACTConfig(
        input_features={
            camera: PolicyFeature(type=FeatureType.VISUAL, shape=(3, 64, 64)),
            state: PolicyFeature(type=FeatureType.STATE, shape=(joints,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(joints,))},
        device="cpu",
        chunk_size=6,
        n_action_steps=4,
        dim_model=32,
        n_heads=2,
        dim_feedforward=32,
        n_encoder_layers=1,
        use_vae=False,
        pretrained_backbone_weights=None,
    )
    stats = {
        key: {"mean": torch.full(shape, 0.5), "std": torch.full(shape, spread)}
        for key, shape in ((state, (joints,)), ("action", (joints,)), (camera, (3, 1, 1)))
    }
    policy = ACTPolicy(config).eval()
    pre, post = make_pre_post_processors(config, dataset_stats=stats)
    for part in (policy, pre, post):
        part.save_pretrained(folder)
    return policy, pre, post


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    """A `Graph`; its processes end with the test."""
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    made = Graph(tmp_path)
    yield made
    made.close()
