"""The results of ``ceed-vla ros-demo``: ros.json, details.json and the table on the terminal.

The timing of commands comes from their times of sending, everything else from the node's
diagnostics.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.demo.bag import read_messages
from ceed_vla.ros_nodes.robot.loop_statistics import MISSED
from ceed_vla.sim.success import success_entry

COMMAND_RATE = 100.0  # of the policy node [Hz]
_RESTING = 0.05  # speed of the fastest joint below which the arm is at rest [rad/s]
Span = tuple[int, int]  # first and last moment [ns]


@dataclass(frozen=True)
class Episode:
    """One episode through ROS."""

    seed: int
    instruction: str
    success: bool  # whether it was solved in time
    seconds: float  # from enabling the policy to the end [s]
    span: Span  # in which the command stream counts [ns]


def command_timing(
    sent: Sequence[int], spans: Sequence[Span]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of ros.json and of details.json about the timing of commands.

    Args:
        sent: Times of sending [ns].
        spans: First and last moments of motion [ns]; pauses between spans do not count.

    Jitter is |interval - period|; an interval of more than `MISSED` periods is a missed tick.
    `ConfigError`: No span contains two commands.
    """
    times = np.sort(np.asarray(sent, dtype=np.int64))
    parts = [times[(times >= start) & (times <= end)] for start, end in spans]
    intervals = np.concatenate([np.diff(part) for part in parts]) * 1e-9 if parts else np.zeros(0)
    if not len(intervals):
        raise ConfigError(
            f"{len(times)} commands in {len(spans)} spans of motion have no interval to measure."
        )
    jitter = np.abs(intervals - 1.0 / COMMAND_RATE)
    report = {
        "command_rate_hz": round(float(len(intervals) / intervals.sum()), 2),
        "missed_ticks_fraction": round(float(np.mean(intervals > MISSED / COMMAND_RATE)), 5),
        "jitter_ms": {
            f"p{share}": round(1e3 * float(np.percentile(jitter, share)), 3) for share in (50, 99)
        },
    }
    longest = round(1e3 * float(intervals.max()), 2)
    return report, {"commands": sum(len(part) for part in parts), "longest_gap_ms": longest}


