"""Task families, their phrasings, the colours, the held-out combinations and the success tests.

A *combination* is (family, colour, second colour or side, phrasing). About a quarter of them is
held out: split "train" never draws these, split "heldout" draws only these, split "all" draws any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import SimulationError

TASKS = ("cube_in_bin", "cube_on_plate", "push_cube", "stack_cubes")
COLORS = ("red", "green", "blue", "yellow")
SIDES = ("left", "right")
SPLITS = ("train", "heldout", "all")
CAMERAS = ("front", "wrist")
MAX_IMAGE_SIZE = 512  # [px]
PHRASES: dict[str, tuple[str, ...]] = {
    "cube_in_bin": (
        "put the {color} cube in the bin",
        "place the {color} cube in the bin",
        "drop the {color} cube into the bin",
        "move the {color} cube into the bin",
    ),
    "cube_on_plate": (
        "put the {color} cube on the plate",
        "place the {color} cube on the plate",
        "set the {color} cube onto the plate",
        "move the {color} cube onto the plate",
    ),
    "push_cube": (
        "push the {color} cube to the {other} edge",
        "slide the {color} cube to the {other} edge",
        "push the {color} cube to the {other} side",
        "slide the {color} cube to the {other} side",
    ),
    "stack_cubes": (
        "stack the {color} cube on the {other} cube",
        "put the {color} cube on the {other} cube",
        "place the {color} cube onto the {other} cube",
        "set the {color} cube on top of the {other} cube",
    ),
}

# Sizes and places [m] for the success tests, as `scene.xml` has them.
CUBE_HALF = 0.0225
BIN_INNER_HALF = 0.065
BIN_WALL = 0.005
BIN_HEIGHT = 0.04
PLATE_RADIUS = 0.07
PLATE_HEIGHT = 0.01
ZONE_INNER, ZONE_OUTER = 0.19, 0.26  # |y| of the edge zones
ZONE_X = (0.33, 0.57)  # x of the edge zones
ZONE_CENTRE = 0.5 * (ZONE_INNER + ZONE_OUTER)

_RELEASED_OPENING = 0.055  # finger opening above which a cube is free [m]
_REST_SPEED = 0.05  # [m/s]


@dataclass(frozen=True)
class Command:
    """A command to the robot."""

    family: str  # one of `TASKS`
    color: str  # colour of the cube to move
    other: str  # second colour (stack_cubes), side (push_cube) or ""
    phrase: int  # index into ``PHRASES[family]``

    @property
    def text(self) -> str:
        """The instruction: lower-case words, at most ten."""
        return PHRASES[self.family][self.phrase].format(color=self.color, other=self.other)

    @property
    def target(self) -> int:
        """Index of the cube to move in `COLORS`."""
        return COLORS.index(self.color)

    @property
    def base(self) -> int:
        """Index of the cube to stack on in `COLORS`."""
        return COLORS.index(self.other)

    @property
    def side(self) -> float:
        """+1 for the left edge (+y, seen from the robot), -1 for the right edge."""
        return 1.0 if self.other == "left" else -1.0


def is_heldout(command: Command) -> bool:
    """Whether a combination is held out for evaluation.

    Every colour, side and phrasing still occurs in training.
    """
    shift = command.target
    if command.family == "push_cube":
        shift += SIDES.index(command.other)
    elif command.family == "stack_cubes":
        shift += command.base
    else:
        shift += TASKS.index(command.family)
    return shift % len(PHRASES[command.family]) == command.phrase


def combinations(family: str, split: str, colors: Sequence[str] = COLORS) -> list[Command]:
    """Combinations of a family in a split, with the colours on the table.

    Raises:
        SimulationError: The family or the split is unknown.
    """
    check_choice("task", family, TASKS)
    check_choice("split", split, SPLITS)
    others: Sequence[str] = {"push_cube": SIDES, "stack_cubes": tuple(colors)}.get(family, ("",))
    every = (
        Command(family, color, other, phrase)
        for color, other, phrase in product(colors, others, range(len(PHRASES[family])))
        if color != other
    )
    return [c for c in every if split == "all" or is_heldout(c) == (split == "heldout")]


def check_choice(what: str, value: object, choices: Sequence[object]) -> None:
    """Raise `SimulationError` unless `value` is one of `choices`."""
    if value not in choices:
        raise SimulationError(
            f"Unknown {what} {value!r}; choose one of {', '.join(map(str, choices))}."
        )


@dataclass
class Situation:
    """The part of the simulator state that success tests and expert use (base frame)."""

    # cube centres (4, 3) [m], in the order of `COLORS`; absent cubes hold zeros
    cubes: NDArray[np.float64]
    cube_yaws: NDArray[np.float64]  # cube yaws (4,) in [-pi/4, pi/4) [rad]
    cube_speeds: NDArray[np.float64]  # linear speeds (4,) [m/s]
    bin: NDArray[np.float64]  # bin centre on the table (3,) [m]
    plate: NDArray[np.float64]  # plate centre on the table (3,) [m]
    tcp: NDArray[np.float64]  # measured TCP position (3,) [m]
    tcp_yaw: float  # measured TCP yaw [rad]
    opening: float  # distance between the finger pads [m]
    command_position: NDArray[np.float64]  # commanded TCP position (3,) [m]
    command_rpy: NDArray[np.float64]  # commanded roll, pitch, yaw (3,) [rad]
    gripper_open: bool  # whether the gripper is commanded open


def goal_position(command: Command, now: Situation) -> NDArray[np.float64]:
    """Goal of the centre of the target cube (3,) [m]."""
    if command.family == "cube_in_bin":
        return now.bin + np.array([0.0, 0.0, BIN_WALL + CUBE_HALF])
    if command.family == "cube_on_plate":
        return now.plate + np.array([0.0, 0.0, PLATE_HEIGHT + CUBE_HALF])
    if command.family == "stack_cubes":
        return now.cubes[command.base] + np.array([0.0, 0.0, 2 * CUBE_HALF])
    x = np.clip(now.cubes[command.target, 0], ZONE_X[0] + CUBE_HALF, ZONE_X[1] - CUBE_HALF)
    return np.array([x, command.side * ZONE_CENTRE, CUBE_HALF])


def in_place(command: Command, now: Situation) -> bool:
    """Whether the target cube is at its goal, regardless of the gripper."""
    cube = now.cubes[command.target]
    goal = goal_position(command, now)
    offset = np.abs(cube - goal)
    if command.family == "cube_in_bin":
        return bool(
            offset[:2].max() < BIN_INNER_HALF - 0.6 * CUBE_HALF
            and -0.01 < cube[2] - goal[2] < 0.015
        )
    if command.family == "cube_on_plate":
        return bool(np.hypot(*offset[:2]) < PLATE_RADIUS - CUBE_HALF and offset[2] < 0.006)
    if command.family == "stack_cubes":
        on_table = goal[2] < 3.3 * CUBE_HALF
        return bool(np.hypot(*offset[:2]) < 0.9 * CUBE_HALF and offset[2] < 0.006 and on_table)
    in_zone = ZONE_X[0] < cube[0] < ZONE_X[1] and ZONE_INNER < command.side * cube[1] < ZONE_OUTER
    return bool(in_zone and offset[2] < 0.006)


def is_success(command: Command, now: Situation) -> bool:
    """Whether the command is fulfilled.

    The cube must be in place and, unless it is pushed, released and at rest.
    """
    if not in_place(command, now):
        return False
    if command.family == "push_cube":
        return True
    released = now.gripper_open and now.opening > _RELEASED_OPENING
    return bool(released and now.cube_speeds[command.target] < _REST_SPEED)
