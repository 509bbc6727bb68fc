"""What operators may do when, and what becomes of an episode, with a worker of the test."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ceed_vla.ros_nodes.record.episode import EpisodeRows
from ceed_vla.ros_nodes.record.protocol import (
    DISCARD,
    END,
    FAILED,
    READY,
    ROW,
    STORED,
    Reply,
    Request,
)
from ceed_vla.ros_nodes.record.recorder import FULL, Phase, Recorder
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config

ROBOT = """
images: {observation.images.front: {topic: front}}
joint_states: {topic: joint_states}
state: {observation.state: [joint_positions]}
arm: {joints: [a, b]}
action: {kind: joint_position, dt: 0.1}
limits: {position: {low: [-3, -3], high: [3, 3]}, velocity: [1, 1], step: [1, 1]}
interfaces: {forward_position: {topic: commands}}
"""


class Worker:
    """Stores nothing, and replies as told."""

    def __init__(self) -> None:
        self.ready = False
        self.failed: str | None = None
        self.waiting = 0
        self.requests: list[Request] = []
        self.replies = [Reply(READY, 0, 2, 50)]

    def request(self, request: Request) -> None:
        self.requests.append(request)

    def poll(self) -> Reply | None:
        self.ready = True
        return self.replies.pop(0) if self.replies else None

    @property
    def kinds(self) -> list[str]:
        return [request.kind for request in self.requests]


def message(stamp: float, **fields: Any) -> Any:
    whole = int(stamp)
    time = SimpleNamespace(sec=whole, nanosec=round(1e9 * (stamp - whole)))
    return SimpleNamespace(header=SimpleNamespace(stamp=time, frame_id="policy"), **fields)


class Bench:
    """A recorder, and a robot that sends."""

    def __init__(self, folder: Path) -> None:
        (folder / "robot.yaml").write_text(ROBOT)
        self.worker = Worker()
        self.events: list[dict[str, Any]] = []
        rows = EpisodeRows(load_robot_config(folder / "robot.yaml"), None)
        tell = self.events.append
        self.recorder = Recorder(rows, self.worker, 1000, lambda text: tell(json.loads(text)))
        self.now = 10.0
        self.who = "policy"  # commands the arm

    def run(self, seconds: float, *, camera: bool = True, arm: bool = True) -> None:
        """Let the robot send for a time [s]."""
        for _ in range(round(seconds / 0.02)):
            self.now += 0.02
            if arm:
                joints = message(self.now, name=["b", "a"], position=[0.2, 0.1])
                joints.header.frame_id = self.who
                self.recorder.rows.take_joints(joints)
                self.recorder.rows.take_commands(joints)
            if camera:
                self.recorder.rows._put("front", self.now, SimpleNamespace(data=b"pixels"))
            self.recorder.advance(self.now)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    one = Bench(tmp_path)
    assert not one.recorder.start(one.now).accepted  # it still loads
    one.run(1.0)
    assert str(one.recorder) == "idle: 2 episodes stored"
    one.recorder.instruction = "pick it up"
    return one


def test_an_episode_from_start_to_stored(bench: Bench) -> None:
    recorder = bench.recorder
    assert recorder.start(bench.now).text == "recording episode 2"
    bench.run(1.0)
    assert not recorder.start(bench.now).accepted
    stopped = bench.now
    assert recorder.stop(bench.now, success=True).accepted
    bench.run(0.5)
    assert bench.worker.kinds == [ROW] * 9 + [END]
    row = bench.worker.requests[0].row
    assert row is not None
    assert row.values["observation.state"].tolist() == pytest.approx([0.1, 0.2])
    assert row.values["action"].tolist() == pytest.approx([0.1, 0.2])
    assert bench.worker.requests[0].task == "pick it up"
    assert bench.worker.requests[-1].success
    assert recorder.phase is Phase.STORING
    bench.worker.replies.append(Reply(STORED, 1, 3, 60, damaged=1))
    bench.run(0.1)
    assert str(recorder) == "idle: stored episode 2: 10 frames; 1 damaged images"
    assert bench.events == [
        {"event": "start", "time": pytest.approx(stopped - 1.0), "instruction": "pick it up"},
        {"event": "stop", "time": stopped, "success": True},
    ]


def test_an_intervention_is_a_whole_step_of_the_person(bench: Bench) -> None:
    bench.recorder.start(bench.now)
    for bench.who, seconds in (("policy", 0.34), ("person", 0.4), ("policy", 0.5)):
        bench.run(seconds)
    rows = [request.row for request in bench.worker.requests if request.row is not None]
    flags = [row.intervention for row in rows]
    # The person commands from 0.34 s to 0.74 s: in the whole steps that begin at 0.4, 0.5, 0.6.
    assert flags == [0.35 < 0.1 * step < 0.65 for step in range(len(flags))]
    assert sum(flags) == 3


def test_without_an_instruction_nothing_starts(bench: Bench) -> None:
    bench.recorder.instruction = "  "
    answer = bench.recorder.start(bench.now)
    assert (answer.accepted, bench.events) == (False, [])
    assert answer.text.startswith("There is no instruction: publish one")


def test_discard(bench: Bench) -> None:
    assert not bench.recorder.discard().accepted
    bench.recorder.start(bench.now)
    bench.run(1.0)
    assert bench.recorder.discard().text == "discarded 9 frames"
    bench.run(1.0)
    assert bench.worker.kinds == [ROW] * 9 + [DISCARD]
    assert bench.recorder.start(bench.now).accepted


def test_an_episode_waits_for_inputs(bench: Bench) -> None:
    bench.run(2.0, camera=False)
    answer = bench.recorder.start(bench.now)
    assert answer.text == "recording episode 2; it begins when front send"
    bench.run(1.0, camera=False)
    bench.recorder.stop(bench.now, success=True)
    bench.run(1.0, camera=False)
    assert str(bench.recorder) == "idle: nothing is stored: the episode has no frame"


def test_a_silent_input_ends_the_episode_which_may_still_be_stored(bench: Bench) -> None:
    bench.recorder.start(bench.now)
    bench.run(1.0)
    bench.run(1.0, camera=False)
    assert bench.recorder.phase is Phase.ENDED
    assert "front sent nothing for" in bench.recorder.detail
    rows = len(bench.worker.requests)
    bench.run(1.0)
    assert len(bench.worker.requests) == rows
    assert bench.recorder.stop(bench.now, success=False).accepted
    bench.run(0.1)
    assert bench.worker.requests[-1] == Request(END, 1, success=False)


def test_a_slow_disk_ends_the_episode(bench: Bench) -> None:
    bench.recorder.start(bench.now)
    bench.worker.waiting = 2_000_000
    bench.run(1.0)
    assert bench.recorder.phase is Phase.ENDED
    assert "2 MB of images wait to be stored" in bench.recorder.detail


def test_an_episode_ended_by_a_slow_disk_does_not_go_on(bench: Bench) -> None:
    bench.recorder.start(bench.now)
    bench.run(1.0)
    bench.worker.waiting = 2_000_000
    bench.run(0.1)
    assert bench.recorder.phase is Phase.ENDED
    assert bench.events[-1]["event"] == FULL  # for those who make the episode from a bag
    ended = bench.events[-1]["time"]
    rows = bench.worker.kinds.count(ROW)
    bench.run(60.0)
    series = bench.recorder.rows._sampler._series.values()
    assert max(len(one.stamps) for one in series) < 300
    assert bench.recorder.stop(bench.now, success=True).accepted
    assert bench.events[-1]["time"] == ended
    bench.run(0.5)
    assert bench.worker.kinds.count(ROW) <= rows + 3  # of the time before the end
    assert bench.worker.kinds[-1] == END
    bench.worker.replies.append(Reply(STORED, 1, 3, 60))
    bench.worker.waiting = 0
    bench.run(1.0)
    assert bench.recorder.start(bench.now).accepted
    bench.run(1.0)
    assert bench.worker.kinds[-1] == ROW


def test_an_episode_that_cannot_be_stored_is_lost_alone(bench: Bench) -> None:
    bench.recorder.start(bench.now)
    bench.run(0.5)
    bench.worker.replies.append(Reply(FAILED, 1, 2, 50, error="The disk is nearly full."))
    bench.run(0.1)
    assert str(bench.recorder) == "idle: the episode is lost: The disk is nearly full."
    assert bench.worker.requests[-1].kind == DISCARD
    assert bench.events[-1] == {"event": "discard"}
    assert bench.recorder.start(bench.now).accepted
    bench.worker.replies.append(Reply(FAILED, 1, 2, 50, error="The disk is nearly full."))
    bench.run(0.1)
    assert bench.recorder.phase is Phase.RECORDING  # a reply about the episode before


def test_a_stopped_episode_is_stored_although_the_node_ends(bench: Bench) -> None:
    bench.recorder.start(bench.now)
    bench.run(1.0)
    bench.recorder.stop(bench.now, success=True)
    bench.recorder.finish()
    assert bench.worker.kinds == [ROW] * 9 + [END]
    bench.recorder.finish()
    assert bench.worker.kinds[-1] == END


def test_memory_does_not_grow_between_episodes(bench: Bench) -> None:
    for _ in range(2):
        bench.recorder.start(bench.now)
        bench.run(0.5)
        bench.recorder.discard()
        bench.run(30.0)
        series = bench.recorder.rows._sampler._series.values()
        assert max(len(one.stamps) for one in series) < 200
    bench.recorder.start(bench.now)
    bench.run(0.5)
    bench.run(30.0, camera=False)
    assert bench.recorder.phase is Phase.ENDED
    assert max(len(one.stamps) for one in series) < 200


def test_the_end_of_the_process_that_stores_is_final(bench: Bench) -> None:
    bench.recorder.start(bench.now)
    bench.worker.failed = "The process that stores ended (exit code -9)."
    bench.run(0.1)
    assert str(bench.recorder) == "failed: The process that stores ended (exit code -9)."
    bench.run(30.0)
    series = bench.recorder.rows._sampler._series.values()
    assert max(len(one.stamps) for one in series) < 200
    assert not bench.recorder.start(bench.now).accepted
