"""``ceed-vla robot check FILE --checkpoint C``: whether a robot's file and a checkpoint fit, before anything runs.

A checkpoint may bring the robot's file that it was made with. It is a template, printed and compared here alone: what
moves an arm comes from the file that the user names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.folders import resolve_checkpoint
from ros_nodes.robot import policy_setup
from ros_nodes.robot.observations import Observations
from ros_nodes.robot.parameters import defaults
from ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ros_nodes.robot.predictor import declared_spec
from ros_nodes.robot.robot_file import load_robot_config
from ros_nodes.robot.texts import short
from ros_nodes.robot.yaml_fields import Fields

TEMPLATE = "robot.yaml"  # beside a checkpoint's config.json


@dataclass
class RobotCheckConfig:
    """Read a robot's file and a checkpoint's config.json, and say what the policy sees and does through them.

    Attributes:
        file: The robot's YAML file; without it the template that the checkpoint brings is printed, if it brings one.
        checkpoint: LeRobot checkpoint folder, or student or teacher for the shipped ones.
    """

    file: str = ""
    checkpoint: str = "student"


def robot_check(config: RobotCheckConfig) -> str | None:
    """Print what fits; `ConfigError` says all that does not. Without a file, return the checkpoint's template."""
    template = resolve_checkpoint(config.checkpoint) / TEMPLATE
    if not config.file:
        if not template.exists():
            raise ConfigError(f"{config.checkpoint} brings no {TEMPLATE}; name a robot's file, see docs/robots.md.")
        Fields.read(template)  # plain YAML of a limited size, which has no control characters
        return template.read_text(encoding="utf-8")
    console = Console(width=None if Console().is_terminal else 140)
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
    console.print(table)
    if template.exists():
        attempt(lambda: console.print(_differences(Fields.read(Path(config.file)), Fields.read(template))))
    if problems:
        raise ConfigError(f"{robot.source} and {config.checkpoint} do not fit. {' '.join(problems)}")
    return None


def _differences(own: Fields, template: Fields) -> Table:
    """The keys in which a robot's file differs from the template that a checkpoint brings."""
    here, there = own.flat(), template.flat()
    table = Table("key that differs", "the file", "the checkpoint (a template, not used)")
    for key in dict.fromkeys([*here, *there]):
        if key not in here or key not in there or here[key] != there[key]:
            values = (short(repr(side[key])) if key in side else "-" for side in (here, there))
            table.add_row(*map(Text, (short(repr(key)[1:-1]), *values)))
    return table
