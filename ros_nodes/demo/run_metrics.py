"""What a run was like for the robot: command rate, missed ticks, jitter, from the times at which commands were sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ConfigError
from ros_nodes.robot.loop_statistics import MISSED

Window = tuple[int, int]  # first and last moment [ns]


@dataclass(frozen=True)
class CommandTiming:
    """How steadily commands came."""

    commands: int  # in the windows
    rate: float  # [Hz]
    missed: float  # intervals longer than `MISSED` periods, as a share of all
    jitter_p50: float  # percentiles of |interval - period| [s]
    jitter_p99: float
    longest: float  # interval [s]


def command_timing(sent: Sequence[int] | NDArray[np.int64], windows: Sequence[Window], period: float) -> CommandTiming:
    """Timing of commands `sent` [ns], a `period` [s] apart, inside windows [ns]; pauses between windows do not count.

    Raises:
        ConfigError: No window has two commands.
    """
    if not period > 0.0:
        raise ConfigError(f"The period is {period} s; it must be more than 0.")
    times = np.sort(np.asarray(sent, dtype=np.int64))
    parts = [times[(times >= start) & (times <= end)] for start, end in windows]
    intervals = np.concatenate([np.diff(part) for part in parts]) * 1e-9 if parts else np.zeros(0)
    if not len(intervals):
        raise ConfigError(f"{len(times)} commands in {len(windows)} windows make no interval to measure.")
    jitter = np.abs(intervals - period)
    return CommandTiming(
        commands=sum(len(part) for part in parts),
        rate=float(len(intervals) / intervals.sum()),
        missed=float(np.mean(intervals > MISSED * period)),
        jitter_p50=float(np.percentile(jitter, 50)),
        jitter_p99=float(np.percentile(jitter, 99)),
        longest=float(intervals.max()),
    )


def status_values(message: Any, key: str) -> dict[str, str] | None:
    """Key -> value of the status in a DiagnosticArray that has `key`; None if none has."""
    for status in message.status:
        values = {value.key: value.value for value in status.values}
        if key in values:
            return values
    return None


def number(values: Mapping[str, str], key: str) -> float | None:
    """A value as a number; None if it is absent or says that there is none yet."""
    try:
        return float(values[key])
    except (KeyError, ValueError):
        return None


def counts(values: Mapping[str, str], name: str) -> dict[str, int]:
    """The counters ``<name>.<kind>`` that are not 0, by kind."""
    prefix = f"{name}."
    found = {key.removeprefix(prefix): int(value) for key, value in values.items() if key.startswith(prefix)}
    return {kind: count for kind, count in found.items() if count}
