"""Names of LIBERO's suites, tasks and values; importing this imports no simulator."""

from __future__ import annotations

from ceed_vla.errors import ConfigError
from ceed_vla.fields import short
from ceed_vla.sim.task_names import parse_tasks

# Suite -> step limit of an episode, after the settling steps (OpenVLA's, which others use too).
HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
WITH_EXPERT = ("libero_object", "libero_spatial")
TASKS_PER_SUITE = 10
OFFICIAL_STATES = 50  # initial states per task
CONTROL_RATE = 20  # [Hz]
SETTLING_STEPS = 10  # control steps without motion before the first observation
RENDERED = 256  # side of a rendered image [px]
# LeRobot's camera -> the simulation's
CAMERAS = {"image": "agentview", "image2": "robot0_eye_in_hand"}
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STATE_NAMES = ("x", "y", "z", "axis_x", "axis_y", "axis_z", "finger_1", "finger_2")
PRIVILEGED_NAMES = tuple(f"{thing}_d{axis}" for thing in ("object", "target") for axis in "xyz")


def tasks_of(names: str) -> list[str]:
    """Return the tasks, such as "libero_object/3", that a flag names.

    Args:
        names: A suite, or tasks of one suite separated by commas.

    Raises:
        ConfigError: A name is unknown, or the tasks are of several suites, whose step limits
            differ.
    """
    sets = {suite: [f"{suite}/{i}" for i in range(TASKS_PER_SUITE)] for suite in HORIZONS}
    example = "libero_object/0,libero_object/9"
    choose = f"a suite of {', '.join(HORIZONS)}, or tasks of one, such as {example}"
    found = parse_tasks(names, sets, choose)
    if len({suite_of(task) for task in found}) > 1:
        raise ConfigError(
            f"--env.task has several suites: {short(names)}; their step limits differ. Run one "
            "command for each."
        )
    return found


def suite_of(task: str) -> str:
    """Return the suite of a task such as "libero_object/3"."""
    return task.partition("/")[0]


def number_of(task: str) -> int:
    """Return the number of a task within its suite."""
    return int(task.partition("/")[2])
