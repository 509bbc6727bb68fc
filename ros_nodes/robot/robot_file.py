"""Read a robot's YAML file, such as launch/config/tabletop_robot.yaml, and refuse what cannot work."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import PoseLimits
from ros_nodes.robot.interfaces.base import INTERFACES, ActionInterface
from ros_nodes.robot.robot_config import (
    ACTION_KINDS,
    COMMAND_COMPONENTS,
    COMPONENTS,
    GRIPPER_ACTIONS,
    JOINT_UNITS,
    POSE_COMPONENTS,
    TRANSPORTS,
    Action,
    Arm,
    Gripper,
    ImageSource,
    Limits,
    RobotConfig,
)
from ros_nodes.robot.texts import short, shown
from ros_nodes.robot.yaml_fields import Fields

PACKAGED = "tabletop_robot.yaml"


def packaged_config(name: str = PACKAGED) -> Path:
    """A file of launch/config: in the source tree, or where pip or colcon installed it.

    Raises:
        ConfigError: It is in neither.
    """
    for folder in Path(__file__).resolve().parents:
        for place in ("launch/config", "share/ceed_vla/launch/config"):
            if (folder / place / name).is_file():
                return folder / place / name
    raise ConfigError(f"This installation lacks launch/config/{name}; reinstall ceed_vla.")


def load_robot_config(path: str | Path = "") -> RobotConfig:
    """Read a robot's file; the packaged tabletop robot's if `path` is empty.

    Raises:
        ConfigError: What is wrong, at which key, and what is allowed.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"The robot's file is {path!r:.100}; give its path.")
    file = Path(path) if str(path) else packaged_config()
    fields = Fields.read(file)
    arm = _arm(fields.child("arm"))
    states = fields.child("state", optional=True)
    config = RobotConfig(
        source=file,
        images=_images(fields.child("images", optional=True)),
        joint_states=fields.child("joint_states").topic("topic"),
        states={feature: states.texts(feature, tuple(COMPONENTS)) for feature in states},
        arm=arm,
        gripper=_gripper(fields.child("gripper")) if "gripper" in fields else None,
        action=_action(fields.child("action")),
        limits=_limits(fields.child("limits"), len(arm.joints)),
        interfaces=_interfaces(fields.child("interfaces")),
    )
    fields.finish()
    _check(config, fields)
    return config


# ---- the parts of the file ------------------------------------------------------------------------------------------


def _images(fields: Fields) -> tuple[ImageSource, ...]:
    sources = []
    for feature, image in fields.children():
        if not feature.startswith("observation."):
            raise fields.error(feature, "is no feature; it must start with 'observation.'")
        transport = image.text("transport", "raw", TRANSPORTS)
        sources.append(ImageSource(feature, image.topic("topic"), transport, image.flag("resize", False)))
    names = [source.name for source in sources]
    if len(set(names)) != len(names) or "joint_states" in names:
        raise ConfigError(f"{fields.source}: the cameras {names} need different last parts, none 'joint_states'.")
    return tuple(sources)


def _arm(fields: Fields) -> Arm:
    joints = fields.texts("joints")
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
            raise fields.error("model", f"is {short(model)!r}, no file; paths start at this file's folder")
    tcp = fields.text("tcp") if model else ""
    home = fields.numbers("home", len(joints)) if "home" in fields else ()
    return Arm(model, tcp, joints, home, fields.text("unit", "rad", JOINT_UNITS))


def _gripper(fields: Fields) -> Gripper:
    gripper = Gripper(
        joints=fields.texts("joints", default=()),
        opening_scale=fields.number("opening_scale", default=1.0),
        closed=fields.number("closed"),
        open=fields.number("open"),
        action=fields.text("action", "binary", GRIPPER_ACTIONS),
        topic=fields.topic("topic"),
    )
    if not gripper.closed < gripper.open:
        raise fields.error("open", f"is {gripper.open}; it must be more than closed ({gripper.closed})")
    return gripper


def _action(fields: Fields) -> Action:
    kind = fields.text("kind", choices=ACTION_KINDS)
    dt = fields.number("dt", 0.01, 2.0)
    if kind != "ee_delta":
        return Action(kind, dt)
    workspace = fields.child("workspace")
    low, high = workspace.numbers("low", 3), workspace.numbers("high", 3)
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
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    if "position" in fields:
        position = fields.child("position")
        low, high = position.numbers("low", joints), position.numbers("high", joints)
        if not all(a < b for a, b in zip(low, high, strict=True)):
            raise position.error("low", f"is not below high for every joint: {low}, {high}")
    physical = "physical_velocity"
    return Limits(
        low,
        high,
        fields.numbers("velocity", joints, 1e-3, 100.0),
        fields.numbers("step", joints, 1e-3, 10.0),
        fields.numbers(physical, joints, 1e-3, 100.0) if physical in fields else (),
    )


def _interfaces(fields: Fields) -> dict[str, ActionInterface]:
    found = {}
    for name, settings in fields.children():
        if name not in INTERFACES:
            raise fields.error(name, f"is unknown; the interfaces are {', '.join(INTERFACES)}")
        found[name] = INTERFACES[name](settings)
    if not found:
        raise ConfigError(f"{fields.source}: interfaces is empty; give one of {', '.join(INTERFACES)}.")
    return found


def _check(config: RobotConfig, fields: Fields) -> None:
    """What only holds between the parts."""
    components = {component for parts in config.states.values() for component in parts}
    if config.arm.model is None:
        if config.action.kind == "ee_delta" or components & set(POSE_COMPONENTS):
            raise fields.error("arm.model", "is missing; ee_delta actions and tcp states need it")
        if not config.limits.low:
            raise fields.error("limits.position", "is missing; without arm.model it must be given")
    if config.action.kind != "ee_delta" and components & set(COMMAND_COMPONENTS):
        raise fields.error("state", f"has {', '.join(COMMAND_COMPONENTS)}, which only ee_delta actions have")
    if config.gripper is None and components & {"finger_opening", "commanded_gripper"}:
        raise fields.error("gripper", "is missing; finger_opening and commanded_gripper need it")
    if config.gripper is not None and not config.gripper.joints and "finger_opening" in components:
        raise fields.error("gripper.joints", "is missing; finger_opening needs it")
    shared = set(config.gripper.joints) & set(config.arm.joints) if config.gripper else set()
    if shared:
        raise fields.error("gripper.joints", f"repeats the arm's {', '.join(sorted(shared))}")
