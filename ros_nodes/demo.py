"""``ceed-vla ros-demo``: episodes of the simulated robot under the policy node, two processes, without ROS tools."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ceed_vla.checkpoints import resolve_checkpoint
from ceed_vla.errors import ConfigError, NodeError
from ros_nodes.run_metrics import Window, command_timing, counts, number
from sim.evaluate import EVALUATION_SEEDS, default_console
from sim.rollout import MAX_EPISODE_STEPS, wilson_interval
from sim.tabletop.env import CTRL_DT
from sim.tabletop.tasks import SPLITS, TASKS, check_choice

if TYPE_CHECKING:
    from ros_nodes.demo_session import Session

INTERFACES = ("forward_position", "joint_trajectory", "servo_twist")
COMMAND_RATE = 100.0  # of the policy node [Hz]
_SETTLE = 0.3  # after a reset, until the policy has seen the new scene [s]
_DIAGNOSED = 1.2  # until the next diagnostics, which come once a second [s]
_MOVING, _RESTING = 0.3, 0.05  # speed of the fastest arm joint [rad/s]
_DECAY = 1.5  # after the policy node was killed, until the arm must have come to rest [s]


@dataclass
class RosDemoConfig:
    """Run the simulated robot and the policy node as two processes and measure what passes between them.

    Writes ros.json, details.json (more numbers and every episode), bag.mcap (for Foxglove) and both nodes' output.

    Attributes:
        episodes: Number of episodes.
        seed: First seed; the same seeds give the same scenes as in ``ceed-vla eval``.
        checkpoint: Checkpoint folder, or student or teacher for the shipped ones.
        output_dir: Folder for the results.
        task: "mixed" or a task family.
        split: Colour and phrase combinations: "train", "heldout" or "all".
        action_interface: How commands reach the arm: forward_position, joint_trajectory or servo_twist.
        decoding: How the checkpoint decodes: ceed, jacobi or ar.
        inference_delay: Slows every chunk, to see that the command rate does not depend on it [s].
        stream_seconds: Afterwards the command stream is measured for so long without a pause [s].
        kill: At the end, kill the policy node (SIGKILL) in mid-motion and measure how soon the arm rests.
        max_episode_steps: Control steps of 0.1 s after which an episode counts as failed.
        domain: ROS domain; -1 picks one, so that runs side by side do not meet.
    """

    episodes: int = 10
    seed: int = EVALUATION_SEEDS
    checkpoint: str = "student"
    output_dir: str = "outputs/ros-demo"
    task: str = "mixed"
    split: str = "train"
    action_interface: str = "forward_position"
    decoding: str = "ceed"
    inference_delay: float = 0.0
    stream_seconds: float = 0.0
    kill: bool = False
    max_episode_steps: int = MAX_EPISODE_STEPS
    domain: int = -1


@dataclass(frozen=True)
class Episode:
    """One episode through ROS.

    Attributes:
        seed: Its seed.
        instruction: What the policy was told.
        success: Solved in time.
        seconds: From enabling the policy to the end [s].
        window: When the command stream counts [ns].
    """

    seed: int
    instruction: str
    success: bool
    seconds: float
    window: Window


def ros_demo(config: RosDemoConfig, console: Console | None = None) -> dict[str, Any]:
    """Run the demonstration.

    Args:
        config: Options.
        console: Where progress and the table go; the terminal if None.

    Returns:
        The content of ``ros.json``.

    Raises:
        ConfigError: An option that cannot work, or ROS is not installed.
        CheckpointError: No such checkpoint.
        SimulationError: An unknown task or split.
        NodeError: A node ended, refused a request or did not answer.
    """
    check(config)
    try:
        from ros_nodes.demo_session import Session
    except ImportError as error:
        raise ConfigError(f"ros-demo needs ROS 2; install ceed_vla[ros2] ({error}).") from error
    console = console or default_console()
    folder = Path(config.output_dir)
    policy = {
        "checkpoint": str(resolve_checkpoint(config.checkpoint)),
        "action_interface": config.action_interface,
        "decoding": config.decoding,
        "inference_delay": config.inference_delay,
        "command_rate": COMMAND_RATE,
    }
    domain = config.domain if config.domain >= 0 else 1 + os.getpid() % 99
    console.print(f"Starting simulated robot and policy node (ROS domain {domain}, this machine only).")
    with Session(
        folder,
        domain,
        config.action_interface,
        policy_arguments=ros_arguments(policy),
        sim_arguments=ros_arguments({"split": config.split}),
    ) as session:
        session.wait_until_ready()
        episodes = [
            _run_episode(session, config, config.seed + index, console) for index in range(config.episodes)
        ]
        windows = [episode.window for episode in episodes]
        if config.stream_seconds:
            windows.append(_stream(session, config, console))
        session.spin(_DIAGNOSED)
        values = dict(session.policy)
        killed = _kill_in_motion(session, config, console) if config.kill else None
    bag = folder / "bag.mcap"
    report, details = build_report(config, episodes, windows, values, bag, killed)
    for name, content in (("ros", report), ("details", details)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    console.print(_table(report, details))
    console.print(f"Written: {folder / 'ros.json'}, {bag}", soft_wrap=True, highlight=False)
    return report


def check(config: RosDemoConfig) -> None:
    """Check the options before anything is started.

    Raises:
        ConfigError: Names the option, its value and what is allowed.
        SimulationError: An unknown task or split.
    """
    check_choice("task", config.task, (*TASKS, "mixed"))
    check_choice("split", config.split, SPLITS)
    for option, choices in (("action_interface", INTERFACES), ("decoding", ("ceed", "jacobi", "ar"))):
        if getattr(config, option) not in choices:
            raise ConfigError(
                f"--{option} is {getattr(config, option)!r}; choose one of {', '.join(choices)}."
            )
    for option, low, high in (
        ("episodes", 1, 10_000),
        ("seed", 0, 2**31 - 1),
        ("max_episode_steps", 1, 10_000),
        ("inference_delay", 0.0, 5.0),
        ("stream_seconds", 0.0, 3600.0),
        ("domain", -1, 101),
    ):
        if not low <= getattr(config, option) <= high:
            raise ConfigError(f"--{option} is {getattr(config, option)}; it must be in [{low}, {high}].")


def ros_arguments(parameters: Mapping[str, Any]) -> list[str]:
    """Parameters as words behind ``--ros-args``. Texts are quoted: ROS reads values as YAML."""
    return [
        word
        for name, value in parameters.items()
        for word in ("-p", f"{name}:={json.dumps(value) if isinstance(value, str) else value}")
    ]


def build_report(
    config: RosDemoConfig,
    episodes: Sequence[Episode],
    windows: Sequence[Window],
    policy: Mapping[str, str],
    bag: Path,
    killed: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``ros.json`` and ``details.json`` contain.

    Times come from the bag, latencies and interventions from the policy's diagnostics.

    Args:
        config: Options.
        episodes: Finished episodes.
        windows: When the command stream ran [ns].
        policy: Last diagnostics of the policy node.
        bag: What was recorded.
        killed: When the policy node was killed [ns].
    """
    from ros_nodes.bag import read_messages, sent_times
    from ros_nodes.demo_session import COMMAND_TOPICS

    topic = COMMAND_TOPICS[config.action_interface][0]
    timing = command_timing(sent_times(bag, topic), windows, 1.0 / COMMAND_RATE)
    solved = sum(episode.success for episode in episodes)
    seam, inner = number(policy, "seam_step_max"), number(policy, "inner_step_max")
    holds, clamps = counts(policy, "holds"), counts(policy, "clamps")
    holds.pop("disabled", None)  # between episodes, on request
    report = {
        "command_rate_hz": round(timing.rate, 2),
        "missed_ticks_fraction": round(timing.missed, 5),
        "jitter_ms": {"p50": round(1e3 * timing.jitter_p50, 3), "p99": round(1e3 * timing.jitter_p99, 3)},
        "episodes": len(episodes),
        "success_rate": round(solved / len(episodes), 4),
        "success_ci95": [round(bound, 4) for bound in wilson_interval(solved, len(episodes))],
        "seam_step_ratio": round(seam / inner, 3) if seam is not None and inner else None,
        "observation_to_command_ms": _percentiles(policy, "observation_to_command_ms", ("p50", "p99")),
        "decode_ms": _percentiles(policy, "decode_ms", ("p50", "p95", "p99")),
        "holds": sum(holds.values()),
        "clamps": sum(clamps.values()),
    }
    details = {
        "holds_by_reason": holds,
        "clamps_by_kind": clamps,
        "commands": timing.commands,
        "longest_gap_ms": round(1e3 * timing.longest, 2),
        "beyond_decode_ms": _percentiles(policy, "beyond_decode_ms", ("p50", "p99")),
        "forwards_mean": number(policy, "forwards_mean"),
        "exit_reasons": policy.get("exit_reasons", ""),
        "deadline_misses": number(policy, "deadline_misses"),
        "late_chunks": number(policy, "late_chunks"),
        "starved": number(policy, "starved"),
        "scheduling": policy.get("scheduling", ""),
        "rest_after_kill_ms": None
        if killed is None
        else rest_after(((sent, m) for _, sent, m in read_messages(bag, ["/joint_states"])), killed),
        "config": asdict(config),
        "per_episode": [
            {
                "seed": episode.seed,
                "instruction": episode.instruction,
                "success": episode.success,
                "seconds": round(episode.seconds, 2),
            }
            for episode in episodes
        ],
    }
    return report, details


