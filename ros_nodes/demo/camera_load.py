"""Measures missed ticks of a policy node: ``python -m ceed_vla.ros_nodes.demo.camera_load``.

A separate process replays prepared images of two cameras to a real policy node with the shipped
student. This process publishes joint states that follow the commands, and counts missed ticks from
the commands' times of sending.
"""

from __future__ import annotations

import argparse
import array
import io
import multiprocessing
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image as PillowImage

from ceed_vla.errors import NodeError
from ceed_vla.ros_nodes.demo.measuring import print_results
from ceed_vla.ros_nodes.demo.report import status_values
from ceed_vla.ros_nodes.robot.loop_statistics import MISSED
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config

CAMERAS = ("front", "wrist")
COMMANDS = "/forward_position_controller/commands"
COMMAND_RATE = 100.0  # of the policy node [Hz]
PROFILE = "fastdds_large_images.xml"  # in the folder of the packaged robot's file
# of Fast DDS 2 (ROS 2 Jazzy) and of Fast DDS 3
PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
_IMAGES = 8  # number of different images that are replayed
_JPEG_QUALITY = 85
_QUEUED = 1000  # commands that this process may lag behind
_STATES = 0.01  # time between two joint states [s]
_START_TIMEOUT = 300.0  # until the arm moves [s]
_SETTLE = 3.0  # from the first motion to the beginning of the measurement [s]


@dataclass(frozen=True)
class Load:
    """Images of the cameras: `width` x `height` [px], at `rate` [Hz] per camera."""

    width: int = 1920
    height: int = 1080
    rate: float = 30.0
    transport: str = "compressed"  # or "raw"


