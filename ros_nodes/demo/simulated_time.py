"""``ceed-vla ros-demo --simulated_time true``: success against the latency of decoding, independent
of the machine's load.

The node's own controller, stream, safety filter and interfaces drive the simulated robot in one
process, on one simulated clock. The policy really decodes; its answer arrives after a prescribed
time.

Episodes are deterministic to the last bit. The reaction time, from an event to the first command
that it changes, therefore comes from two runs of an episode, of which one has the object pushed
aside during motion: until then both runs send the same commands.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time as TimeMessage
from matplotlib.figure import Figure
from rclpy.serialization import serialize_message
from rclpy.time import Time
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sensor_msgs.msg import JointState

from ceed_vla.errors import NodeError
from ceed_vla.kinematics import Array
from ceed_vla.outputs import MADE_BY
from ceed_vla.ros_nodes.demo.server import serving
from ceed_vla.ros_nodes.robot.inference import RunsPolicy, decoded
from ceed_vla.ros_nodes.robot.local_policy import local_policy
from ceed_vla.ros_nodes.robot.messages import array_to_image
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_setup import PolicySetup, make_setup
from ceed_vla.ros_nodes.robot.pose_trust import TRUST_TIME
from ceed_vla.ros_nodes.robot.remote_policy import RemotePolicy, RemoteSettings
from ceed_vla.ros_nodes.robot.safety import Decision
from ceed_vla.ros_nodes.robot.step_grid import SLEW
from ceed_vla.ros_nodes.robot.streaming import GRIPPER_PERIOD, command_message
from ceed_vla.ros_nodes.simulated.commands import obey
from ceed_vla.ros_nodes.simulated.robot import JOINTS, SimRobot
from ceed_vla.serving.faults import LOST, SILENT
from ceed_vla.serving.predictor_types import PolicySpec, Request, Response
from ceed_vla.sim.plots import save_figure
from ceed_vla.sim.success import success_entry
from ceed_vla.sim.tabletop.env import CTRL_DT

TRANSPORT = 0.002  # from an image's stamp to its arrival, as between the processes [s]
DISTANCE = 0.04  # by which the object is moved [m]
WHEN = (0.2, 0.8)  # range of event times after `enable`: in motion, before most grasps [s]
PATIENCE = 1.5  # longest time until a command differs [s]
Event = tuple[float, Array]  # time after `enable` [s], shift of the object (2,) [m]
_STATES = 0.01  # time between joint states [s]
TIE = 1e-9  # an answer that is due at a tick, up to rounding, comes before it [s]
_PATIENCE = 60.0  # time limit for an answer of a server, in real time [s]
_PREFILL = 2  # number of forwards that take as long as the prefill
# percentiles
_TIMES = {
    "observation_to_command_ms": (50, 99),
    "first_action_ms": (50, 95),
    "reaction_ms": (50, 95),
}


def draw_event(seed: int) -> Event:
    """Draw the event of an episode, which is the same for all policies."""
    random = np.random.default_rng([seed, 1])
    after = random.uniform(*WHEN)
    angle = random.uniform(0.0, 2.0 * np.pi)
    return after, DISTANCE * np.array([np.cos(angle), np.sin(angle)])


def first_change(calm: Sequence[Any], stirred: Sequence[Any]) -> float:
    """Return the time at which the run with the event first sent another command than the run
    without [s]; inf if it never did. Both are sequences of (time, ...).
    """
    return next(
        (ours[0] for theirs, ours in zip(calm, stirred, strict=False) if theirs != ours), np.inf
    )


class TimedWorker:
    """Replaces an `InferenceWorker` by one whose answers take `latency` [s] of simulated time.

    Certain first steps arrive earlier, in proportion to the forwards that they take; the prefill
    counts as `_PREFILL` forwards.
    """

    failed: str | None = None
    ready = True

    def __init__(self, policy: RunsPolicy, spec: PolicySpec, latency: float) -> None:
        self.spec = replace(spec, warmup_s=latency)
        self.now = 0.0
        self._policy = policy
        self._latency = latency
        self._answers: list[Response] = []  # in order of arrival
        self._asked = 0.0

    def begin(self) -> None:
        """Do nothing: the policy is loaded already."""

    @property
    def idle(self) -> bool:
        return not self._answers

    @property
    def due(self) -> float:
        """Time at which the next answer arrives [s]."""
        return self._asked + self._answers[0].seconds["total"] if self._answers else np.inf

    def submit(self, request: Request) -> bool:
        self._asked = self.now
        request, _ = decoded(request)
        self._answers.append(self._policy.predict(request, None, self._answers.append))
        if self._answers[-1].code in (LOST, SILENT):  # no latency of the prescribed ones
            raise NodeError(str(self._answers[-1].error))
        forwards = _PREFILL + self._answers[-1].forwards
        for answer in self._answers:
            answer.seconds["total"] = self._latency * (_PREFILL + answer.forwards) / forwards
        return True

    def poll(self) -> Response | None:
        return self._answers.pop(0) if self.now >= self.due - 1e-9 else None


class SimulatedLoop:
    """One episode on one clock; `values` are of `POLICY_PARAMETERS`.

    Attributes:
        sent: For every tick, the time [s], the arm's message and the gripper's opening [m].
        enabled, moving, stirred: Times at which motion was enabled, the first command in motion was
            sent, and the `event` took place [s].
    """

    def __init__(self, robot: SimRobot, worker: TimedWorker, values: dict[str, Any]) -> None:
        self.robot, self.worker = robot, worker
        self.setup: PolicySetup = make_setup(values, lambda: None, SLEW, lambda *_, **__: worker)
        self._last: Decision | None = None
        self._gripped = np.nan, -np.inf
        self.sent: list[tuple[float, Any, Any]] = []
        self.enabled = self.moving = self.stirred = np.inf

    def episode(
        self,
        seconds: float,
        camera_rate: float,
        jitter: float,
        seed: int,
        event: Event | None = None,
    ) -> bool:
        """Let the policy act for `seconds`; images arrive up to `jitter` [s] late.

        Returns whether the task was solved.
        """
        controller, cameras = self.setup.controller, self.setup.observations.cameras
        random = np.random.default_rng(seed)
        start = self.robot.time
        state = start
        tick = start + 0.004
        # The episode begins when the pose is trusted: the first image then arrives, and motion is
        # enabled.
        image = start + TRUST_TIME + random.uniform(0.0, 1.0 / camera_rate)
        arriving: list[tuple[float, int, dict[str, Any], float]] = []
        serial = itertools.count()
        while True:
            now = min(state, tick, image, self.worker.due, arriving[0][0] if arriving else np.inf)
            self.robot.advance(now - self.robot.time)
            self.worker.now = now
            if self.worker.due <= now + TIE:
                controller.receive(now)
            elif now == state:
                state += _STATES
                if event is not None and now - self.enabled >= event[0] and now < self.stirred:
                    self.stirred = now
                    self.robot.move_target(event[1])
                self._measure(now)
                if self.robot.success or now - start > seconds:
                    return self.robot.success
            elif now == image:
                image += 1.0 / camera_rate
                late = TRANSPORT + random.uniform(0.0, jitter)
                heapq.heappush(arriving, (now + late, next(serial), self.robot.images(), now))
            elif arriving and now == arriving[0][0]:
                _, _, pixels, taken = heapq.heappop(arriving)
                for camera in cameras:
                    message = array_to_image(pixels[camera.source.name], _stamp(taken), "")
                    camera.take(serialize_message(message))
                if now < self.enabled and controller.enable(now) is None:
                    self.enabled = now
                controller.observed(now)
            else:
                self._tick(now)
                tick += controller.grid.period

    def _measure(self, now: float) -> None:
        message = JointState(name=list(JOINTS), position=self.robot.positions.tolist())
        message.header.stamp = _stamp(now)
        self.setup.safety.measure(*self.setup.observations.take_joints(message))

    def _tick(self, now: float) -> None:
        controller = self.setup.controller
        decision = controller.tick(now, now)
        message = command_message(self.setup, decision, self._last, _stamp(now))
        self._last = decision
        self.sent.append((now, message, decision and decision.gripper))
        if decision is not None and decision.hold is None:
            self.moving = min(self.moving, now)
        if message is not None:
            obey(self.robot, message, now)
            # as `Streaming` sends it
            if decision is not None and (opening := decision.gripper) is not None:
                last, at = self._gripped
                if opening != last or now - at >= GRIPPER_PERIOD:
                    self._gripped = opening, now
                    self.robot.command_gripper([opening])
        controller.after_tick(now)


def simulated_time(config: Any, folder: Path, console: Console) -> dict[str, Any]:
    """Run every rival of a `RosDemoConfig` at every latency; write simulated_time.json and a plot.

    Returns the content of simulated_time.json.
    """
    rows = []
    with closing(SimRobot(config.split)) as robot:
        for rival in config.rivals:
            checkpoint, _, decoding = rival.partition(":")
            with _policy(config, folder, checkpoint, decoding or "ceed") as policy:
                spec = replace(policy.load(), checkpoint=checkpoint)
                for latency in config.latencies_ms:
                    title = f"{rival} {latency:g} ms"
                    seeds = range(config.seed, config.seed + config.episodes)
                    shown = track(seeds, title, console=console, transient=True)
                    episodes = [
                        _episode(
                            config, robot, partial(TimedWorker, policy, spec, 1e-3 * latency), seed
                        )
                        for seed in shown
                    ]
                    rows.append({"rival": rival, "latency_ms": latency, **_row(episodes)})
    report = {"program": MADE_BY, "config": asdict(config), "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "simulated_time.json").write_text(
        json.dumps(report, indent=2) + "\n", encoding="utf-8"
    )
    save_figure(_figure(rows), folder / "simulated_time.png")
    titles = (f"{key[:-3].replace('_', ' ')} {' / '.join(rows[0][key])}, ms" for key in _TIMES)
    table = Table("policy", "latency, ms", "solved", "95 %", *titles)
    for row in rows:
        low, high = row["success_ci95"]
        cells = f"{row['success']} of {row['episodes']}", f"{100 * low:.0f}-{100 * high:.0f} %"
        measured = (" / ".join(str(value or "-") for value in row[key].values()) for key in _TIMES)
        table.add_row(row["rival"], f"{row['latency_ms']:g}", *cells, *measured)
    console.print(table)
    console.print(f"Written: {folder / 'simulated_time.json'}", soft_wrap=True, highlight=False)
    return report


@contextmanager
def _policy(config: Any, folder: Path, checkpoint: str, decoding: str) -> Iterator[RunsPolicy]:
    """Where a rival runs: in this process, or on a server of its own."""
    replan_steps = config.replan_steps or None
    with ExitStack() as opened:
        policy: RunsPolicy
        if config.remote:
            url = opened.enter_context(
                serving(checkpoint, {"engine": "eager"}, folder / "server.log")
            )
            policy = RemotePolicy(
                RemoteSettings(
                    url, timeout_s=_PATIENCE, decoding=decoding, replan_steps=replan_steps
                )
            )
            opened.callback(policy.stop, 0.0)
        else:
            policy = local_policy(
                checkpoint,
                mode="thread",
                decoding=decoding,
                replan_steps=replan_steps,
                warmup=1,
            )
        yield policy


def _row(episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of all episodes of a rival at a latency."""
    return {
        **success_entry(one["success"] for one in episodes),
        **{key: _percentiles([one[key] for one in episodes], of) for key, of in _TIMES.items()},
        "reactions": sum(len(one["reaction_ms"]) for one in episodes),
        "seconds": [one["seconds"] for one in episodes],
        "failed": [one["seed"] for one in episodes if not one["success"]],
    }


