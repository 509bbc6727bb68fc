"""Reads a robot's YAML file, such as launch/config/tabletop_robot.yaml, and validates it.

The file maps the robot's topics to LeRobot features, and a policy's actions to commands.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import PoseLimits
from ceed_vla.ros_nodes.robot.interfaces.base import INTERFACES, ActionInterface
from ceed_vla.ros_nodes.robot.intervention.base import DEVICES, Body
from ceed_vla.ros_nodes.robot.intervention.patience import Patience
from ceed_vla.ros_nodes.robot.robot_config import (
    COMMAND_COMPONENTS,
    COMPONENTS,
    POSE_COMPONENTS,
    Action,
    Arm,
    CommandSource,
    Gripper,
    Group,
    ImageSource,
    Intervention,
    Limits,
    Linear,
    RobotConfig,
)
from ceed_vla.ros_nodes.robot.yaml_fields import TOPIC, Fields
from ceed_vla.texts import short, shown

INVERSE = 1e-9  # largest error of a mapping there and back, as a share of its range
PACKAGED = "launch/config/tabletop_robot.yaml"
# Rules of `review` that a file may disable in its list `allow`.
ALLOWABLE = (
    "action_names",
    "gripper",
    "position_limits",
    "rate",
    "statistics",
    "step",
    "units",
    "velocity",
)


def packaged_config() -> Path:
    """Return the tabletop robot's file, from the source tree or the installation.

    `ConfigError`: The file is in neither.
    """
    for folder in Path(__file__).resolve().parents:
        for place in ("", "share/ceed_vla"):
            if (file := folder / place / PACKAGED).is_file():
                return file
    raise ConfigError(f"This installation lacks {PACKAGED}; reinstall ceed_vla.")


def load_robot_config(path: str | Path = "") -> RobotConfig:
    """Read a robot's file; the packaged tabletop robot's if `path` is empty.

    `ConfigError`: A value is invalid; the message has the key and the allowed values.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"The robot's file is {path!r:.100}; give its path.")
    file = Path(path) if str(path) else packaged_config()
    fields = Fields.read(file)
    arm = _arm(fields.child("arm"))
    states = fields.child("state", optional=True)
    gripper = _gripper(fields.child("gripper")) if "gripper" in fields else None
    config = RobotConfig(
        source=file,
        images=_images(fields.child("images", optional=True)),
        joint_states=(
            arm.groups[0].joint_states
            if arm.groups
            else fields.child("joint_states").topic("topic")
        ),
        states={feature: states.texts(feature, tuple(COMPONENTS)) for feature in states},
        arm=arm,
        gripper=gripper,
        action=_action(fields.child("action")),
        limits=_limits(fields.child("limits"), len(arm.joints)),
        interfaces=_interfaces(fields.child("interfaces")),
        allow=fields.texts("allow", ALLOWABLE, default=()),
        commands=_commands(fields.child("commands", optional=True), arm.joints),
        intervention=(
            _intervention(fields.child("intervention"), arm, gripper)
            if "intervention" in fields
            else None
        ),
    )
    fields.finish()
    _check(config, fields)
    return config


def with_topics(robot: RobotConfig, topics: str) -> RobotConfig:
    """Replace topics of the robot: "front=/camera/image_raw, joint_states=/left/joint_states".

    `ConfigError`: The text does not have that form, or names a camera that the robot lacks.
    """
    entries = [
        entry.partition("=") for entry in topics.replace(" ", "").split(",") if entry.strip()
    ]
    wrong = [
        "".join(entry)
        for entry in entries
        if not entry[1] or (entry[2] and not TOPIC.fullmatch(entry[2]))
    ]
    if wrong:
        raise ConfigError(f"topics has {shown(wrong[0])}; write camera=topic, separated by commas.")
    chosen = {n: topic for n, _, topic in entries if topic}
    names = [] if robot.arm.groups else ["joint_states"]  # groups have theirs in the file
    names += [image.name for image in robot.images]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ConfigError(
            f"topics names {shown(unknown[0])}; {robot.source} has {', '.join(names)}."
        )
    images = tuple(
        replace(image, topic=chosen.get(image.name, image.topic)) for image in robot.images
    )
    return replace(
        robot, images=images, joint_states=chosen.get("joint_states", robot.joint_states)
    )


def _images(fields: Fields) -> tuple[ImageSource, ...]:
    sources = []
    for feature, image in fields.children():
        if not feature.startswith("observation."):
            raise fields.error(feature, "is not a feature; it must start with 'observation.'")
        transport = image.text("transport", "raw", ("raw", "compressed"))
        crop = tuple(int(value) for value in image.numbers("crop", 4, 0, 1e5, optional=True))
        if 0 in crop[2:]:
            raise image.error("crop", "is empty; give [top, left, height, width] in pixels")
        sources.append(
            ImageSource(feature, image.topic("topic"), transport, image.flag("resize", False), crop)
        )
    names = [source.name for source in sources]
    if len(set(names)) != len(names) or "joint_states" in names:
        raise ConfigError(
            f"{fields.source}: the cameras {names} need different last parts, none 'joint_states'."
        )
    return tuple(sources)


