"""The policy node's diagnostics, published once a second on /diagnostics.

docs/reference/holds.md explains the keys.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from ceed_vla.ros_nodes.robot.controller import PolicyController
from ceed_vla.ros_nodes.robot.mode import HARMLESS, LOADING, Mode, State
from ceed_vla.ros_nodes.robot.safety import SafetyFilter
from ceed_vla.texts import short

SUSTAINED = 3  # time over which clamping counts as sustained [s], one publication per second
MOST_CLAMPED = 0.5  # largest share of commands in that time that may be clamped


class ClampWatch:
    """Detects sustained clamping: the limits, units or action scale then do not fit the policy."""

    def __init__(self) -> None:
        # commands sent and commands clamped so far, once a second
        self._seconds: deque[tuple[int, int]] = deque(maxlen=SUSTAINED + 1)

    def look(self, commands: int, safety: SafetyFilter) -> str:
        """Return a warning or ""; call it once a second with the commands sent so far."""
        if self._seconds and commands < self._seconds[-1][0]:  # the node was configured again
            self._seconds.clear()
        self._seconds.append((commands, safety.clamped))
        sent = commands - self._seconds[0][0]
        clamped = self._seconds[-1][1] - self._seconds[0][1]
        if len(self._seconds) <= SUSTAINED or not sent or clamped <= MOST_CLAMPED * sent:
            return ""
        kinds = ", ".join(f"{kind} {count}" for kind, count in safety.clamps.items() if count)
        return (
            f"{clamped} of the last {sent} commands were clamped ({kinds} in total): check that "
            "limits, units and action scale in the robot's file fit the policy."
        )


def level_of(state: State, *, warn: bool) -> bytes:
    """Return the level of `state`; in motion OK, or WARN if `warn` is set."""
    if state.mode in (Mode.MOVING, Mode.GUIDED):
        return DiagnosticStatus.WARN if warn else DiagnosticStatus.OK
    harmless = state.code in HARMLESS or (not state.code and state.detail in ("", LOADING))
    return DiagnosticStatus.WARN if harmless else DiagnosticStatus.ERROR


def running_values(
    controller: PolicyController, safety: SafetyFilter, now: float
) -> dict[str, Any]:
    """Return the counts and timings of an active node; `now` is steady time [s]."""
    stream, numbers = controller.stream, controller.statistics
    return {
        "instruction": stream.instruction,
        "command_rate_hz": numbers.rate(now),
        "ticks": numbers.ticks,
        "missed_ticks": numbers.missed,
        "slipped_steps": numbers.slips,
        **{f"jitter_p{share}_ms": 1e3 * numbers.jitter.percentile(share) for share in (50, 99)},
        **{f"decode_ms_p{share}": 1e3 * numbers.decode.percentile(share) for share in (50, 95, 99)},
        **{f"network_ms_p{share}": 1e3 * numbers.network.percentile(share) for share in (50, 99)},
        **{f"images_ms_p{share}": 1e3 * numbers.images.percentile(share) for share in (50, 95, 99)},
        **{
            f"observation_to_command_ms_p{share}": 1e3 * numbers.to_command.percentile(share)
            for share in (50, 99)
        },
        **{
            f"beyond_decode_ms_p{share}": 1e3 * numbers.beyond_decode.percentile(share)
            for share in (50, 99)
        },
        "forwards_mean": numbers.forwards.mean,
        "exit_reasons": " ".join(
            f"{reason}={count}" for reason, count in numbers.exit_reasons.items()
        ),
        "deadline_misses": numbers.deadline_misses,
        "inference_errors": numbers.errors,
        "last_inference_error": numbers.last_error,
        "seam_step_max": numbers.seam_step,
        "inner_step_max": numbers.inner_step,
        **{f"clamps.{kind}": count for kind, count in safety.clamps.items()},
        "clamps": sum(safety.clamps.values()),
        **{f"holds.{code}": count for code, count in safety.holds.items()},
        "holds": sum(safety.holds.values()),
        "chunks": stream.counters.switched,
        "late_chunks": stream.counters.late + stream.counters.missed,
        "starved": stream.counters.starved,
        "delay_steps": stream.delay_steps,
    }


def status_message(
    name: str, hardware: str, level: bytes, message: str, values: dict[str, Any], stamp: Time
) -> DiagnosticArray:
    status = DiagnosticStatus(level=level, name=name, message=message)
    status.hardware_id = short(hardware)
    status.values = [KeyValue(key=key, value=_text(value)) for key, value in values.items()]
    array = DiagnosticArray(status=[status])
    array.header.stamp = stamp
    return array


def _text(value: Any) -> str:
    """Format a value: numbers with four digits, texts shortened, unknown values as ""."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else short(value)