def _episode(
    config: Any, robot: SimRobot, make_worker: Callable[[], TimedWorker], seed: int
) -> dict[str, Any]:
    """Return the results of one episode; times are lists [s], empty without a value."""
    began = robot.time
    loop, success = _run(config, robot, make_worker(), seed)
    ended, answered = robot.time, np.inf
    if config.reaction:
        robot.time = began  # so that all times are equal to the last bit
        stirred, _ = _run(config, robot, make_worker(), seed, draw_event(seed))
        answered = first_change(loop.sent, stirred.sent) - stirred.stirred
        robot.time = ended
    times = {"first_action_ms": [loop.moving - loop.enabled], "reaction_ms": [answered]}
    times = {key: [one for one in of if one < np.inf] for key, of in times.items()}
    times["observation_to_command_ms"] = list(loop.setup.controller.statistics.to_command)
    return {"seed": seed, "success": success, "seconds": round(ended - began, 2), **times}


def _run(
    config: Any, robot: SimRobot, worker: TimedWorker, seed: int, event: Event | None = None
) -> tuple[SimulatedLoop, bool]:
    """Run one episode, or until after an `event`; return the loop, and whether it was solved."""
    changes = {name: getattr(config, name) for name in ("action_interface", "replan_steps")}
    changes |= {
        "checkpoint": worker.spec.checkpoint,
        "instruction": robot.reset(seed, config.task),
    }
    loop = SimulatedLoop(robot, worker, {**defaults(POLICY_PARAMETERS), **changes})
    # The time until the pose is trusted is not part of the episode.
    limit = TRUST_TIME + (
        config.max_episode_steps * CTRL_DT if event is None else event[0] + PATIENCE
    )
    return loop, loop.episode(
        limit, config.camera_rate, 1e-3 * config.camera_jitter_ms, seed, event
    )


def _percentiles(lists: list[list[float]], shares: tuple[int, ...]) -> dict[str, float | None]:
    """Return percentiles of all times [s], in milliseconds; None without any."""
    times = list(itertools.chain(*lists))
    return {
        f"p{s}": round(1e3 * float(np.percentile(times, s)), 1) if times else None for s in shares
    }


def _figure(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for rival in dict.fromkeys(row["rival"] for row in rows):
        own = [row for row in rows if row["rival"] == rival]
        latency = [r["latency_ms"] for r in own]
        share = np.array([100 * r["success_rate"] for r in own])
        bounds = 100 * np.array([row["success_ci95"] for row in own]).T
        axes.errorbar(latency, share, np.abs(bounds - share), label=rival, marker="o", capsize=3)
    axes.set(xlabel="latency of a chunk [ms]", ylabel="solved [%]", ylim=(0, 102))
    axes.legend()
    return figure


def _stamp(now: float) -> TimeMessage:
    return Time(nanoseconds=round(1e9 * now)).to_msg()