def _groups(fields: Fields) -> tuple[Group, ...]:
    """Several arms; see `Group`."""
    for key in ("joints", "model"):
        if key in fields:
            raise fields.error(key, "and groups exclude each other; groups name the joints")
    groups = []
    for name, settings in fields.child("groups").children():
        joints = settings.texts("joints")
        if not joints or not name.isidentifier():
            raise settings.error("joints", "is empty, or the group's name is no word")
        groups.append(Group(name, joints, settings.topic("joint_states")))
    topics = [group.joint_states for group in groups]
    if len(groups) < 2 or len(set(topics)) < len(topics):
        raise fields.error("groups", "needs two or more arms, each with its own joint_states")
    return tuple(groups)


def _arm(fields: Fields) -> Arm:
    groups = _groups(fields) if "groups" in fields else ()
    joints = tuple(f"{group.prefix}{name}" for group in groups for name in group.joints)
    joints = joints or fields.texts("joints")
    if not joints:
        raise fields.error("joints", "is empty; name the arm's joints")
    model: Path | None = None
    if "model" in fields:
        named = fields.text("model")
        try:
            model = fields.source.parent / Path(named).expanduser()
            there = model.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, no such home
            raise fields.error("model", f"is {shown(named)}: {short(error)}") from error
        if not there:
            raise fields.error(
                "model",
                f"is {short(model)!r}, not a file; paths are relative to this file's folder",
            )
    tcp = fields.text("tcp") if model else ""
    each = partial(fields.numbers, length=len(joints), optional=True)
    home = each("home")
    sign = each("sign", low=-1.0, high=1.0)
    scale = each("scale", low=1e-6, high=100.0)
    if not {abs(value) for value in sign} <= {1.0}:
        raise fields.error("sign", f"is {list(sign)}; give 1 or -1 for every joint")
    if scale and "unit" in fields:
        raise fields.error(
            "unit", "and scale exclude each other; scale is radians per unit of the policy"
        )
    unit = fields.text("unit", "rad", ("rad", "deg"))
    offset = each("offset", low=-100.0, high=100.0)
    return Arm(model, tcp, joints, home, unit, sign, scale, offset, groups)


def _gripper(fields: Fields) -> Gripper:
    gripper = Gripper(
        joints=fields.texts("joints", default=()),
        measured=_linear(fields, "opening"),
        command=fields.text("command", "opening", ("opening", "joint")),
        policy=_linear(fields, "action"),
        closed=fields.number("closed"),
        open=fields.number("open"),
        action=fields.text("action", "binary", ("binary", "opening", "none")),
        topic=fields.topic("topic"),
    )
    if not gripper.closed < gripper.open:
        raise fields.error(
            "open", f"is {gripper.open}; it must be more than closed ({gripper.closed})"
        )
    if gripper.command == "joint" and not gripper.joints:
        raise fields.error("command", "is joint, but joints names none")
    return gripper


def _linear(fields: Fields, name: str) -> Linear:
    scale = fields.number(f"{name}_scale", default=1.0)
    if abs(scale) < 1e-9:
        raise fields.error(f"{name}_scale", f"is {scale}; it must not be 0")
    return Linear(scale, fields.number(f"{name}_offset", default=0.0))


def _action(fields: Fields) -> Action:
    kind = fields.text("kind", choices=("ee_delta", "joint_position", "joint_delta"))
    if "fps" in fields and "dt" in fields:
        raise fields.error("dt", "and fps exclude each other; give one of them")
    dt = (
        1.0 / fields.number("fps", 0.5, 100.0)
        if "fps" in fields
        else fields.number("dt", 0.01, 2.0)
    )
    if kind != "ee_delta":
        return Action(kind, dt)
    workspace = fields.child("workspace")
    low = workspace.numbers("low", 3)
    high = workspace.numbers("high", 3)
    if not all(a < b for a, b in zip(low, high, strict=True)):
        raise fields.error("workspace", f"is empty: {low} to {high}")
    limits = PoseLimits(
        position_scale=fields.number("position_scale", 1e-6, 1.0),
        rotation_scale=fields.number("rotation_scale", 1e-6, math.pi),
        workspace_low=np.array(low),
        workspace_high=np.array(high),
        max_tilt=fields.number("max_tilt", 0.0, 1.5),
        max_yaw=fields.number("max_yaw", 0.0, math.pi),
    )
    return Action(kind, dt, limits, fields.number("max_joint_step", 1e-3, math.pi, default=0.6))


def _limits(fields: Fields, joints: int) -> Limits:
    has_position = "position" in fields
    position = fields.child("position", optional=True)
    low, high = (
        position.numbers(end, joints, optional=not has_position) for end in ("low", "high")
    )
    if not all(a < b for a, b in zip(low, high, strict=True)):
        raise position.error("low", f"is not below high for every joint: {low}, {high}")
    return Limits(
        low,
        high,
        fields.numbers("velocity", joints, 1e-3, 100.0),
        fields.numbers("step", joints, 1e-3, 10.0),
        fields.numbers("physical_velocity", joints, 1e-3, 100.0, optional=True),
        fields.numbers("acceleration", joints, 1e-3, 100.0, optional=True),
    )


