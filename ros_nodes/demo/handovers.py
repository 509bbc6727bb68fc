"""Measures handovers between policy and person: ``python -m ceed_vla.ros_nodes.demo.handovers``.

A policy drives the simulated robot, and a twist device takes over and lets go again and again. It
prints the times from a message of the device to the first command by the other side, and the
largest speed of a joint, and plots the commands around one handover.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from geometry_msgs.msg import TwistStamped
from sensor_msgs.msg import JointState

from ceed_vla.errors import NodeError
from ceed_vla.ros_nodes.demo.measuring import print_results
from ceed_vla.ros_nodes.demo.session import Session
from ceed_vla.ros_nodes.robot.messages import COMMAND, seconds
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config

_DEVICE = {"kind": "twist", "topic": "mouse", "linear": 0.3, "release": 0.1}
_RATE = 50.0  # of the device [Hz]
_SPEED = 0.05  # that the person wants [m/s]
_TIMEOUT = 20.0  # until the other side commands [s]


class Handovers:
    """The device, and all commands.

    Attributes:
        heard: Time of arrival [s], and every message on ``~/commanded``.
    """

    def __init__(self, session: Session) -> None:
        self.heard: list[tuple[float, JointState]] = []
        self._session = session
        self._speed = 0.0
        node = session.node
        self._publisher = node.create_publisher(TwistStamped, "/mouse", COMMAND)
        node.create_subscription(JointState, "/policy/commanded", self._hear, COMMAND)
        node.create_timer(1.0 / _RATE, self._send)

    def _hear(self, message: JointState) -> None:
        self.heard.append((time.monotonic(), message))

    def _send(self) -> float:
        """Send the device's message; return the time [s]."""
        message = TwistStamped()
        message.twist.linear.x = self._speed
        self._publisher.publish(message)
        return time.monotonic()

    def hand(self, speed: float, source: str) -> float:
        """Move the device with a speed, or let go with 0; return the time until `source` commands
        [s].
        """
        self._speed = speed
        since = self._send()
        begin = len(self.heard)

        def first() -> float | None:
            news = self.heard[begin:]
            return next((at for at, one in news if one.header.frame_id == source), None)

        if not self._session.spin(_TIMEOUT, lambda: first() is not None):
            raise NodeError(f"The {source} did not command within {_TIMEOUT:g} s.")
        return (first() or 0.0) - since


def speeds(heard: Sequence[tuple[float, JointState]], limits: Sequence[float]) -> np.ndarray:
    """Largest speed of a joint between successive commands (T,), as a share of its limit."""
    stamps = np.array([seconds(message.header.stamp) for _, message in heard])
    joints = np.array([list(message.position)[: len(limits)] for _, message in heard])
    passed = np.maximum(np.diff(stamps), 0.01)[:, None]
    found: np.ndarray = np.max(np.abs(np.diff(joints, axis=0)) / passed / np.array(limits), axis=1)
    return found


def plot(heard: Sequence[tuple[float, JointState]], path: Path) -> None:
    """Plot the joints' commands around the last time that a person took over and let go."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from ceed_vla.sim.plots import STYLE, VERMILLION, save_figure

    times = np.array([seconds(message.header.stamp) for _, message in heard])
    person = np.array([message.header.frame_id == "person" for _, message in heard])
    last = np.flatnonzero(person)[-1]
    first = last - int(np.argmin(person[:last][::-1])) if not person[:last].all() else 0
    window = (times > times[first] - 0.6) & (times < times[last] + 0.8)
    joints = np.array([list(message.position)[:7] for _, message in heard])[window]
    shown = times[window] - times[first]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(shown, joints - joints[0], linewidth=1.2)
        axes.axvspan(0.0, times[last] - times[first], color=VERMILLION, alpha=0.12)
        axes.text(0.01, 0.02, "a person commands", transform=axes.get_xaxis_transform())
        axes.set_xlabel("time since the first command of the person [s]")
        axes.set_ylabel("commanded joints [rad]")
        save_figure(figure, path)


def measure(count: int, output: Path, domain: int) -> dict[str, Any]:
    """Measure `count` handovers to a person, and as many back."""
    output.mkdir(parents=True, exist_ok=True)
    packaged = packaged_config()
    values = yaml.safe_load(packaged.read_text(encoding="utf-8"))
    values["arm"]["model"] = str(packaged.with_name(values["arm"]["model"]))
    values["intervention"] = _DEVICE
    file = output / "robot.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    robot = load_robot_config(file)
    arguments = ["-p", f"robot_config:={file}"]
    interface = robot.interface("forward_position")
    session = Session(output, domain, interface, arguments, [], bag=False)
    try:
        one = Handovers(session)
        session.wait_until_ready()
        session.reset_episode(40_000, "mixed")
        session.enable(True)
        session.spin(2.0)
        taken = []
        given = []
        for index in range(count):
            taken.append(one.hand(_SPEED if index % 2 else -_SPEED, "person"))
            session.spin(0.3 + 0.01 * (index % 10))  # at any place in the policy's steps
            given.append(one.hand(0.0, "policy"))
            session.spin(0.3)
        found: dict[str, Any] = {"handovers": count}
        for name, times in (("to_person", taken), ("to_policy", given)):
            for share in (50, 95, 99, 100):
                found[f"{name}_p{share}_ms"] = round(1e3 * float(np.percentile(times, share)), 1)
        shares = speeds(one.heard, robot.limits.velocity)
        found["commands"] = len(one.heard)
        found["fastest_joint_share_of_limit_p99"] = round(float(np.percentile(shares, 99)), 3)
        found["fastest_joint_share_of_limit_max"] = round(float(shares.max()), 3)
        plot(one.heard, output / "handover.png")
        return found
    finally:
        session.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result of `measure` as JSON."""
    from ceed_vla.ros_nodes.demo.ros_demo import free_domain

    parser = argparse.ArgumentParser(prog="handovers", description=str(__doc__).splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output_dir", default="outputs/handovers")
    options = parser.parse_args(arguments)
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    output = Path(options.output_dir)
    return print_results("handovers", lambda: [measure(options.count, output, free_domain())])


if __name__ == "__main__":
    sys.exit(main())