def scene(load: Load, number: int) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) whose JPEG is as large as a photograph's."""
    rng = np.random.default_rng(number)
    height, width = load.height, load.width
    total = 128.0 + rng.normal(0.0, 2.0, (height, width, 3))
    for size, strength in ((2, 6), (4, 8), (8, 12), (32, 20), (128, 30), (512, 30)):
        shape = (max(height // size, 2), max(width // size, 2))
        for channel in range(3):
            coarse = PillowImage.fromarray(rng.normal(0.0, strength, shape).astype(np.float32))
            fine = coarse.resize((width, height), PillowImage.Resampling.BILINEAR)
            total[:, :, channel] += np.asarray(fine)
    return np.clip(total, 0, 255).astype(np.uint8)


def prepared(load: Load) -> list[bytes]:
    """Return serialized messages with different images."""
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import CompressedImage, Image

    messages = []
    for number in range(_IMAGES):
        pixels = scene(load, number)
        if load.transport == "raw":
            message = Image(height=load.height, width=load.width, encoding="rgb8")
            message.step = 3 * load.width
            message.data = array.array("B", pixels.tobytes())
        else:
            file = io.BytesIO()
            PillowImage.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY)
            message = CompressedImage(format="jpeg", data=array.array("B", file.getvalue()))
        messages.append(bytes(serialize_message(message)))
    return messages


def replay(load: Load) -> None:
    """Publish the images of both cameras simultaneously, until the process is killed.

    The stamp is the time at which an image is due, as a camera stamps its exposure: if this process
    gets the processor late, the image comes late but is not stamped late.
    """
    import rclpy
    from sensor_msgs.msg import CompressedImage, Image

    from ceed_vla.ros_nodes.robot.messages import SENSOR

    messages = prepared(load)
    rclpy.init(args=[])
    node = rclpy.create_node("cameras")
    kind = Image if load.transport == "raw" else CompressedImage
    publishers = [node.create_publisher(kind, f"/{name}/images", SENSOR) for name in CAMERAS]
    due = time.time()
    number = 0
    while True:
        message = bytearray(messages[number % _IMAGES])
        stamp = int(due * 1e9)
        message[4:12] = struct.pack("<iI", stamp // 10**9, stamp % 10**9)  # the header's
        for publisher in publishers:
            publisher.publish(bytes(message))
        number += 1
        due = max(due + 1.0 / load.rate, time.time() - 1.0)
        time.sleep(max(due - time.time(), 0.0))


def robot_file(folder: Path, load: Load) -> Path:
    """Write the packaged robot's file with these cameras into `folder`, and return its path."""
    packaged = packaged_config()
    values = yaml.safe_load(packaged.read_text(encoding="utf-8"))
    values["arm"]["model"] = str(packaged.with_name(values["arm"]["model"]))
    values["images"] = {
        f"observation.images.{name}": {
            "topic": f"/{name}/images",
            "transport": load.transport,
            "resize": True,
        }
        for name in CAMERAS
    }
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@dataclass
class Arm:
    """Simulated joints that follow the last command, and the policy node's diagnostics.

    Attributes:
        sent: Times of sending of the commands [ns].
        policy: Newest diagnostics of the policy node.
        node: The node.
    """

    sent: list[int] = field(default_factory=list)
    policy: dict[str, str] = field(default_factory=dict)
    node: Any = None

    def __post_init__(self) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import QoSProfile
        from rclpy.signals import SignalHandlerOptions
        from sensor_msgs.msg import JointState
        from std_msgs.msg import Float64MultiArray

        from ceed_vla.ros_nodes.robot.messages import COMMAND, JOINT_STATES

        robot = load_robot_config()
        assert robot.gripper is not None
        self._joints = robot.arm.joints
        self._position = dict(zip(robot.arm.joints, robot.arm.home, strict=True))
        opening = robot.gripper.open / len(robot.gripper.joints)
        self._position |= dict.fromkeys(robot.gripper.joints, opening)
        self._target = dict(self._position)
        limits = dict(zip(robot.arm.joints, robot.limits.velocity, strict=True))
        self._speeds = {joint: limits.get(joint, 0.0) for joint in self._position}
        self._moved = time.time_ns()
        self._message = JointState
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("arm")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._states = self.node.create_publisher(JointState, "/joint_states", JOINT_STATES)
        self.node.create_timer(_STATES, self._publish)
        follow: Callable[..., None] = self._follow  # rclpy passes the message's information too
        queued = QoSProfile(depth=_QUEUED)  # a command lost here must not count as a missed tick
        self.node.create_subscription(Float64MultiArray, COMMANDS, follow, queued)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._diagnosed, COMMAND)

    def _publish(self) -> None:
        now = time.time_ns()
        for joint, speed in self._speeds.items():  # so that no arm leaps on a busy machine
            reach = speed * 1e-9 * (now - self._moved)
            way = self._target[joint] - self._position[joint]
            self._position[joint] += min(max(way, -reach), reach)
        self._moved = now
        message = self._message(name=list(self._position), position=list(self._position.values()))
        message.header.stamp.sec = now // 10**9
        message.header.stamp.nanosec = now % 10**9
        self._states.publish(message)

    def _follow(self, message: Any, information: Mapping[str, int]) -> None:
        self.sent.append(information["source_timestamp"])
        self._target.update(zip(self._joints, message.data, strict=True))

    def _diagnosed(self, message: Any) -> None:
        self.policy = status_values(message, "action_interface") or self.policy

    def spin(self, seconds: float, node: subprocess.Popen[bytes], until: str = "") -> bool:
        """Move for `seconds`, or until the node's state is `until`.

        Returns whether that state was reached; without `until`, True. `NodeError`: The node has
        ended.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if until and self.policy.get("state") == until:
                return True
            if node.poll() is not None:
                raise NodeError(f"The policy node ended with code {node.returncode}.")
            self._executor.spin_once(timeout_sec=0.1)
        return not until

    def close(self) -> None:
        import rclpy

        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.try_shutdown()


def timing(sent: Sequence[int]) -> dict[str, float]:
    """Return ticks, missed ticks and jitter of commands with these times of sending [ns]."""
    intervals = np.diff(np.sort(np.asarray(sent, dtype=np.int64))) * 1e-9
    if not len(intervals):
        raise NodeError(f"{len(sent)} commands arrived; at least 2 are needed to measure.")
    jitter = np.abs(intervals - 1.0 / COMMAND_RATE)
    missed = intervals > MISSED / COMMAND_RATE
    shares = np.percentile(1e3 * jitter, (50, 95, 99))
    return {
        "ticks": len(intervals),
        "missed_ticks": int(missed.sum()),
        "missed_percent": round(100.0 * float(missed.mean()), 3),
        "jitter_p50_ms": round(float(shares[0]), 3),
        "jitter_p95_ms": round(float(shares[1]), 3),
        "jitter_p99_ms": round(float(shares[2]), 3),
        "longest_gap_ms": round(1e3 * float(intervals.max()), 2),
    }


def measure(load: Load, seconds: float, parameters: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a policy node with `parameters` under a load for `seconds`.

    `NodeError`: The node ends, or does not move the arm.
    """
    settings = [
        "autostart:=true",
        "instruction:=move the green cube into the bin",
        *parameters,
    ]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = [f"robot_config:={robot_file(folder, load)}", *settings]
        command = [sys.executable, "-m", "ceed_vla.ros_nodes.robot.policy_node", "--ros-args"]
        command += [part for argument in arguments for part in ("-p", argument)]
        context = multiprocessing.get_context("spawn")
        cameras = context.Process(target=replay, args=(load,), name="cameras", daemon=True)
        cameras.start()
        stack.callback(cameras.join)
        stack.callback(cameras.kill)
        arm = Arm()
        stack.callback(arm.close)
        node = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        stack.callback(node.wait)
        stack.callback(node.terminate)
        if not arm.spin(_START_TIMEOUT, node, until="moving"):
            reason = arm.policy.get("hold_reason") or "no diagnostics arrived"
            raise NodeError(f"The arm does not move: {reason}.")
        arm.spin(_SETTLE, node)
        arm.sent.clear()
        before = dict(arm.policy)
        arm.spin(seconds, node)
        sent = list(arm.sent)
        arm.spin(1.1, node)  # until the diagnostics include the last second
        return {
            **vars(load),
            **timing(sent),
            **_told(before, arm.policy),
            "load_average": os.getloadavg()[0],
        }


def _told(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    """Return the differences between two diagnostics."""
    told: dict[str, Any] = {key: after.get(key, "") for key in ("state", "hold_reason")}
    holds = [key for key in after if key.startswith("holds.")]
    for key in ("ticks", "missed_ticks", "chunks", *holds, *(f"images.{name}" for name in CAMERAS)):
        if key in before and key in after:
            told[f"node.{key}"] = int(after[key]) - int(before[key])
    for key in ("images_ms_p50", "images_ms_p95", "decode_ms_p50", "decode_ms_p95", "scheduling"):
        if key in after:
            told[key] = after[key]
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result of `measure` as JSON, one line per measurement."""
    from ceed_vla.ros_nodes.demo.ros_demo import free_domain

    about = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="camera_load", description=about)
    parser.add_argument("--width", type=int, default=1920, help="width of the images [px]")
    parser.add_argument("--height", type=int, default=1080, help="height of the images [px]")
    parser.add_argument("--rate", type=float, default=30.0, help="image rate of each camera [Hz]")
    parser.add_argument("--transport", choices=("compressed", "raw"), default="compressed")
    parser.add_argument("--seconds", type=float, default=30.0, help="time of a measurement [s]")
    parser.add_argument("--repeat", type=int, default=1, help="number of measurements")
    parser.add_argument("--domain", type=int, default=-1, help="ROS_DOMAIN_ID; -1 selects one")
    parser.add_argument(
        "--parameter",
        action="append",
        default=[],
        help="parameter of the node, such as inference_mode:=thread",
    )
    options = parser.parse_args(arguments)
    domain = options.domain if options.domain >= 0 else free_domain()
    os.environ["ROS_DOMAIN_ID"] = str(domain)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    profile = packaged_config().with_name(PROFILE)
    for name in PROFILE_VARIABLES:
        os.environ.setdefault(name, str(profile))
    load = Load(options.width, options.height, options.rate, options.transport)
    results = (measure(load, options.seconds, options.parameter) for _ in range(options.repeat))
    return print_results("camera_load", lambda: results)


if __name__ == "__main__":
    sys.exit(main())
