"""``ceed-vla robot check FILE --checkpoint C``: checks whether a robot's file and a checkpoint fit
before anything runs.

A checkpoint may contain the robot's file that it was trained with. That file is a template: this
command prints it or compares it, and nothing else reads it. The arm's settings come only from the
file that the user names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.folders import TEMPLATE, resolve_served
from ceed_vla.ros_nodes.robot import policy_setup
from ceed_vla.ros_nodes.robot.arm_model import arm_model
from ceed_vla.ros_nodes.robot.findings import explained, split, verdict
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.review import feature_lengths, review
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.ros_nodes.robot.safety import SafetyLimits
from ceed_vla.ros_nodes.robot.yaml_fields import Fields
from ceed_vla.serving.data_ranges import ACTION, Range, read_ranges
from ceed_vla.serving.predictor import PolicySpec, declared_spec
from ceed_vla.texts import short


@dataclass
class RobotCheckConfig:
    """Compare a robot's file with a checkpoint and the arm's model; exit code 0 if they fit.

    Attributes:
        file: YAML file of the robot; without it, the checkpoint's template is printed, if the
            checkpoint has one.
        checkpoint: LeRobot checkpoint folder, an export, or student or teacher for a shipped
            checkpoint.
    """

    file: str = ""
    checkpoint: str = "student"


class _Problems(list[str]):
    """The problems in the order in which they were found."""

    def attempt(self, make: Callable[[], Any]) -> Any:
        """Return the result of `make`; if it fails, add a problem and return None."""
        try:
            return make()
        except CeedVLAError as error:
            self.append(str(error))


def robot_check(config: RobotCheckConfig) -> str | None:
    """Print what fits, the problems, and a verdict; without a file, return the template.

    `ConfigError`: The file and the checkpoint do not fit.
    """
    template = resolve_served(config.checkpoint) / TEMPLATE
    if not config.file:
        if not template.exists():
            raise ConfigError(
                f"{config.checkpoint} has no {TEMPLATE}; name a robot's file, see "
                "docs/how-to/connect-an-arm.md."
            )
        Fields.read(template)  # validates: plain YAML of limited size without control characters
        return template.read_text(encoding="utf-8")
    console = Console(width=None if Console().is_terminal else 140)
    try:
        robot = load_robot_config(config.file)
        spec = declared_spec(config.checkpoint)
    except CeedVLAError as error:  # no further comparison is possible
        _tell(console, [str(error)], ())
        raise
    problems = _Problems()
    model = problems.attempt(lambda: arm_model(robot))
    problems.attempt(lambda: policy_setup.check_fit(robot, spec))
    problems.attempt(lambda: Observations(robot, spec.cameras, spec.states, model))
    for name in robot.interfaces:
        problems.attempt(partial(robot.interface, name))
    first = next(iter(robot.interfaces.values()))
    values = defaults(POLICY_PARAMETERS)
    limits = problems.attempt(lambda: policy_setup.safety_limits(robot, first, model, (), values))
    ranges = problems.attempt(lambda: read_ranges(spec.checkpoint, feature_lengths(robot))) or {}
    physical = policy_setup.physical_velocity(robot, model)
    found, warnings = split(review(robot, model, physical, ranges, spec))
    problems += found
    console.print(_features(robot, spec))
    console.print(_joints(robot, limits, ranges, model is not None))
    if template.exists():
        own = Fields.read(Path(config.file))
        problems.attempt(lambda: console.print(_differences(own, Fields.read(template))))
    _tell(console, problems, warnings)
    if problems:
        raise ConfigError(explained(robot, config.checkpoint, problems))
    return None


def _tell(console: Console, problems: Sequence[str], warnings: Sequence[str]) -> None:
    """Print the warnings, then the numbered problems, one per line, and the verdict last."""
    lines = [f"warning: {warning}" for warning in warnings]
    lines += [f"{number}. {problem}" for number, problem in enumerate(problems, 1)]
    for line in [*lines, verdict(problems, warnings)]:
        printable = "".join(c if c.isprintable() else "?" for c in " ".join(line.split()))
        console.print(Text(printable), soft_wrap=True)


def _features(robot: RobotConfig, spec: PolicySpec) -> Table:
    """Tabulate the policy's inputs and actions with their sources on the robot."""
    table = Table("what", "the checkpoint", "the robot")
    images = {image.feature: image for image in robot.images}
    for feature, (_, height, width) in spec.cameras.items():
        image = images.get(feature)
        crop = f", crop {list(image.crop)}" if image and image.crop else ""
        source = f"{image.topic} ({image.transport}{crop})" if image else "-"
        table.add_row(feature, f"{width} x {height}", source)
    for feature, length in spec.states.items():
        table.add_row(feature, f"{length} values", ", ".join(robot.states.get(feature, ("-",))))
    chunk = f"chunks of {spec.chunk_steps or '?'} steps, {spec.n_action_steps or '?'} executed"
    table.add_row(
        "action",
        f"{spec.action_dim} values, {chunk}",
        f"{robot.action.kind}, {1 / robot.action.dt:g} per second",
    )
    for name, interface in robot.interfaces.items():
        table.add_row(name, "", interface.topic)
    return table


def _joints(
    robot: RobotConfig,
    limits: SafetyLimits | None,
    ranges: Mapping[str, Range | str],
    has_model: bool,
) -> Table:
    """Tabulate the limits of every joint in both units, and the checks that were made."""
    table = Table("limits", "in the policy's unit", "of commands")
    for place, joint in enumerate(robot.arm.joints if limits is not None else ()):
        assert limits is not None
        ends = limits.position_low, limits.position_high
        low, high = (float(end[place]) for end in ends)
        own = " to ".join(f"{robot.arm.units.theirs(end)[place]:.4g}" for end in ends)
        table.add_row(
            joint, own, f"[{low:.3f}, {high:.3f}] rad, {limits.max_velocity[place]:g} rad/s"
        )
    table.add_section()
    model = "compared" if has_model else "not checked: the file names no arm.model"
    table.add_row("the model's limits", "", model)
    for feature in (*robot.states, ACTION):
        seen = ranges.get(feature, "they cannot be read")
        told = f"compared ({seen.source})" if isinstance(seen, Range) else f"not checked: {seen}"
        table.add_row(f"statistics of {feature}", "", told)
    return table


def _differences(own: Fields, template: Fields) -> Table:
    """Tabulate the keys in which a robot's file differs from the checkpoint's template."""
    here = own.flat()
    there = template.flat()
    table = Table("key that differs", "the file", "the checkpoint (a template, not used)")
    for key in dict.fromkeys([*here, *there]):
        if key not in here or key not in there or here[key] != there[key]:
            values = (short(repr(side[key])) if key in side else "-" for side in (here, there))
            table.add_row(*map(Text, (short(repr(key)[1:-1]), *values)))
    return table
