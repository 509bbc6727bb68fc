"""A policy node whose policy runs on a server: every fault of server and network is a named hold,
the arm comes to rest without a leap, and motion resumes by itself.

With ``-s`` every fault prints a row of the table in docs/reports/remote-inference.md.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from std_msgs.msg import String

from ceed_vla.ros_nodes.robot.messages import LATCHED
from tests.ceed_vla.serving.conftest import Served, start
from tests.helpers.fault_bench import Bench
from tests.helpers.message_proxy import (
    CUT,
    DELAY,
    DOUBLE,
    DROP,
    NONE,
    STALL,
    STRANGE,
    SWAP,
    MessageProxy,
    proxied,
)
from tests.helpers.serving_calls import http
from tests.ros_nodes.conftest import Graph

# minutes in real time, with both cores
pytestmark = [pytest.mark.slow, pytest.mark.timed, pytest.mark.realtime]
LEAP = 0.25  # 3.5 rad/s for at most 50 ms, with a margin [rad]


@dataclass
class Remote:
    """A node, a proxy and a server."""

    bench: Bench
    proxy: MessageProxy
    server: Served
    folder: Path
    states: list[String]  # of the node, as they change
    starts: int = 0

    def reaches(self, *texts: str) -> float:
        """Wait until a state has these texts; return the time that this took [s]."""
        began, first = time.monotonic(), len(self.states)
        self.bench.graph.wait(
            lambda: any(all(t in one.data for t in texts) for one in self.states[first:]),
            f"the state {texts}",
            timeout=90.0,
        )
        return time.monotonic() - began

    def restart(self, policy: str = "student") -> None:
        """Kill the server, and start one at the same port."""
        self.kill()
        self.starts += 1
        log = self.folder / f"server{self.starts}.txt"
        self.server = start("--engine=eager", log=log, policy=policy, port=self.server.port)

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """The node starts before its server."""
    folder = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch, proxied("") as (proxy, url):
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        graph = Graph(folder)
        server = None
        try:
            options = {"inference_url": url, "inference_timeout": "1.0"}
            bench = Bench(graph, *(w for k, v in options.items() for w in ("-p", f"{k}:={v}")))
            graph.wait(
                lambda: "The node waits for the server." in graph.output("policy_node"),
                "the node to wait",
            )
            server = start("--engine=eager", log=folder / "server.txt")
            proxy.upstream = server.url
            bench.status.state("disabled")
            states = graph.listen("/policy/state", String, LATCHED)
            made = Remote(bench, proxy, server, folder, states)
            yield made
            server = made.server
        finally:
            graph.close()
            if server is not None:
                server.process.kill()
                server.process.wait()


def check_no_leap(bench: Bench, since: int) -> float:
    """Assert that no two commands in a row differ by more than the arm moves between them.

    Returns the largest difference of a joint [rad].
    """
    commands = np.array([command for _, command in bench.commands[since:]])
    largest = float(np.abs(np.diff(commands, axis=0)).max())
    assert largest < LEAP
    return largest


def show(fault: str, hold: str, held: float, resumed: float, step: float) -> None:
    """Print a row of the table."""
    print(f"\n| {fault} | `{hold}` | {held:.1f} s | {resumed:.1f} s | {step:.3f} rad |")


@pytest.mark.parametrize(
    ("fault", "code"),
    [(CUT, "server_lost"), (DROP, "server_silent"), (STRANGE, "server_foreign")],
)
def test_faults_of_the_network_hold_by_name_and_pass(remote: Remote, fault: str, code: str) -> None:
    bench = remote.bench
    bench.begin(seed=1)
    since = len(bench.commands)
    remote.proxy.fault = fault
    try:
        held = remote.reaches("holding", code)
        bench.check_rest()
    finally:
        remote.proxy.fault = NONE
    resumed = remote.reaches("moving")
    bench.check_goes_on(since)
    show(fault, code, held, resumed, check_no_leap(bench, since))


@pytest.mark.parametrize("fault", [DELAY, STALL, DOUBLE, SWAP])
def test_late_doubled_and_swapped_answers_make_no_leap(remote: Remote, fault: str) -> None:
    bench = remote.bench
    bench.begin(seed=2)
    since = len(bench.commands)
    harmed = remote.proxy.harmed
    remote.proxy.fault = fault
    try:
        bench.graph.spin(6.0)
        if fault == STALL:
            bench.status.state("holding", "server_silent")
        if fault in (DOUBLE, SWAP):  # every second answer is right
            values = bench.status.wait(
                lambda _, values: "instead of" in values.get("last_inference_error", ""),
                "the error",
            )
            assert "has answered request" in values["last_inference_error"]
    finally:
        remote.proxy.fault = NONE
    assert remote.proxy.harmed > harmed + 2
    largest = check_no_leap(bench, since)
    print(f"\n| {fault} for 6 s | {remote.proxy.harmed - harmed} harmed | {largest:.3f} rad |")
    bench.begin(seed=3)  # the policy drives again


def test_a_server_that_is_killed_frozen_and_exchanged(remote: Remote) -> None:
    bench = remote.bench
    bench.begin(seed=1)
    since = len(bench.commands)
    remote.kill()
    held = remote.reaches("holding", "server_lost")
    bench.check_rest()
    remote.restart("student_all_tokens")
    changed = remote.reaches("holding", "server_changed", "weights was")
    bench.check_rest()
    remote.restart()
    resumed = remote.reaches("moving")
    bench.check_goes_on(since)
    largest = check_no_leap(bench, since)
    show("server killed", "server_lost", held, resumed, largest)
    show("another policy", "server_changed", changed, resumed, largest)
    since = len(bench.commands)
    os.kill(remote.server.process.pid, signal.SIGSTOP)  # half open
    held = remote.reaches("holding", "server_")
    bench.check_rest()
    os.kill(remote.server.process.pid, signal.SIGCONT)
    resumed = remote.reaches("moving")
    bench.check_goes_on(since)
    show("half-open", "server_silent", held, resumed, check_no_leap(bench, since))


def test_a_node_that_is_killed_leaves_the_server_as_it_was(remote: Remote) -> None:
    remote.bench.begin(seed=4)
    remote.bench.graph.stop("policy_node", signal.SIGKILL)
    port = remote.server.port
    end = time.monotonic() + 10.0
    while "ceed_vla_connections 0" not in http(port, "/metrics")[1]:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert http(port, "/healthz")[0] == 200
