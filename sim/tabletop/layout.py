"""Random scenes: the cubes that are present, the places of all objects, and the command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import SimulationError
from ceed_vla.sim.tabletop.tasks import (
    COLORS,
    CUBE_HALF,
    PHRASES,
    SIDES,
    TASKS,
    Command,
    check_choice,
    combinations,
)

NEAR_X, NEAR_Y = (0.36, 0.54), (-0.14, 0.14)  # where cubes start [m]
FAR_X, FAR_Y = (0.66, 0.68), (-0.165, 0.165)  # where bin and plate stand [m]
CUBE_SPACING = 0.11  # smallest distance of two cube centres [m]: open fingers must fit between
FAR_SPACING = 0.17  # smallest distance of bin and plate along y [m]
CUBE_YAW = 0.3  # largest start yaw [rad]
LANE = 0.085  # half width of the strip that a pushed cube needs free [m]
ALL_CUBES_CHANCE = 0.25

# LeRobot passes the last option, which has no effect.
_OPTIONS = ("task", "color", "other", "phrase", "lerobot_new_rollout")


@dataclass(frozen=True)
class Layout:
    """One scene."""

    present: tuple[bool, ...]  # whether each colour of `COLORS` is on the table (4,)
    cubes: NDArray[np.float64]  # cube positions x, y (4, 2) [m]
    yaws: NDArray[np.float64]  # cube yaws (4,) [rad]
    bin: NDArray[np.float64]  # bin position x, y (2,) [m]
    plate: NDArray[np.float64]  # plate position x, y (2,) [m]


def draw_command(
    rng: np.random.Generator,
    task: str,
    split: str,
    colors: tuple[str, ...],
    options: dict[str, Any],
) -> Command:
    """Draw an instruction of a family, or of any if `task` is "mixed", about some of the colours.

    `SimulationError` for unknown options or values, or when the split has no such combination.
    """
    for key in options:
        check_choice("reset option", key, _OPTIONS)
    task = options.get("task", task)
    check_choice("task", task, (*TASKS, "mixed"))
    family = str(rng.choice(TASKS)) if task == "mixed" else task
    choices = combinations(family, split, colors)
    for name, values in (
        ("color", COLORS),
        ("other", SIDES if family == "push_cube" else COLORS),
        ("phrase", tuple(range(len(PHRASES[family])))),
    ):
        if options.get(name) is not None:
            check_choice(name, options[name], values)
            choices = [c for c in choices if getattr(c, name) == options[name]]
    if not choices:
        raise SimulationError(
            f"No combination of {family} in split {split!r} fits the options {options!r} with the "
            f'cubes {", ".join(colors)}; drop an option or use split="all".'
        )
    return choices[int(rng.integers(len(choices)))]


def draw_layout(rng: np.random.Generator, command: Command) -> Layout:
    """Draw a scene that allows `command`: its cubes are present and a push lane is free."""
    needed = {command.target} | ({command.base} if command.family == "stack_cubes" else set())
    present = np.ones(len(COLORS), dtype=bool)
    if rng.random() >= ALL_CUBES_CHANCE:
        present[rng.choice([i for i in range(len(COLORS)) if i not in needed])] = False
    cubes = np.zeros((len(COLORS), 2))
    here = np.flatnonzero(present)
    while True:
        cubes[here] = rng.uniform(
            [NEAR_X[0], NEAR_Y[0]], [NEAR_X[1], NEAR_Y[1]], size=(len(here), 2)
        )
        gaps = np.linalg.norm(cubes[here, None] - cubes[None, here], axis=-1) + np.eye(len(here))
        if gaps.min() >= CUBE_SPACING and (
            command.family != "push_cube" or _lane_is_free(command, cubes, here)
        ):
            break
    far_y: NDArray[np.float64] = np.zeros(2)
    while abs(far_y[0] - far_y[1]) < FAR_SPACING:
        far_y = rng.uniform(*FAR_Y, size=2)
    far_x = rng.uniform(*FAR_X, size=2)
    return Layout(
        present=tuple(bool(p) for p in present),
        cubes=cubes,
        yaws=rng.uniform(-CUBE_YAW, CUBE_YAW, size=len(COLORS)),
        bin=np.array([far_x[0], far_y[0]]),
        plate=np.array([far_x[1], far_y[1]]),
    )


def _lane_is_free(command: Command, cubes: NDArray[np.float64], here: NDArray[np.int64]) -> bool:
    """Whether the lane from the target to its edge zone has room for the open fingers."""
    away = cubes[here[here != command.target]] - cubes[command.target]  # (others, 2)
    return not np.any((command.side * away[:, 1] > -CUBE_HALF) & (np.abs(away[:, 0]) < LANE))
