"""Frames from samples with stamps: what each has, when it is complete, and what is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ceed_vla.ros_nodes.record.sampling import Frame, FrameSampler

PERIOD = 0.1


def sampler(**settings: float) -> FrameSampler:
    return FrameSampler(
        PERIOD,
        ["camera", "arm", "commands"],
        following=["commands"],
        counted=["camera"],
        **settings,
    )


def stream(end: float, camera: float = 1 / 30) -> list[tuple[str, float]]:
    """Samples until a time [s]: a camera, and arm and commands at 100 Hz."""
    samples = [("camera", 0.003 + i * camera) for i in range(int(end / camera))]
    for i in range(int(end / 0.01)):
        samples += [("arm", i * 0.01), ("commands", i * 0.01 + 0.002)]
    return sorted(samples, key=lambda sample: sample[1])


def run(one: FrameSampler, samples: list[tuple[str, float]], stop: float) -> list[Frame]:
    """Put samples whose values are their stamps, with the clock at the newest of them."""
    frames = []
    newest = -math.inf
    for name, stamp in samples:
        one.put(name, stamp, stamp)
        newest = max(newest, stamp)
        frames += one.ready(newest)
    one.stop(stop)
    return frames + list(one.ready(math.inf))


def test_a_frame_has_the_newest_samples_up_to_its_time() -> None:
    one = sampler()
    one.start(0.5)
    frames = run(one, stream(2.0), 1.95)
    assert [round(frame.time, 6) for frame in frames] == [
        pytest.approx(0.503 + 0.5 / 30 + 0.1 * k) for k in range(14)
    ]
    for frame in frames:
        # in the middle between two images
        assert abs(frame.time - frame.values["camera"] - 0.5 / 30) < 1 / 30 / 2
        assert -1e-6 <= frame.time - frame.values["arm"] < 0.01 + 1e-6
        assert -1e-6 <= frame.time + PERIOD - frame.following["commands"] < 0.01 + 1e-6
    assert str(one.losses) == ""
    assert one.done(math.inf)


def test_delays_change_nothing() -> None:
    expected = sampler()
    expected.start(0.5)
    frames = run(expected, stream(2.0), 1.9)
    delays = {"camera": 0.15, "arm": 0.0, "commands": 0.07}  # order is kept within a topic
    late = [(name, stamp, stamp + delays[name]) for name, stamp in stream(2.0)]
    late.sort(key=lambda sample: sample[2])
    one = sampler()
    one.start(0.5)
    assert run(one, [(name, stamp) for name, stamp, _ in late], 1.9) == frames


def test_an_episode_begins_when_every_input_is_there() -> None:
    one = sampler()
    one.put("camera", 1.0, "old")
    one.start(5.0)
    assert one.silent(4.0) == ["camera", "arm", "commands"]
    for i in range(200):
        one.put("arm", 5.0 + 0.01 * i, i)
        one.put("camera", 5.0 + 0.01 * i, i)
        if i >= 50:
            one.put("commands", 5.0 + 0.01 * i, i)
    frames = list(one.ready(7.0))
    assert frames[0].time == pytest.approx(5.505)
    assert frames[0].values == {"arm": 50, "camera": 50, "commands": 50}


def test_missing_and_late_samples_are_counted() -> None:
    one = sampler()
    one.start(0.1)
    samples = [
        (name, stamp)
        for name, stamp in stream(2.0)
        if not (name == "camera" and 0.45 < stamp < 0.82)
    ]
    run(one, samples, 1.9)
    assert one.losses.repeated == {"camera": 3}
    assert 0.3 < one.losses.oldest["camera"] < 0.4
    one.put("camera", 0.6, 0.6)
    one.put("camera", 1.0, 1.0)
    assert one.losses.late["camera"] == 0  # of frames whose successors had newer images
    assert "camera: missing in 3 frames" in str(one.losses)


def test_a_sample_that_comes_after_its_frame_is_late() -> None:
    one = sampler(patience=0.05)
    one.start(0.0)
    for i in range(31):
        one.put("arm", 0.01 * i, i)
        one.put("commands", 0.01 * i, i)
    one.put("camera", 0.0, "first")
    one.put("camera", 0.02, "second")
    assert len(list(one.ready(0.3))) == 2
    one.put("camera", 0.1, "third")  # for the frame at 0.11, which was complete at 0.26
    assert one.losses.late == {"camera": 1}
    assert str(one.losses) == "camera: 1 too late"


def test_a_command_that_its_frame_should_have_had_is_late() -> None:
    one = sampler(patience=0.05)
    one.start(0.0)
    for i in range(31):
        one.put("arm", 0.01 * i, i)
    for stamp in (0.0, 0.02, 0.1):
        one.put("camera", stamp, stamp)
    for stamp in (0.0, 0.08, 0.195):
        one.put("commands", stamp, stamp)
    (first, second) = one.ready(0.3)  # at 0.01 and 0.11, with the commands of 0.11 and 0.21
    assert (first.following["commands"], second.following["commands"]) == (0.08, 0.195)
    one.put("commands", 0.19, 0.19)  # older than what was used
    one.put("commands", 0.22, 0.22)  # for the next frame
    assert not one.losses.late["commands"]
    one.put("commands", 0.205, 0.205)
    assert one.losses.late["commands"] == 1


def test_jitter_of_a_camera_at_the_frames_rate_loses_no_image() -> None:
    one = FrameSampler(1 / 30, ["camera"], counted=["camera"])
    one.start(0.0)
    random = np.random.default_rng(0)
    stamps = [i / 30 + random.uniform(-0.012, 0.012) for i in range(300)]
    # The first gap decides; here it is as usual.
    stamps[:2] = [0.0, 1 / 30]
    frames = []
    for stamp in stamps:
        one.put("camera", stamp, stamp)
        frames += one.ready(stamp)
    assert [frame.values["camera"] for frame in frames] == stamps[: len(frames)]
    assert len(frames) > 295
    assert str(one.losses) == ""


def test_a_gap_ends_the_episode() -> None:
    one = sampler()
    one.start(0.1)
    frames = run(one, [s for s in stream(3.0) if not (s[0] == "arm" and s[1] > 1.035)], 2.9)
    assert one.gap == "arm sent nothing for 0.59 s after frame 15"
    assert len(frames) == 15
    assert one.done(0.0)
    one.start(5.0)
    assert one.gap == ""


def test_memory_does_not_grow() -> None:
    one = sampler()
    for name, stamp in stream(30.0):
        one.put(name, stamp, stamp)
    assert max(len(series.stamps) for series in one._series.values()) < 250
    one.start(30.0)
    for name, stamp in stream(60.0):
        if stamp > 29.0:
            one.put(name, stamp, stamp)
            list(one.ready(stamp))
    assert max(len(series.stamps) for series in one._series.values()) < 400
