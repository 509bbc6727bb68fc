"""Builds the parts of a policy node from its parameters, and checks that checkpoint and robot fit;
free of ROS nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ceed_vla.errors import ConfigError, raised_as
from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.arm_model import arm_model
from ceed_vla.ros_nodes.robot.controller import PolicyController
from ceed_vla.ros_nodes.robot.findings import explained, split
from ceed_vla.ros_nodes.robot.inference import InferenceWorker, RunsPolicy
from ceed_vla.ros_nodes.robot.interfaces.base import ActionInterface, CommandedArm
from ceed_vla.ros_nodes.robot.intervention.guides import Guide, LeaderGuide
from ceed_vla.ros_nodes.robot.intervention.person import Person
from ceed_vla.ros_nodes.robot.intervention.twist_guide import TwistGuide
from ceed_vla.ros_nodes.robot.joint_sources import JointSources
from ceed_vla.ros_nodes.robot.local_policy import local_policy
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.observations import Camera, Observations
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_stream import PolicyStream
from ceed_vla.ros_nodes.robot.pose_trust import PHYSICAL_VELOCITY
from ceed_vla.ros_nodes.robot.review import feature_lengths, review
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, with_topics
from ceed_vla.ros_nodes.robot.safety import JOINT_STATES, SafetyFilter, SafetyLimits
from ceed_vla.ros_nodes.robot.step_grid import StepGrid
from ceed_vla.serving.data_ranges import Range
from ceed_vla.serving.predictor_types import PolicySpec
from ceed_vla.texts import shown

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm


GRIP_SHARE = 0.15  # of the gripper's way: how near a leader's gripper must be to be followed
# Parameters of a policy on this computer, and of one on a server.
OF_HERE = (
    "device",
    "engine",
    "inference_mode",
    "inference_python",
    "inference_threads",
    "inference_pin",
    "inference_delay",
    "chunk_deadline",
)
OF_SERVER = (
    "inference_key_file",
    "inference_ca_file",
    "inference_timeout",
    "inference_jpeg_quality",
)


@dataclass(frozen=True)
class PolicySetup:
    """The parts that the node creates when it is configured."""

    robot: RobotConfig
    interface: ActionInterface
    arm: CommandedArm
    worker: InferenceWorker
    observations: Observations
    sources: JointSources
    safety: SafetyFilter
    controller: PolicyController
    person: Person | None = None
    warnings: tuple[str, ...] = ()  # of the review: unusual values in the robot's file

    @cached_property
    def parts(self) -> dict[str, tuple[slice, CommandedArm]]:
        """Group of joints -> its place among all, and its arm; see `Arm.parts`."""
        whole = self.arm
        return {
            name: (
                part,
                replace(
                    whole,
                    joints=self._own_names(name, part),
                    low=whole.low[part],
                    high=whole.high[part],
                    step=whole.step[part],
                ),
            )
            for name, part in self.robot.arm.parts.items()
        }

    def _own_names(self, group: str, part: slice) -> tuple[str, ...]:
        """Names of a group's joints in its messages."""
        known = {one.name: one.joints for one in self.robot.arm.groups}
        return known.get(group, self.arm.joints[part])


def make_setup(
    values: Mapping[str, Any],
    notify: Callable[[], None],
    slew: float,
    make_worker: Callable[..., Any] = InferenceWorker,
) -> PolicySetup:
    """Check robot and checkpoint, and build the controller; `values` are of `POLICY_PARAMETERS`.

    The checkpoint loads in the background, and the controller holds until it is loaded. `notify` is
    called in another thread when loading ends or fails, and after every answer of the policy.
    `CheckpointError`: The checkpoint is missing, or its config.json cannot be read. `ServerError`:
    The policy's server cannot be reached. `ConfigError`: Parameters, robot and policy do not fit
    each other.
    """
    robot = with_topics(load_robot_config(values["robot_config"]), values["topics"])
    policy = make_policy(values, robot.action.dt)
    try:
        return _checked_setup(values, robot, policy, partial(make_worker, notify=notify), slew)
    except BaseException:
        policy.stop(0.0)  # a server need not wait for this node
        raise


