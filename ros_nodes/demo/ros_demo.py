"""``ceed-vla ros-demo``: runs episodes of the simulated robot with the policy node, as two
processes, without ROS tools.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ceed_vla.discovery import discovered
from ceed_vla.errors import ConfigError, NodeError
from ceed_vla.fields import SEEDS, Checked, chosen, ranged
from ceed_vla.files import write_text
from ceed_vla.folders import resolve_served
from ceed_vla.outputs import claimed_folder, default_console
from ceed_vla.ros_nodes.demo.report import COMMAND_RATE, Episode, build_report, console_table
from ceed_vla.ros_nodes.demo.rerun_bag import log_bag
from ceed_vla.ros_nodes.demo.server import serving
from ceed_vla.serving.predictor_types import ENGINES
from ceed_vla.sim.recording.interrupts import handled_by
from ceed_vla.sim.seeds import EVALUATION_SEEDS
from ceed_vla.sim.tabletop import MAX_EPISODE_STEPS
from ceed_vla.sim.tabletop.env import CTRL_DT
from ceed_vla.sim.tabletop.tasks import SPLITS, TASKS
from ceed_vla.viz import check_rerun

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.demo.session import Session


_DIAGNOSED = 1.2  # longest time until the next diagnostics, which come once a second [s]
_MOVING = 0.3  # speed of the fastest joint above which the arm moves [rad/s]
_DECAY = 1.5  # longest time from killing the policy node until the arm is at rest [s]


@dataclass
class RosDemoConfig(Checked, prefix="--"):
    """Run the simulated robot and the policy node as two processes and measure their messages.

    Writes ros.json, details.json (more numbers and every episode), bag.mcap (for Foxglove) and the
    output of both nodes.

    Attributes:
        episodes: Number of episodes.
        seed: First seed; the same seeds give the same scenes as in ``ceed-vla eval``.
        checkpoint: Checkpoint folder, an export, or student or teacher for a shipped checkpoint.
        output_dir: Folder for the results.
        task: Task family, or "mixed" to draw one per episode.
        split: Set of colour and phrasing combinations.
        action_interface: Interface of commands to the arm, from launch/config/tabletop_robot.yaml.
        decoding: Decoder name: ceed, jacobi, ar, cap2, ...
        engine: Engine of the policy, as the parameter of the node.
        threads: CPU threads of inference, as `inference_threads` of the node.
        pin: Cores of these threads, as `inference_pin` of the node.
        remote: Whether a server (``ceed-vla serve``) runs the policy, as a process of its own.
        replan_steps: Steps after which the next chunk is due, as the parameter of the node.
        inference_delay: Time added to every chunk, to test that the command rate does not depend on
            it [s].
        stream_seconds: Time for which the command stream is measured without a pause, after the
            episodes [s].
        kill: Whether to kill the policy node (SIGKILL) in motion at the end, and to measure the
            time until the arm is at rest.
        simulated_time: Whether to run in one process and simulated time instead: `rivals` at
            `latencies_ms` on the same episodes, success against latency, independent of the
            machine's load; writes simulated_time.json and a plot.
        rivals: Checkpoints with their decoder names.
        latencies_ms: Times from request to answer [ms].
        camera_rate: Rate of both cameras in simulated time [Hz].
        camera_jitter_ms: Largest delay of images in simulated time [ms].
        reaction: Whether to repeat every episode in simulated time with the object pushed aside
            during motion, to measure the time from the push to the first command that it changes.
        max_episode_steps: Control steps of 0.1 s after which an episode counts as failed.
        rerun: File to write for Rerun's viewer, PATH.rrd, from the bag: images, joint states,
            commands, diagnostics. Needs the extra `viz`.
        domain: ROS domain; -1 selects one by process, so that concurrent runs do not interfere.
    """

    episodes: int = ranged(10, "[1, 10000]")
    seed: int = ranged(EVALUATION_SEEDS, SEEDS)
    checkpoint: str = "student"
    output_dir: str = "outputs/ros-demo"
    task: str = chosen("mixed", ("mixed", *TASKS))
    split: str = chosen("train", SPLITS)
    action_interface: str = "forward_position"
    decoding: str = "ceed"
    engine: str = chosen("auto", ENGINES)
    threads: int = ranged(1, "[1, 64]")
    pin: str = "auto"
    remote: bool = False
    replan_steps: int = ranged(0, "[0, 64]")
    inference_delay: float = ranged(0.0, "[0, 5]")
    stream_seconds: float = ranged(0.0, "[0, 3600]")
    kill: bool = False
    simulated_time: bool = False
    rivals: list[str] = field(
        default_factory=lambda: ["teacher:ar", "teacher:cap4", "student:ceed"]
    )
    latencies_ms: list[float] = ranged([0.0, 16.0, 50.0, 100.0, 200.0, 400.0], "[0, 10000]")
    camera_rate: float = ranged(30.0, "[1, 120]")
    camera_jitter_ms: float = ranged(0.0, "[0, 1000]")
    reaction: bool = False
    max_episode_steps: int = ranged(MAX_EPISODE_STEPS, "[1, 10000]")
    rerun: str = ""
    domain: int = ranged(-1, "[-1, 101]")


UNMARKED = (
    *("ros.json", "details.json", "sim.log", "policy.log", "server.log", "simulated_time.png"),
)
REAL_TIME = (
    "checkpoint",
    "decoding",
    "engine",
    "threads",
    "pin",
    "inference_delay",
    "stream_seconds",
    "kill",
    "rerun",
    "domain",
)
SIMULATED_TIME = ("rivals", "latencies_ms", "camera_rate", "camera_jitter_ms", "reaction")


def ros_demo(config: RosDemoConfig, console: Console | None = None) -> dict[str, Any]:
    """Run the demonstration and return the contents of ros.json, or of simulated_time.json.

    Without a `console`, the terminal is used.

    `ConfigError`: The robot does not have the action interface. `CheckpointError`: There is no such
    checkpoint. `NodeError`: A node ended, refused a request or did not answer.
    """
    unread = REAL_TIME if config.simulated_time else SIMULATED_TIME
    if unused := [
        name for name in unread if getattr(config, name) != getattr(RosDemoConfig(), name)
    ]:
        raise ConfigError(
            f"--{unused[0]} is not used with --simulated_time {config.simulated_time}; remove it."
        )
    if config.remote and config.inference_delay:
        raise ConfigError("--inference_delay is not used with --remote true; remove it.")
    if config.rerun:
        check_rerun("rerun", config.rerun)
    console = console or default_console()
    own = ("bag.mcap", "simulated_time.json")
    with claimed_folder("output_dir", config.output_dir, own, own, unmarked=UNMARKED) as folder:
        if config.simulated_time:
            from ceed_vla.ros_nodes.demo.simulated_time import simulated_time  # it needs torch

            return simulated_time(config, folder, console)
        return _in_real_time(config, folder, console)


def _in_real_time(config: RosDemoConfig, folder: Path, console: Console) -> dict[str, Any]:
    """Run `ros_demo` with two processes, into its own folder."""
    from ceed_vla.ros_nodes.demo.session import Session
    from ceed_vla.ros_nodes.robot.robot_file import load_robot_config

    interface = load_robot_config().interface(config.action_interface)
    policy: dict[str, Any] = {
        "discover_packages": ",".join(discovered()),
        "action_interface": config.action_interface,
        "decoding": config.decoding,
        "replan_steps": config.replan_steps,
        "command_rate": COMMAND_RATE,
    }
    local = {
        "checkpoint": str(resolve_served(config.checkpoint)),
        "engine": config.engine,
        "inference_threads": config.threads,
        "inference_pin": config.pin,
        "inference_delay": config.inference_delay,
    }
    domain = config.domain if config.domain >= 0 else free_domain()
    reach = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    started = ["simulated robot", *(["server"] if config.remote else []), "policy node"]
    console.print(f"Starting {', '.join(started)} (ROS domain {domain}, discovery {reach}).")
    with ExitStack() as opened:
        opened.enter_context(handled_by())
        if config.remote:
            flags = {"engine": config.engine, "threads": config.threads, "pin": config.pin}
            served = serving(config.checkpoint, flags, folder / "server.log")
            policy["inference_url"] = opened.enter_context(served)
        else:
            policy |= local
        arguments = ros_arguments(policy), ros_arguments({"split": config.split})
        session = opened.enter_context(closing(Session(folder, domain, interface, *arguments)))
        session.wait_until_ready()
        episodes = []
        for seed in range(config.seed, config.seed + config.episodes):
            one = _act(
                session, config, seed, config.max_episode_steps * CTRL_DT, lambda: session.solved
            )
            result = "solved" if one.success else "failed"
            console.print(f"  {seed}  {result:<7}{one.seconds:5.1f} s  {one.instruction}")
            episodes.append(one)
        spans = [episode.span for episode in episodes]
        if config.stream_seconds:
            spans.append(_act(session, config, config.seed, config.stream_seconds).span)
            console.print(f"  commands streamed for {config.stream_seconds:.0f} s")
        session.spin(_DIAGNOSED)
        values = dict(session.policy)
        killed = _kill_in_motion(session, config, console) if config.kill else None
    bag = folder / "bag.mcap"
    report, details = build_report(
        asdict(config), episodes, spans, values, bag, f"/{interface.topic}", killed
    )
    console.print(console_table(report, details))
    written = _write(folder, report, details)
    if config.rerun:
        written.append(log_bag(bag, Path(config.rerun), f"/{interface.topic}"))
    console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)
    return report


def _write(folder: Path, report: dict[str, Any], details: dict[str, Any]) -> list[Path]:
    """Write the results; return the files to name, the bag among them."""
    for name, content in (("ros", report), ("details", details)):
        write_text(folder / f"{name}.json", json.dumps(content, indent=2) + "\n")
    return [folder / "ros.json", folder / "bag.mcap"]


def free_domain() -> int:
    """Return a ROS domain for this process, in [1, 99], other than the environment's, which a real
    arm may use.
    """
    domain = 1 + os.getpid() % 99
    taken = os.environ.get("ROS_DOMAIN_ID", "").strip()
    return domain if str(domain) != taken else 1 + domain % 99


def ros_arguments(parameters: Mapping[str, Any]) -> list[str]:
    """Return parameters as words after ``--ros-args``; texts are quoted, as ROS reads YAML."""
    return [
        word
        for name, value in parameters.items()
        for word in ("-p", f"{name}:={json.dumps(value) if isinstance(value, str) else value}")
    ]


def _begin(session: Session, config: RosDemoConfig, seed: int) -> str:
    """Draw a scene while the arm is held, then enable the policy; return the instruction."""
    instruction = session.reset_episode(seed, config.task)
    session.enable(True)
    return instruction


def _act(
    session: Session,
    config: RosDemoConfig,
    seed: int,
    seconds: float,
    until: Callable[[], bool] = lambda: False,
) -> Episode:
    """Let the policy act for `seconds`, or until a condition holds, which is a success."""
    session.enable(False)
    instruction = _begin(session, config, seed)
    began = time.time_ns()
    success = session.spin(seconds, until)
    ended = time.time_ns()
    session.enable(False)
    return Episode(seed, instruction, success, round(1e-9 * (ended - began), 2), (began, ended))


def _kill_in_motion(session: Session, config: RosDemoConfig, console: Console) -> int:
    """Kill the policy node while the arm moves; return the time [ns]."""
    _begin(session, config, config.seed)
    if not session.spin(5.0, until=lambda: session.speed > _MOVING):
        raise NodeError("The arm did not move within 5 s, so nothing was killed.")
    moment = session.kill_policy()
    session.spin(10.0 * _DECAY, until=lambda: session.heard > moment + 1e9 * _DECAY)
    console.print("  policy node killed in mid-motion")
    return moment