def _commands(fields: Fields, joints: tuple[str, ...]) -> CommandSource:
    usual = CommandSource()
    source = CommandSource(
        topic=fields.topic("topic") if "topic" in fields else usual.topic,
        kind=fields.text("kind", usual.kind, ("joint_state", "positions")),
        joints=fields.texts("joints", default=joints),
        gripper=fields.texts("gripper", default=()),
    )
    if len(source.joints) != len(joints):
        raise fields.error(
            "joints", f"names {len(source.joints)} joints; the arm has {len(joints)}"
        )
    return source


def _intervention(fields: Fields, arm: Arm, gripper: Gripper | None) -> Intervention:
    kind = fields.text("kind", choices=tuple(DEVICES))
    body = Body(arm.joints)
    if gripper is not None:
        body = Body(arm.joints, gripper.closed, gripper.open, gripper.measured.ours)
    device = DEVICES[kind](fields, body)
    if device.moves_tcp and arm.model is None:
        raise fields.error("kind", f"is {kind}, which needs arm.model")
    topic = fields.topic("button_topic") if "button_topic" in fields else ""
    patience = Patience(
        timeout=fields.number("timeout", 0.02, 5.0, default=0.25),
        release=fields.number("release", 0.0, 10.0, default=0.5),
        by_button=bool(topic) or "button" in fields,
    )
    return Intervention(device, patience, topic)


def _interfaces(fields: Fields) -> dict[str, ActionInterface]:
    found = {}
    for name, settings in fields.children():
        if name not in INTERFACES:
            raise fields.error(name, f"is unknown; the interfaces are {', '.join(INTERFACES)}")
        found[name] = INTERFACES[name](settings)
    if not found:
        raise ConfigError(
            f"{fields.source}: interfaces is empty; give one of {', '.join(INTERFACES)}."
        )
    return found


def _check(config: RobotConfig, fields: Fields) -> None:
    """Validate the rules between the parts of a file."""
    components = {component for parts in config.states.values() for component in parts}
    if config.arm.model is None:
        if config.action.kind == "ee_delta" or components & set(POSE_COMPONENTS):
            raise fields.error("arm.model", "is missing; ee_delta actions and tcp states need it")
        if not config.limits.low:
            raise fields.error("limits.position", "is missing; without arm.model it is required")
    if config.action.kind != "ee_delta" and components & set(COMMAND_COMPONENTS):
        raise fields.error(
            "state", f"has {', '.join(COMMAND_COMPONENTS)}, which only ee_delta actions have"
        )
    _check_groups(config, fields)
    if config.gripper is None and components & {"finger_opening", "commanded_gripper"}:
        raise fields.error("gripper", "is missing; finger_opening and commanded_gripper need it")
    if config.gripper is not None and not config.gripper.joints and "finger_opening" in components:
        raise fields.error("gripper.joints", "is missing; finger_opening needs it")
    _check_inverses(config, fields)
    shared = set(config.gripper.joints) & set(config.arm.joints) if config.gripper else set()
    if shared:
        raise fields.error("gripper.joints", f"repeats the arm's {', '.join(sorted(shared))}")


def _check_groups(config: RobotConfig, fields: Fields) -> None:
    """Validate what several arms change: a command topic for each, and grippers as joints."""
    wanted = set(config.arm.parts)
    for name, interface in config.interfaces.items():
        if set(interface.topics) != wanted:
            need = (
                f"one topic for each of {', '.join(sorted(wanted))}" if wanted != {""} else "a name"
            )
            raise fields.error(f"interfaces.{name}.topic", f"needs {need}")
    if config.arm.groups and config.gripper is not None:
        raise fields.error(
            "gripper", "is one gripper, and there are several arms; name grippers as their joints"
        )


def _check_inverses(config: RobotConfig, fields: Fields) -> None:
    """Check that every mapping is invertible in both directions, over the robot's whole range."""
    limits = config.limits
    joints = len(config.arm.joints)
    low = limits.low or (-math.pi,) * joints
    high = limits.high or (math.pi,) * joints
    mappings: list[tuple[str, Linear, Any, Any]] = [("arm.offset", config.arm.units, low, high)]
    if (gripper := config.gripper) is not None:
        for name, mapping in (("opening", gripper.measured), ("action", gripper.policy)):
            mappings.append((f"gripper.{name}_offset", mapping, gripper.closed, gripper.open))
    for key, mapping, low, high in mappings:
        ours = np.linspace(low, high)
        theirs = mapping.theirs(ours)
        for values, again in (
            (ours, mapping.ours(theirs)),
            (theirs, mapping.theirs(mapping.ours(theirs))),
        ):
            if not np.all(np.abs(again - values) < INVERSE * np.abs(values[-1] - values[0])):
                problem = (
                    "is too large for scale and limits: the mapping there and back loses more than"
                )
                raise fields.error(key, f"{problem} {INVERSE:g} of its range")