def rest_after(states: Iterable[tuple[int, Any]], moment: int) -> float | None:
    """Time from `moment` [ns] to the last joint state in which an arm joint still moves [ms]; None if it never rests.

    Args:
        states: (time of sending [ns], joint state) in order.
        moment: [ns].
    """
    moving, resting = 0.0, False
    for sent, state in states:
        if sent >= moment:
            resting = max(abs(speed) for speed in state.velocity) <= _RESTING
            moving = moving if resting else 1e-6 * (sent - moment)
    return round(moving, 1) if resting else None


def _run_episode(session: Session, config: RosDemoConfig, seed: int, console: Console) -> Episode:
    """Draw the scene with the arm held, then let the policy act until success or the time limit."""
    session.enable(False)
    instruction = session.reset_episode(seed, config.task)
    session.spin(_SETTLE)
    session.enable(True)
    start, began = time.monotonic(), time.time_ns()
    success = session.spin(config.max_episode_steps * CTRL_DT, until=lambda: session.solved)
    seconds, ended = time.monotonic() - start, time.time_ns()
    session.enable(False)
    console.print(f"  {seed}  {'solved' if success else 'failed':<7}{seconds:5.1f} s  {instruction}")
    return Episode(seed, instruction, success, seconds, (began, ended))


def _stream(session: Session, config: RosDemoConfig, console: Console) -> Window:
    """Let the policy act for a time, whatever it achieves."""
    session.reset_episode(config.seed, config.task)
    session.spin(_SETTLE)
    session.enable(True)
    began = time.time_ns()
    session.spin(config.stream_seconds)
    ended = time.time_ns()
    session.enable(False)
    console.print(f"  commands streamed for {config.stream_seconds:.0f} s")
    return began, ended