def make_policy(values: Mapping[str, Any], action_dt: float) -> RunsPolicy:
    """Return where the parameters' policy runs, before it is loaded.

    Args:
        values: Of `POLICY_PARAMETERS`.
        action_dt: Duration of the robot's step [s].
    """
    replan_steps = values["replan_steps"] or None
    _check_place(values)
    if values["inference_url"]:
        missing = "pip install msgpack websockets"
        with raised_as(ConfigError, "inference_url cannot be used", missing):
            from ceed_vla.ros_nodes.robot.remote_policy import RemotePolicy, RemoteSettings

        return RemotePolicy(
            RemoteSettings(
                values["inference_url"],
                key_file=values["inference_key_file"],
                ca_file=values["inference_ca_file"],
                timeout_s=values["inference_timeout"],
                jpeg_quality=values["inference_jpeg_quality"],
                decoding=values["decoding"],
                replan_steps=replan_steps,
            )
        )
    return local_policy(
        values["checkpoint"],
        mode=values["inference_mode"],
        python=values["inference_python"],
        # behind the command stream and the thread that decodes images
        priority=max(values["realtime_priority"] - 2, 0),
        discover_packages=values["discover_packages"],
        decoding=values["decoding"],
        replan_steps=replan_steps,
        threads=values["inference_threads"],
        pin=values["inference_pin"],
        device=values["device"],
        engine=values["engine"],
        chunk_deadline=values["chunk_deadline"] or action_dt,
        delay_s=values["inference_delay"],
    )


