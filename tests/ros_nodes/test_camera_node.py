"""Cameras of a real policy node that send bad images or change their format."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from PIL import Image as PillowImage
from sensor_msgs.msg import CompressedImage

from ceed_vla.ros_nodes.demo.camera_load import Load, robot_file
from ceed_vla.ros_nodes.robot.messages import array_to_image
from tests.ros_nodes.conftest import ROOT, Status
from tests.ros_nodes.test_policy_node import ARM, HOME, Robot, start

FRONT, WRIST = "/front/compressed", "/wrist/images"


class Cameras(Robot):
    """A front camera that sends JPEG, a wrist camera that sends raw images.

    Attributes:
        damaged: Whether an image of the front camera, by its number, is truncated.
        strange: Whether an image of the wrist camera has another encoding.
    """

    def __init__(self, graph: Any) -> None:
        self.damaged = self.strange = lambda number: False
        state = dict(zip(ARM, HOME, strict=True)) | {"finger_left": 0.05, "finger_right": 0.05}
        super().__init__(graph, {FRONT: (96, 96), WRIST: (96, 96)}, state)

    def resize(self, height: int, width: int) -> None:
        rng = np.random.default_rng(1)
        self._pixels[FRONT] = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    def _publish_images(self) -> None:
        stamp = self._node.get_clock().now().to_msg()
        self._taken += 1
        for pixels in self._pixels.values():
            pixels[0, 0] = self._taken % 256
        file = io.BytesIO()
        PillowImage.fromarray(self._pixels[FRONT]).save(file, "JPEG")
        data = file.getvalue()
        if self.damaged(self._taken):
            data = data[: len(data) // 2]
        front = CompressedImage(format="jpeg", data=data)
        front.header.stamp = stamp
        wrist = array_to_image(self._pixels[WRIST], stamp, "wrist")
        wrist.encoding = "mono16" if self.strange(self._taken) else "rgb8"
        self._cameras[FRONT].publish(front)
        self._cameras[WRIST].publish(wrist)


@pytest.mark.slow
@pytest.mark.timed
def test_bad_images_hold_with_their_camera_and_changes_of_size_are_told(graph: Any) -> None:
    path = robot_file(graph.folder, Load(transport="raw"))
    values = yaml.safe_load(path.read_text())
    values["images"]["observation.images.front"] |= {"topic": FRONT, "transport": "compressed"}
    path.write_text(yaml.safe_dump(values))
    robot, status = Cameras(graph), Status(graph)
    # A dry run: on a busy machine the test's arm would leap, which causes another hold.
    start(graph, robot_config=str(path), dry_run=True)
    assert int(status.state("moving")["images.front"]) > 0

    robot.strange = lambda number: number % 3 == 0
    status.state("holding", "bad_image: wrist: ", "were bad: The image has encoding 'mono16'")
    robot.strange = lambda number: False
    status.state("moving")
    robot.damaged = lambda number: True
    status.state("holding", "bad_image: front: The compressed image (format 'jpeg'", "Send JPEG")
    robot.damaged = lambda number: False
    status.state("moving")
    # At random: the node decodes what a chunk needs, about every third image, and never a bad one.
    bad = np.random.default_rng(0).random(100_000) < 0.3
    robot.damaged = lambda number: bool(bad[number])
    status.state("holding", "bad_image: front: ", "images were bad: The compressed image")
    robot.damaged = lambda number: False
    assert float(status.state("moving")["images_ms_p50"]) > 0.0

    robot.resize(72, 128)
    told = "front: images were 96 x 96 pixels and are 128 x 72 now; resize squeezes"
    status.wait(lambda message, _: told in message, "the new size")
    after = [status.wait(lambda *_: True, "diagnostics")["message"] for _ in range(3)]
    assert not any(told in message for message in after)
    assert graph.output("policy_node").count(told) == 1
    lines = [line for line in graph.output("policy_node").splitlines() if told in line]
    assert "[WARN]" in lines[0]


@pytest.mark.slow
@pytest.mark.timed
def test_the_load_of_cameras_is_measured_by_one_command(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ceed_vla.ros_nodes.demo.camera_load",
        "--width",
        "160",
        "--height",
        "120",
    ]
    command += ["--rate", "20", "--transport", "raw", "--seconds", "2"]
    environment = os.environ | {"ROS_LOG_DIR": str(tmp_path), "ROS_LOG_TIMESTAMP": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    told = json.loads(done.stdout)
    assert (told["width"], told["height"], told["transport"]) == (160, 120, "raw")
    assert told["state"] == "moving"
    assert told["ticks"] > 50
    assert 0.0 <= told["missed_percent"] <= 100.0
    assert told["jitter_p50_ms"] <= told["jitter_p95_ms"] <= told["jitter_p99_ms"]
    assert told["node.images.front"] > 0
    assert told["node.chunks"] > 0
    assert float(told["images_ms_p50"]) > 0.0
