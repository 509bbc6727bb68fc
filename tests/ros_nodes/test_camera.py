"""One camera: which images are faults and for how long, and which warnings it returns."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from PIL import Image as PillowImage
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage

from ceed_vla.errors import ObservationError
from ceed_vla.ros_nodes.robot.camera import CALM, Camera
from ceed_vla.ros_nodes.robot.images import decode
from ceed_vla.ros_nodes.robot.inference import decoded
from ceed_vla.ros_nodes.robot.messages import array_to_image
from ceed_vla.ros_nodes.robot.robot_config import ImageSource
from ceed_vla.serving.predictor import BAD_IMAGE, Request, Response
from tests.ros_nodes.loop import FEATURE, Loop, stamp

PERIOD = 1 / 30
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def camera(transport: str = "raw", resize: bool = True) -> Camera:
    source = ImageSource("observation.images.front", "front/images", transport, resize)
    return Camera(source, (3, 12, 16))


def raw(at: float, encoding: str = "rgb8", pixels: np.ndarray = PIXELS) -> bytes:
    message = array_to_image(pixels, stamp(at), "front")
    message.encoding = encoding
    return bytes(serialize_message(message))


def jpeg(at: float, damaged: bool = False, pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "JPEG")
    data = buffer.getvalue()
    message = CompressedImage(format="jpeg", data=data[: len(data) - 60] if damaged else data)
    message.header.stamp = stamp(at)
    return bytes(serialize_message(message))


def look(seen_by: Camera) -> None:
    """Decode the newest image, as the inference thread does."""
    feature = seen_by.source.feature
    _, seen = decode({feature: seen_by.show()})
    seen_by.judge(seen.problems[feature], blank=feature in seen.blank)


def test_one_bad_image_is_a_fault_until_a_good_one_comes() -> None:
    front = camera()
    front.take(raw(1.0))
    assert front.fault is None
    for number in range(5):  # for any duration
        front.take(raw(2.0 + number, "mono8"))
        assert "'mono8'; use rgb8" in str(front.fault)
    assert front.stamp == 1.0  # of the last good image
    front.take(raw(7.0))
    assert front.fault is None


@pytest.mark.parametrize("every", [2, 3, 10])
def test_bad_images_among_good_ones_are_a_fault_that_stays_and_is_counted(every: int) -> None:
    front = camera()
    faults = []
    for number in range(120):
        front.take(raw(10.0 + number * PERIOD, "mono8" if number % every == 0 else "rgb8"))
        faults.append(front.fault)
    settled = faults[2 * every :]
    assert None not in settled
    bad = 30 // every
    assert f"{bad} of the last 30 images were bad: " in str(settled[-1])
    assert "'mono8'" in str(settled[-1])
    last = 10.0 + 119 // every * every * PERIOD  # stamp of the last bad image
    front.take(raw(last + 0.9 * CALM))
    assert front.fault is not None
    front.take(raw(last + 1.1 * CALM))
    assert front.fault is None


def test_a_rare_bad_image_is_a_fault_for_a_moment_only() -> None:
    front = camera()
    faulty = 0
    for number in range(300):
        front.take(raw(10.0 + number * PERIOD, "mono8" if number % 60 == 30 else "rgb8"))
        faulty += front.fault is not None
    assert faulty == 5


def test_a_damaged_image_is_found_when_it_is_decoded_and_lasts_until_a_good_one_is() -> None:
    front = camera("compressed")
    front.take(jpeg(1.0))
    look(front)
    assert front.fault is None
    assert not front.suspect
    front.take(jpeg(1.1, damaged=True))
    assert front.fault is None  # the header does not show it
    look(front)
    assert "cannot be read" in str(front.fault)
    assert not front.suspect  # it was decoded just now
    front.take(jpeg(1.2, damaged=True))
    assert front.fault is not None
    assert front.suspect
    look(front)
    assert front.fault is not None
    front.take(jpeg(1.3))
    assert front.fault is not None  # its header does not describe the data
    look(front)
    assert front.fault is None


def test_damaged_images_among_good_ones_stay_a_fault() -> None:
    front = camera("compressed")
    faults = []
    for number in range(60):
        front.take(jpeg(10.0 + number * PERIOD, damaged=number % 3 == 0))
        if number % 7 == 0 or front.suspect:  # requests are less frequent than images
            look(front)
        faults.append(front.fault)
    first = next(number for number, fault in enumerate(faults) if fault)
    assert None not in faults[first + 8 :]
    assert "images were bad: " in str(faults[-1])
    for number in range(60, 100):
        front.take(jpeg(10.0 + number * PERIOD))
        if front.suspect:
            look(front)
    assert front.fault is None


def test_what_was_decoded_before_a_jump_of_the_clock_says_nothing() -> None:
    front = camera("compressed")
    front.take(jpeg(1.0, damaged=True))
    front.show()
    front.forget()
    front.judge("it cannot be read", blank=False)
    assert front.fault is None
    with pytest.raises(ObservationError, match="no image of front"):
        front.show()


def test_a_blank_image_is_seen_when_it_is_decoded() -> None:
    front = camera()
    front.take(raw(1.0, pixels=np.full((24, 32, 3), 5, np.uint8)))
    look(front)
    assert front.blank
    front.take(raw(1.1))
    look(front)
    assert not front.blank


def test_a_change_of_size_and_a_distortion_are_told_once() -> None:
    front = camera()
    told = []
    sizes = [(12, 16)] * 30 + [(36, 64)] * 60 + [(24, 32)] * 60
    for number, size in enumerate(sizes):
        told.append(front.take(raw(10.0 + number * PERIOD, pixels=np.zeros((*size, 3), np.uint8))))
    texts = [text for text in told if text]
    assert len(texts) == 2
    assert "images were 16 x 12 pixels and are 64 x 36 now; resize squeezes" in texts[0]
    assert "aspect 1.78" in texts[0]
    assert texts[1].endswith("front: images were 64 x 36 pixels and are 32 x 24 now")
    assert told[30] == texts[0] or told[31] == texts[0]


def test_a_distortion_is_told_with_the_first_image() -> None:
    front = camera()
    first = front.take(raw(1.0, pixels=np.zeros((12, 32, 3), np.uint8)))
    assert "resize squeezes 32 x 12 pixels" in str(first)
    assert front.take(raw(1.1, pixels=np.zeros((12, 32, 3), np.uint8))) is None


def test_a_camera_that_changes_its_size_all_the_time_is_told_of_once_a_second() -> None:
    front = camera()
    told = []
    for number in range(300):
        pixels = np.zeros((12 + 12 * (number % 2), 16, 3), np.uint8)
        told.append(front.take(raw(10.0 + number * PERIOD, pixels=pixels)))
    assert 5 <= sum(text is not None for text in told) <= 11


def test_another_size_without_resize_is_a_fault() -> None:
    front = camera(resize=False)
    assert front.take(raw(1.0, pixels=np.zeros((24, 32, 3), np.uint8))) is None
    assert "The image is 32 x 24 pixels; the policy was trained on 16 x 12" in str(front.fault)


# ---- in the loop ---------------------------------------------------------------------------------


def hold(loop: Loop) -> str:
    return "" if loop.controller.hold is None else loop.controller.hold.code


@pytest.mark.parametrize("moved", [0.001, 0.02, 0.04])
def test_a_camera_that_stops_as_motion_begins_is_stale(moved: float) -> None:
    """Its images were identical until then, because the scene was at rest."""
    loop = Loop(enable=False)
    loop.alive = False
    loop.run(3.0)
    assert loop.controller.enable(loop.now) is None
    for _ in range(200):
        loop.run(0.02)
        if np.abs(loop.position).max() > moved:
            break
    loop.cameras = False
    codes = set()
    for _ in range(50):
        loop.run(0.02)
        codes.add(hold(loop))
    assert np.abs(loop.position).max() > 0.05
    assert codes == {"", "stale"}


def test_a_camera_that_goes_on_with_the_image_from_before_motion_is_frozen() -> None:
    loop = Loop(enable=False)
    loop.alive = False
    loop.run(3.0)
    assert loop.controller.enable(loop.now) is None
    loop.run(2.0)
    assert hold(loop) == "frozen_image"


def test_one_image_in_three_of_a_wrong_encoding_holds_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop()
    take = loop.observations.cameras[0].take
    count = 0

    def spoil(message: bytes) -> str | None:
        nonlocal count
        count += 1
        return take(message.replace(b"rgb8", b"16UC") if count % 3 == 0 else message)

    monkeypatch.setattr(loop.observations.cameras[0], "take", spoil)
    loop.run(2.0)
    before = len(loop.path)
    reasons = set()
    for _ in range(100):
        loop.run(0.02)
        reasons.add(hold(loop))
    assert reasons == {"bad_image"}
    assert loop.controller.hold is not None
    detail = loop.controller.hold.detail
    assert "10 of the last 30 images were bad: The image has encoding '16UC'" in detail
    assert np.ptp(loop.path[before:], axis=0).max() == 0.0
    monkeypatch.undo()
    loop.run(3.0)
    assert hold(loop) == ""


class Decoding:
    """The worker of a loop; it decodes images as the inference thread does."""

    def __init__(self, loop: Loop) -> None:
        self.policy: Any = loop.policy
        self._submit, self._poll = loop.policy.submit, loop.policy.poll
        self._answer: Response | None = None
        self._seen: Any = None
        self.looks = 0

    def submit(self, request: Request) -> bool:
        request, seen = decoded(request)
        self._seen = seen
        if seen.problem:
            self._answer = Response(request.id, error=seen.problem, code=BAD_IMAGE, seen=seen)
        elif request.id == 0:
            self._answer = Response(request.id, seen=seen)
        else:
            return bool(self._submit(request))
        self.looks += request.id == 0
        return True

    def poll(self) -> Response | None:
        answer, self._answer = self._answer, None
        return answer if answer is not None else self._poll()


def test_a_damaged_jpeg_holds_until_a_good_one_was_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    worker = Decoding(loop)
    monkeypatch.setattr(loop.policy, "submit", worker.submit)
    monkeypatch.setattr(loop.policy, "poll", worker.poll)
    source = ImageSource(FEATURE, "front/images", "compressed", True)
    front = Camera(source, (3, 4, 4))
    loop.observations.cameras[0] = front
    damaged = False
    images = 0

    def image() -> None:
        nonlocal images
        images += 1
        front.take(jpeg(loop.now, damaged, np.roll(PIXELS, images)))

    monkeypatch.setattr(loop, "_image", image)
    loop.run(1.0)
    assert hold(loop) == ""
    damaged = True
    loop.run(0.5)
    assert hold(loop) == "bad_image"
    assert "front: The compressed image (format 'jpeg'" in str(loop.controller.hold)
    held = loop.path[-1]
    loop.run(1.0)
    np.testing.assert_array_equal(loop.path[-1], held)
    assert worker.looks >= 20  # every image, while no request is decoded
    damaged = False
    loop.run(0.5)
    assert hold(loop) == ""
    loop.run(1.0)
    looks = worker.looks
    loop.run(1.0)
    assert worker.looks == looks
    assert loop.controller.statistics.errors == 0  # of the policy
    assert loop.path[-1][0] > held[0]