def _check_place(values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for parameters that have no meaning where the policy runs."""
    remote = bool(values["inference_url"])
    usual = defaults(POLICY_PARAMETERS)
    for name in OF_HERE if remote else OF_SERVER:
        if values[name] != usual[name]:
            raise ConfigError(
                f"{name} is {shown(values[name])}; with inference_url it is the server's. Give it "
                "to ceed-vla serve."
                if remote
                else f"{name} is {shown(values[name])}; it is used with inference_url only."
            )


def _checked_setup(
    values: Mapping[str, Any],
    robot: RobotConfig,
    policy: RunsPolicy,
    make_worker: Callable[[RunsPolicy], Any],
    slew: float,
) -> PolicySetup:
    """Check robot and policy, and build the parts; see `make_setup`."""
    interface = robot.interface(values["action_interface"])
    replan_steps = values["replan_steps"] or None
    model = arm_model(robot)
    spec = policy.declared()
    check_fit(robot, spec)
    if replan_steps and spec.chunk_steps and replan_steps > spec.chunk_steps:
        raise ConfigError(
            f"replan_steps is {replan_steps}; chunks of {spec.checkpoint} have {spec.chunk_steps} "
            "steps."
        )
    observations = Observations(
        robot, spec.cameras, spec.states, model, values["frozen_image_timeout"]
    )
    warnings = check_review(robot, model, spec, policy.ranges(feature_lengths(robot)))
    limits = safety_limits(robot, interface, model, observations.cameras, values)
    low, high = limits.position_low, limits.position_high
    step = limits.max_step
    arm = CommandedArm(robot.arm.joints, 1.0 / values["command_rate"], low, high, step, model)
    safety = SafetyFilter(limits)
    safety.follows = not values["dry_run"]
    worker = make_worker(policy)
    motion = Motion(robot, model)
    grid = StepGrid(values["command_rate"], robot.action.dt, slew)
    instruction = values["instruction"]
    stream = PolicyStream(
        observations,
        motion,
        worker,
        grid,
        replan_steps=replan_steps,
        instruction=instruction,
        within=values["resume_within"],
    )
    person = make_person(robot, model, limits)
    controller = PolicyController(
        observations,
        motion,
        safety,
        stream,
        values["blend_in"],
        values["resume_within"],
        person=person,
    )
    worker.begin()
    sources = JointSources(observations.table.wanted)
    return PolicySetup(
        robot,
        interface,
        arm,
        worker,
        observations,
        sources,
        safety,
        controller,
        person,
        tuple(warnings),
    )


def make_person(robot: RobotConfig, model: ModelArm | None, limits: SafetyLimits) -> Person | None:
    """Return who may take over from the policy; None if the robot's file names no device."""
    if robot.intervention is None:
        return None
    guide: Guide
    if robot.intervention.device.moves_tcp:
        assert model is not None  # `robot_file` validates it
        guide = TwistGuide(model, robot.action.pose, limits.max_velocity, limits.max_acceleration)
    else:
        gripper = robot.gripper
        tolerance = GRIP_SHARE * (gripper.open - gripper.closed) if gripper else 0.0
        guide = LeaderGuide(robot.arm.joints, limits.max_step, limits.max_acceleration, tolerance)
    return Person(guide, robot.intervention.patience)


def check_fit(robot: RobotConfig, spec: PolicySpec) -> None:
    """Raise `ConfigError` if a checkpoint's actions do not fit the robot; `Observations` checks the
    policy's inputs.
    """
    if spec.action_dim != robot.action_dim:
        gripper = robot.gripper.action if robot.gripper else "absent"
        raise ConfigError(
            f"The checkpoint {spec.checkpoint} has actions of {spec.action_dim} values; "
            f"{robot.action.kind} of {robot.source} takes {robot.action_dim} (joints "
            f"{', '.join(robot.arm.joints)}; gripper {gripper})."
        )

    if robot.action.kind == "joint_position" and any(
        dim < len(robot.arm.joints) for dim in spec.delta_dims
    ):
        raise ConfigError(
            f"The checkpoint {spec.checkpoint} gives increments (delta_dims "
            f"{list(spec.delta_dims)}), and {robot.source} takes positions (joint_position); give "
            "it an action of kind joint_delta."
        )


def check_review(
    robot: RobotConfig,
    model: ModelArm | None,
    spec: PolicySpec,
    ranges: Mapping[str, Range | str],
) -> list[str]:
    """Return the warnings of `review`; raise `ConfigError` for its problems."""
    findings = review(robot, model, physical_velocity(robot, model), ranges, spec)
    problems, warnings = split(findings)
    if problems:
        raise ConfigError(explained(robot, spec.checkpoint, problems))
    return warnings


def physical_velocity(robot: RobotConfig, model: ModelArm | None) -> Array:
    """Largest velocities of the joints (J,) [rad/s], from the robot's file or else from the URDF.

    For a joint that neither specifies: the larger of the file's velocity limit and
    `PHYSICAL_VELOCITY`.
    """
    limits = robot.limits
    if limits.physical_velocity:
        return np.array(limits.physical_velocity)
    own = model.velocity if model is not None else np.full(len(limits.step), np.nan)
    return np.where(np.isnan(own), np.maximum(limits.velocity, PHYSICAL_VELOCITY), own)


def safety_limits(
    robot: RobotConfig,
    interface: ActionInterface,
    model: ModelArm | None,
    cameras: Iterable[Camera],
    values: Mapping[str, Any],
) -> SafetyLimits:
    """Return the robot's limits, lowered by the parameters' `values` where these are lower."""
    limits, gripper = robot.limits, robot.gripper
    low = np.array(limits.low)
    high = np.array(limits.high)
    if model is not None and not limits.low:
        low, high = model.low, model.high
    step = np.minimum(limits.step, values["max_joint_step"])
    opening = {"gripper_low": gripper.closed, "gripper_high": gripper.open} if gripper else {}
    timeouts = {camera.source.name: values["image_timeout"] for camera in cameras}
    return SafetyLimits(
        joint_names=robot.arm.joints,
        position_low=low,
        position_high=high,
        max_velocity=np.minimum(limits.velocity, values["max_joint_velocity"]),
        max_step=step,
        timeouts={JOINT_STATES: values["joint_state_timeout"], **timeouts},
        physical_velocity=physical_velocity(robot, model),
        max_acceleration=np.array(limits.acceleration) if limits.acceleration else None,
        commands_joints=interface.commands_joints,
        **opening,
    )