def build_report(
    options: Mapping[str, Any],
    episodes: Sequence[Episode],
    spans: Sequence[Span],
    policy: Mapping[str, str],
    bag: Path,
    topic: str,
    killed: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of ``ros.json`` and ``details.json``.

    Args:
        options: The run's options, for details.json.
        episodes: The episodes.
        spans: First and last moments of motion [ns].
        policy: The node's last diagnostics, for latencies and interventions.
        bag: The recorded bag, for the timing of commands.
        topic: Topic of the commands.
        killed: Time at which the policy node was killed [ns]; None if it was not.
    """
    sent = [moment for _, moment, _ in read_messages(bag, [topic])]
    timing, more_timing = command_timing(sent, spans)
    outcome = success_entry(episode.success for episode in episodes)
    seam = number(policy, "seam_step_max")
    inner = number(policy, "inner_step_max")
    holds = counts(policy, "holds")
    clamps = counts(policy, "clamps")
    holds.pop("disabled", None)  # requested, between episodes
    states = ((moment, state) for _, moment, state in read_messages(bag, ["/joint_states"]))
    report = {
        **timing,
        **{key: outcome[key] for key in ("episodes", "success_rate", "success_ci95")},
        "seam_step_ratio": round(seam / inner, 3) if seam is not None and inner else None,
        "observation_to_command_ms": _percentiles(
            policy, "observation_to_command_ms", ("p50", "p99")
        ),
        "decode_ms": _percentiles(policy, "decode_ms", ("p50", "p95", "p99")),
        "holds": sum(holds.values()),
        "clamps": sum(clamps.values()),
    }
    details = {
        "holds_by_reason": holds,
        "clamps_by_kind": clamps,
        **more_timing,
        "beyond_decode_ms": _percentiles(policy, "beyond_decode_ms", ("p50", "p99")),
        **{
            key: number(policy, key)
            for key in ("forwards_mean", "deadline_misses", "late_chunks", "starved")
        },
        **{key: policy.get(key, "") for key in ("exit_reasons", "scheduling")},
        "load": os.getloadavg()[0],
        "rest_after_kill_ms": None if killed is None else rest_after(states, killed),
        "config": dict(options),
        "per_episode": [{k: v for k, v in asdict(one).items() if k != "span"} for one in episodes],
    }
    return report, details


def rest_after(states: Iterable[tuple[int, Any]], moment: int) -> float | None:
    """Return the time from `moment` [ns] to the last joint state in which the arm moves [ms]; None
    if it never comes to rest.

    `states` are (time of sending [ns], joint state) in order.
    """
    moving, resting = 0.0, False
    for sent, state in states:
        if sent >= moment:
            resting = max(abs(speed) for speed in state.velocity) <= _RESTING
            moving = moving if resting else 1e-6 * (sent - moment)
    return round(moving, 1) if resting else None


def status_values(message: Any, key: str) -> dict[str, str] | None:
    """Return key -> value of the status in a DiagnosticArray that has `key`; None if none has."""
    for status in message.status:
        values = {value.key: value.value for value in status.values}
        if key in values:
            return values
    return None


def number(values: Mapping[str, str], key: str) -> float | None:
    """Return a value as a number; None if it is absent or not known yet."""
    try:
        return float(values[key])
    except (KeyError, ValueError):
        return None


def counts(values: Mapping[str, str], name: str) -> dict[str, int]:
    """Return the counters ``<name>.<kind>`` that are not 0, by kind."""
    prefix = f"{name}."
    found = {
        key.removeprefix(prefix): int(value)
        for key, value in values.items()
        if key.startswith(prefix)
    }
    return {kind: count for kind, count in found.items() if count}


def _percentiles(
    policy: Mapping[str, str], name: str, shares: Sequence[str]
) -> dict[str, float | None]:
    return {share: number(policy, f"{name}_{share}") for share in shares}


def console_table(report: Mapping[str, Any], details: Mapping[str, Any]) -> Table:
    low, high = report["success_ci95"]
    solved = round(report["success_rate"] * report["episodes"])
    jitter = report["jitter_ms"]
    rows = [
        ("success", f"{solved} of {report['episodes']}  [{100 * low:.0f} %, {100 * high:.0f} %]"),
        ("command rate", f"{report['command_rate_hz']:.2f} Hz of {COMMAND_RATE:.0f}"),
        ("missed ticks", f"{100 * report['missed_ticks_fraction']:.2f} %"),
        ("jitter p50 / p99", f"{jitter['p50']:.2f} / {jitter['p99']:.2f} ms"),
        ("decode p50 / p95 / p99", f"{_ms(report['decode_ms'])} ms"),
        ("observation to command p50 / p99", f"{_ms(report['observation_to_command_ms'])} ms"),
        ("the same without decoding", f"{_ms(details['beyond_decode_ms'])} ms"),
        ("joint step at seams / inside chunks", f"{report['seam_step_ratio'] or '-'}"),
        (
            "ticks held, by reason",
            ", ".join(f"{k} {v}" for k, v in details["holds_by_reason"].items()) or "0",
        ),
        (
            "commands clamped",
            ", ".join(f"{k} {v}" for k, v in details["clamps_by_kind"].items()) or "0",
        ),
        ("scheduling of the command stream", details["scheduling"]),
        ("load of the machine, last minute", f"{details['load']:.1f} on {os.cpu_count()} cores"),
    ]
    if details["config"]["kill"]:
        rest = details["rest_after_kill_ms"]
        rows.append(("killed: arm at rest after", "never" if rest is None else f"{rest:.0f} ms"))
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _ms(percentiles: Mapping[str, float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in percentiles.values())
