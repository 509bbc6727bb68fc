"""``ceed-vla robot check FILE --checkpoint C``: whether a robot's file and a checkpoint fit, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from ceed_vla.errors import CeedVLAError, ConfigError
from ros_nodes.robot import policy_setup
from ros_nodes.robot.observations import Observations
from ros_nodes.robot.parameters import defaults
from ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ros_nodes.robot.predictor import declared_spec
from ros_nodes.robot.robot_file import load_robot_config


@dataclass
class RobotCheckConfig:
    """Read a robot's file and a checkpoint's config.json, and say what the policy sees and does through them.

    Attributes:
        file: The robot's YAML file.
        checkpoint: LeRobot checkpoint folder, or student or teacher for the shipped ones.
    """

    file: str
    checkpoint: str = "student"


def robot_check(config: RobotCheckConfig) -> None:
    """Print the table, and raise `ConfigError` with all that does not fit; nothing is loaded, nothing is sent."""
    robot, spec = load_robot_config(config.file), declared_spec(config.checkpoint)
    problems: list[str] = []

    def attempt(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except CeedVLAError as error:
            problems.append(str(error))

    model = attempt(lambda: policy_setup.arm_model(robot))
    attempt(lambda: policy_setup.check_fit(robot, spec))
    attempt(lambda: Observations(robot, spec.cameras, spec.states, model))
    table = Table("what", "the checkpoint", "the robot")
    images = {image.feature: image for image in robot.images}
    for feature, (_, height, width) in spec.cameras.items():
        image = images.get(feature)
        crop = f", crop {list(image.crop)}" if image and image.crop else ""
        table.add_row(feature, f"{width} x {height}", f"{image.topic} ({image.transport}{crop})" if image else "-")
    for feature, length in spec.states.items():
        table.add_row(feature, f"{length} values", ", ".join(robot.states.get(feature, ("-",))))
    chunk = f"chunks of {spec.chunk_steps or '?'} steps, {spec.n_action_steps or '?'} executed"
    table.add_row(
        "action", f"{spec.action_dim} values, {chunk}", f"{robot.action.kind}, {1 / robot.action.dt:g} a second"
    )
    for name, interface in robot.interfaces.items():
        table.add_row(name, "", interface.topic)
        attempt(partial(robot.interface, name))
    first, values = next(iter(robot.interfaces.values())), defaults(POLICY_PARAMETERS)
    limits = attempt(lambda: policy_setup.safety_limits(robot, first, model, (), values))
    for place, joint in enumerate(robot.arm.joints if limits is not None else ()):
        ends = limits.position_low, limits.position_high
        low, high = (float(end[place]) for end in ends)
        own = " to ".join(f"{robot.arm.units.theirs(end)[place]:.4g}" for end in ends)
        table.add_row(joint, own, f"[{low:.3f}, {high:.3f}] rad, {limits.max_velocity[place]:g} rad/s")
        if robot.arm.home and not low <= robot.arm.home[place] <= high:
            problems.append(f"arm.home of {joint} is {robot.arm.home[place]}, outside its limits.")
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    if problems:
        raise ConfigError(f"{robot.source} and {config.checkpoint} do not fit. {' '.join(problems)}")
