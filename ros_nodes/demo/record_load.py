"""Measures a recorder beside a policy node: ``python -m ceed_vla.ros_nodes.demo.record_load``.

As in `camera_load`, a process replays images of two cameras to a policy node that drives simulated
joints; a record node stores all of it as videos. Printed are the frames that lack an image, the
frames that were stored, and the commands' missed ticks meanwhile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from ceed_vla.errors import NodeError
from ceed_vla.ros_nodes.demo.camera_load import (
    PROFILE,
    PROFILE_VARIABLES,
    Arm,
    Load,
    replay,
    robot_file,
    timing,
)
from ceed_vla.ros_nodes.demo.measuring import print_results
from ceed_vla.ros_nodes.demo.report import status_values
from ceed_vla.ros_nodes.demo.session import DISCOVERY
from ceed_vla.ros_nodes.robot.robot_file import packaged_config

_START = 300.0  # longest time until both nodes are ready [s]


class Recording:
    """A record node, called from the node of an `Arm`."""

    def __init__(self, arm: Arm, file: Path, root: Path, format: str) -> None:
        from diagnostic_msgs.msg import DiagnosticArray
        from std_msgs.msg import String

        from ceed_vla.ros_nodes.robot.messages import COMMAND, LATCHED

        self.state = ""
        self.values: dict[str, str] = {}
        self.most_waiting = 0.0  # images that waited to be stored [MB]
        self._arm = arm
        node = arm.node
        node.create_subscription(String, "/record/state", self._on_state, LATCHED)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_status, COMMAND)
        settings = [
            f"robot_config:={file}",
            f"root:={root}",
            f"format:={format}",
            "autostart:=true",
            "instruction:=move the green cube into the bin",
        ]
        command = [sys.executable, "-m", "ceed_vla.ros_nodes.record.record_node", "--ros-args"]
        command += [part for setting in settings for part in ("-p", setting)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def _on_state(self, message: Any) -> None:
        self.state = message.data

    def _on_status(self, message: Any) -> None:
        self.values = status_values(message, "frames_of_episode") or self.values
        waiting = float(self.values.get("waiting_mb") or 0.0)
        self.most_waiting = max(self.most_waiting, waiting)

    def until(self, state: str, seconds: float, others: Callable[[], None]) -> None:
        """Wait for a state; `NodeError`: It does not come in time [s]."""
        end = time.monotonic() + seconds
        while not self.state.startswith(state):
            if time.monotonic() > end or self.process.poll() is not None:
                raise NodeError(f"The recorder is {self.state or 'silent'}, not {state}.")
            others()

    def call(self, service: str, kind: Any, request: Any, policy: subprocess.Popen[bytes]) -> None:
        """Call a service; `NodeError`: It is refused."""
        client = self._arm.node.create_client(kind, service)
        while not client.service_is_ready():
            self._arm.spin(0.1, policy)
        self._arm.spin(DISCOVERY, policy)
        future = client.call_async(request)
        while not future.done():
            self._arm.spin(0.1, policy)
        if not future.result().success:
            raise NodeError(f"{service}: {future.result().message}")


def robot_files(folder: Path, load: Load, fps: float) -> tuple[Path, Path]:
    """Write the robot's file for the policy node, and that for a recorder at another rate."""
    driven = robot_file(folder, load)
    recorded = folder / "recorded.yaml"
    values = yaml.safe_load(driven.read_text(encoding="utf-8"))
    del values["action"]["dt"]
    values["action"]["fps"] = fps
    recorded.write_text(yaml.safe_dump(values), encoding="utf-8")
    return driven, recorded


def start_policy(file: Path) -> subprocess.Popen[bytes]:
    """Start the policy node."""
    settings = [f"robot_config:={file}", "autostart:=true"]
    settings.append("instruction:=move the green cube into the bin")
    command = [sys.executable, "-m", "ceed_vla.ros_nodes.robot.policy_node", "--ros-args"]
    command += [part for setting in settings for part in ("-p", setting)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def measure(load: Load, seconds: float, fps: float, format: str) -> dict[str, Any]:
    """Record for a time [s] at `fps` frames per second beside a policy node.

    `NodeError`: A node ends, the arm does not move, or the episode is not stored.
    """
    from std_srvs.srv import SetBool, Trigger

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        driven, recorded = robot_files(folder, load, fps)
        context = multiprocessing.get_context("spawn")
        cameras = context.Process(target=replay, args=(load,), name="cameras", daemon=True)
        cameras.start()
        stack.callback(cameras.join)
        stack.callback(cameras.kill)
        arm = Arm()
        stack.callback(arm.close)
        policy = start_policy(driven)
        stack.callback(policy.wait)
        stack.callback(policy.terminate)
        recording = Recording(arm, recorded, folder / "data", format)
        stack.callback(recording.process.wait)
        stack.callback(recording.process.terminate)
        if not arm.spin(_START, policy, until="moving"):
            raise NodeError(f"The arm does not move: {arm.policy.get('hold_reason')}.")

        def spin() -> None:
            arm.spin(0.2, policy)

        recording.until("idle", _START, spin)
        recording.call("/record/start", Trigger, Trigger.Request(), policy)
        arm.spin(1.0, policy)
        arm.sent.clear()
        arm.spin(seconds, policy)
        sent = list(arm.sent)
        losses = {
            key: int(value)
            for key, value in recording.values.items()
            if key.startswith(("missing.", "late.", "bad."))
        }
        recording.call("/record/stop", SetBool, SetBool.Request(data=True), policy)
        stopped = time.monotonic()
        recording.until("idle", _START, spin)
        took = time.monotonic() - stopped
        size = sum(file.stat().st_size for file in (folder / "data").rglob("*") if file.is_file())
        return {
            **vars(load),
            "fps": fps,
            "format": format,
            "seconds": seconds,
            "stored": recording.state,
            **losses,
            "most_waiting_mb": recording.most_waiting,
            "stored_after_s": round(took, 2),
            "mb_per_minute": round(60e-6 * size / (seconds + 1.0), 1),
            **timing(sent),
            "scheduling": arm.policy.get("scheduling", ""),
            "load_average": os.getloadavg()[0],
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result of `measure` as JSON."""
    from ceed_vla.ros_nodes.demo.ros_demo import free_domain

    parser = argparse.ArgumentParser(prog="record_load", description=str(__doc__).splitlines()[0])
    parser.add_argument("--width", type=int, default=640, help="width of the images [px]")
    parser.add_argument("--height", type=int, default=480, help="height of the images [px]")
    parser.add_argument("--rate", type=float, default=30.0, help="image rate of each camera [Hz]")
    parser.add_argument("--fps", type=float, default=30.0, help="frames per second that are stored")
    parser.add_argument("--format", choices=("h264", "av1", "png"), default="h264")
    parser.add_argument("--transport", choices=("compressed", "raw"), default="raw")
    parser.add_argument("--seconds", type=float, default=600.0, help="time of the recording [s]")
    options = parser.parse_args(arguments)
    os.environ["ROS_DOMAIN_ID"] = str(free_domain())
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    profile = packaged_config().with_name(PROFILE)
    for name in PROFILE_VARIABLES:
        os.environ.setdefault(name, str(profile))
    load = Load(options.width, options.height, options.rate, options.transport)

    def measured() -> list[dict[str, Any]]:
        found = measure(load, options.seconds, options.fps, options.format)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = round(used.ru_utime + used.ru_stime, 1)
        return [{**found, "cpu_seconds_of_all_children": seconds}]

    return print_results("record_load", measured)


if __name__ == "__main__":
    sys.exit(main())