def _kill_in_motion(session: Session, config: RosDemoConfig, console: Console) -> int:
    """Kill the policy node while the arm moves; when [ns].

    Raises:
        NodeError: The arm did not move.
    """
    session.reset_episode(config.seed, config.task)
    session.spin(_SETTLE)
    session.enable(True)
    if not session.spin(5.0, until=lambda: session.speed > _MOVING):
        raise NodeError("The arm did not move within 5 s, so nothing was killed.")
    moment = session.kill_policy()
    session.spin(_DECAY)
    console.print("  policy node killed in mid-motion")
    return moment


def _percentiles(policy: Mapping[str, str], name: str, shares: Sequence[str]) -> dict[str, float | None]:
    return {share: number(policy, f"{name}_{share}") for share in shares}


def _table(report: Mapping[str, Any], details: Mapping[str, Any]) -> Table:
    """The main numbers for the terminal."""
    low, high = report["success_ci95"]
    solved = round(report["success_rate"] * report["episodes"])
    latency, decode, jitter = report["observation_to_command_ms"], report["decode_ms"], report["jitter_ms"]
    table = Table(show_header=False)
    rows = (
        ("success", f"{solved} of {report['episodes']}  [{100 * low:.0f} %, {100 * high:.0f} %]"),
        ("command rate", f"{report['command_rate_hz']:.2f} Hz of {COMMAND_RATE:.0f}"),
        ("missed ticks", f"{100 * report['missed_ticks_fraction']:.2f} %"),
        ("jitter p50 / p99", f"{jitter['p50']:.2f} / {jitter['p99']:.2f} ms"),
        ("decode p50 / p95 / p99", f"{_ms(decode, 'p50', 'p95', 'p99')} ms"),
        ("observation to command p50 / p99", f"{_ms(latency, 'p50', 'p99')} ms"),
        ("the same without decoding", f"{_ms(details['beyond_decode_ms'], 'p50', 'p99')} ms"),
        ("joint step at seams / inside chunks", f"{report['seam_step_ratio'] or '-'}"),
        (
            "ticks held, by reason",
            ", ".join(f"{k} {v}" for k, v in details["holds_by_reason"].items()) or "0",
        ),
        ("commands clamped", ", ".join(f"{k} {v}" for k, v in details["clamps_by_kind"].items()) or "0"),
        ("scheduling of the command stream", details["scheduling"]),
    )
    if details["config"]["kill"]:
        rest = details["rest_after_kill_ms"]
        rows += (("killed: arm at rest after", "never" if rest is None else f"{rest:.0f} ms"),)
    for name, value in rows:
        table.add_row(name, value)
    return table


def _ms(values: Mapping[str, float | None], *shares: str) -> str:
    return " / ".join("-" if values[share] is None else f"{values[share]:.1f}" for share in shares)
