"""A bag of ``ros-demo`` as a recording for Rerun: ``--rerun``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ceed_vla.ros_nodes.demo.bag import read_messages
from ceed_vla.viz import RerunLog

IMAGES = ("/front/image_raw", "/wrist/image_raw")
STATES = "/joint_states"
INSTRUCTION, SUCCESS, DIAGNOSTICS = "/policy/instruction", "/sim/success", "/diagnostics"
MEASURED = ("decode_ms_p50", "decode_ms_p95", "command_rate_hz")  # numbers of the diagnostics


def log_bag(bag: Path, file: Path, commands: str) -> Path:
    """Write images, joint states, commands, instructions, successes and holds of a bag.

    Args:
        bag: The bag.
        file: The recording to write.
        commands: Topic of the arm's commands.
    """
    topics = [*IMAGES, STATES, commands, INSTRUCTION, SUCCESS, DIAGNOSTICS]
    first: int | None = None
    with RerunLog(file) as log:
        for topic, moment, message in read_messages(bag, topics):
            first = moment if first is None else first
            log.at((moment - first) / 1e9)
            _log(log, topic, message, commands)
    return file


def _log(log: RerunLog, topic: str, message: Any, commands: str) -> None:
    """Log one message below the entity of its topic."""
    if topic in IMAGES:
        pixels = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, -1)
        log.image(topic, pixels)
    elif topic == STATES:
        log.scalars(f"{topic}/position", message.position)
    elif topic == commands:
        if numbers := commanded(message):
            log.scalars(topic, numbers)
    elif topic == DIAGNOSTICS:
        for status in message.status:
            values = {pair.key: pair.value for pair in status.values}
            for name in MEASURED:
                if (number := _number(values.get(name, ""))) is not None:
                    log.scalars(f"{topic}/{name}", [number])
            log.text(f"{topic}/{status.name.partition(':')[0]}", status.message)
    else:
        log.text(topic, str(message.data))


def _number(text: str) -> float | None:
    """The number that a value of the diagnostics states; None if it is not known yet."""
    try:
        return float(text)
    except ValueError:
        return None


def commanded(message: Any) -> list[float]:
    """The numbers of a command: joint positions, or a twist."""
    if hasattr(message, "data"):  # Float64MultiArray
        return list(message.data)
    if hasattr(message, "points"):  # JointTrajectory
        return list(message.points[-1].positions) if message.points else []
    twist = message.twist  # TwistStamped
    parts = (twist.linear, twist.angular)
    return [getattr(part, name) for part in parts for name in ("x", "y", "z")]
