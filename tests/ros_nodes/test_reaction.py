"""Reaction times in simulated time, from two runs that differ only by an event; and late images."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from ceed_vla.cli.flags import parse_flags
from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.demo.ros_demo import RosDemoConfig
from ceed_vla.ros_nodes.demo.simulated_time import (
    DISTANCE,
    TRANSPORT,
    WHEN,
    Event,
    SimulatedLoop,
    TimedWorker,
    _percentiles,
    _run,
    draw_event,
    first_change,
)
from ceed_vla.ros_nodes.simulated.robot import SimRobot
from ceed_vla.serving.predictor import Request, Response, declared_spec

SEED = 40000
PERIOD = 0.3  # time between chunks: one step less than the executed steps [s]


class Eyes:
    """Replaces a predictor: its actions depend on every pixel of the front camera, and on nothing
    else.
    """

    def __init__(self, streams: bool) -> None:
        self.streams = streams  # whether first steps arrive before the rest
        self.spec = replace(declared_spec("student"), warmup_s=0.01)

    def predict(
        self, request: Request, deadline: None, early: Callable[[Response], None]
    ) -> Response:
        pixels = request.observation["observation.images.front"]
        actions = np.zeros((8, 7), np.float32)
        actions[:, :2] = 0.2 * (zlib.crc32(pixels.tobytes()) / 2**32 - 0.5)
        if self.streams and request.stream:
            early(Response(request.id, actions[:1], forwards=0, whole=False))
        return Response(request.id, actions, np.zeros(56, np.int64), forwards=6)


@pytest.fixture(scope="module")
def robot() -> Iterator[SimRobot]:
    made = SimRobot()
    yield made
    made.close()


def run(
    robot: SimRobot,
    latency: float,
    event: Event | None = None,
    *,
    streams: bool = False,
    **flags: Any,
) -> SimulatedLoop:
    """Run an episode from time 0 on, for 1.5 s if there is no event."""
    robot.time = 0.0
    eyes: Any = Eyes(streams)
    worker = TimedWorker(eyes, eyes.spec, latency)
    return _run(RosDemoConfig(max_episode_steps=15, **flags), robot, worker, SEED, event)[0]


def test_the_first_command_that_an_event_changes_comes_after_the_chunk_that_saw_it(
    robot: SimRobot,
) -> None:
    took = {}
    for latency in (0.02, 0.25):
        calm, event = run(robot, latency), draw_event(SEED)
        stirred = run(robot, latency, event)
        taken = first_change(calm.sent, stirred.sent) - stirred.stirred
        # An image after the event, its transport and the chunk; at most one period of the camera
        # and of chunks more.
        assert TRANSPORT + latency <= taken <= PERIOD + latency + 1 / 30 + 0.1
        same = sum(when < stirred.stirred + taken for when, *_ in stirred.sent)
        assert calm.sent[:same] == stirred.sent[:same]
        assert same > 30
        took[latency] = taken
        # no chunk from an earlier image
        assert latency < calm.moving - calm.enabled < latency + 0.1
    assert took[0.02] < took[0.25]


def test_without_a_change_in_the_scene_both_runs_are_the_same(robot: SimRobot) -> None:
    after, shift = draw_event(SEED)
    calm, stirred = run(robot, 0.02), run(robot, 0.02, (after, 0.0 * shift))
    assert after <= stirred.stirred - stirred.enabled <= after + 0.02
    assert min(len(calm.sent), len(stirred.sent)) > 120
    assert first_change(calm.sent, stirred.sent) == np.inf


def test_events_are_drawn_of_the_seed_and_small() -> None:
    after, shifts = zip(*(draw_event(seed) for seed in range(200)), strict=True)
    assert len(set(after)) == 200
    assert all(WHEN[0] <= one <= WHEN[1] for one in after)
    np.testing.assert_allclose(np.linalg.norm(shifts, axis=1), DISTANCE)
    assert draw_event(7)[0] == after[7]
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.2 * DISTANCE  # in all directions


def test_what_never_came_is_left_out() -> None:
    assert first_change([(0.0, 1), (0.1, 2), (0.2, 3)], [(0.0, 1), (0.1, 4)]) == 0.1
    assert first_change([(0.0, 1)], [(0.0, 1), (0.1, 4)]) == np.inf
    assert _percentiles([[0.1], [], [0.3]], (50, 95)) == {"p50": 200.0, "p95": 290.0}
    assert _percentiles([[], []], (50,)) == {"p50": None}


def test_camera_jitter_makes_images_late(robot: SimRobot) -> None:
    config = parse_flags(RosDemoConfig, ["--camera_jitter_ms", "60", "--simulated_time", "true"])
    assert config.camera_jitter_ms == 60.0
    late = [
        run(robot, 0.02, camera_jitter_ms=jitter).setup.controller.statistics.to_command.mean
        for jitter in (0.0, config.camera_jitter_ms)
    ]
    assert late[0] + 0.01 < late[1] < late[0] + 0.1
    with pytest.raises(ConfigError, match="--camera_jitter_ms is -1"):
        RosDemoConfig(camera_jitter_ms=-1.0)


@pytest.mark.parametrize(("latency", "starved"), [(0.08, 0), (0.8, 5)])
def test_the_first_step_moves_the_arm_before_its_chunk_is_there(
    robot: SimRobot, latency: float, starved: int
) -> None:
    """It takes the prefill, 2 of 8 forwards; the arm then holds until the rest arrives."""
    whole, early = run(robot, latency), run(robot, latency, streams=True)
    assert whole.moving - early.moving == pytest.approx(0.75 * latency, abs=0.011)  # a tick
    assert early.setup.controller.stream.counters.starved == pytest.approx(starved, abs=1)
    first = early.setup.controller.statistics.to_command[0]
    assert first < 0.25 * latency + 0.03 < whole.setup.controller.statistics.to_command[0]


@pytest.mark.parametrize("latency", [0.033, 0.083])  # not whole ticks: rounding decides ties
def test_chunks_behind_an_early_first_step_come_in_time_with_the_images(
    robot: SimRobot, latency: float
) -> None:
    whole, early = (
        run(robot, latency, streams=streams).setup.controller.statistics
        for streams in (False, True)
    )
    np.testing.assert_allclose(list(early.to_command)[1:], list(whole.to_command)[1:], atol=0.005)
