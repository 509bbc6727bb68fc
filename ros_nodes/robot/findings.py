"""Findings of a review of a robot's file, and their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig
from ceed_vla.texts import short

PROBLEM, WARNING = "problem", "warning"
LONGEST_TEXT = 1200  # largest number of characters of all problems in one message


@dataclass(frozen=True)
class Finding:
    """A mismatch between the robot's file and the model, the data or a rule."""

    key: str  # of the robot's file
    value: str  # the present value
    rule: str  # what the value must be
    remedy: str
    allow: str = ""  # the entry of `allow` that turns the problem into a warning; "" for none
    severity: str = PROBLEM

    def __str__(self) -> str:
        text = f"{self.key}: {self.value}; {self.rule}. {self.remedy}"
        if self.severity == PROBLEM and self.allow:
            return f"{text} If it is meant, write allow: [{self.allow}]."
        return text


def split(findings: Sequence[Finding]) -> tuple[list[str], list[str]]:
    """Return the texts of the problems and the texts of the warnings."""
    problems = [str(finding) for finding in findings if finding.severity == PROBLEM]
    return problems, [str(finding) for finding in findings if finding.severity == WARNING]


def verdict(problems: Sequence[str], warnings: Sequence[str]) -> str:
    """Return whether file and checkpoint fit, in one line."""
    if problems:
        return f"does not fit: {_count(problems, 'problem')}"
    if warnings:
        return f"fits, with {_count(warnings, 'warning')}"
    return "fits"


def explained(robot: RobotConfig, checkpoint: str, problems: Sequence[str]) -> str:
    """Return the verdict with as many problems as fit into an error message.

    The problems come before the names, because the node shows only the beginning of an error.
    """
    numbered: list[str] = []
    for number, problem in enumerate(problems, 1):
        text = f"{number}. {short(problem, LONGEST_TEXT // 2)}"
        if numbered and len(" ".join([*numbered, text])) > LONGEST_TEXT:
            numbered.append(f"And {len(problems) - number + 1} more.")
            break
        numbered.append(text)
    where = f"(File {short(robot.source)}, checkpoint {short(checkpoint)}.)"
    return f"{verdict(problems, ())}. {' '.join(numbered)} {where}"


def _count(texts: Sequence[str], word: str) -> str:
    return f"{len(texts)} {word}{'s' if len(texts) != 1 else ''}"


def worst(names: Sequence[str], excess: Array) -> tuple[int, str]:
    """Return the joint with the largest `excess` (J,), and a name for it and the others above 0."""
    joint = int(np.argmax(excess))
    others = int((excess > 0.0).sum()) - 1
    if others == 0:
        return joint, names[joint]
    return joint, f"{names[joint]} (and {others} more)"
