"""Builds what a policy node runs from its parameters, and checks that checkpoint and robot fit; free of ROS nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ceed_vla.errors import ConfigError
from ros_nodes.robot.controller import PolicyController, ticks_per_step
from ros_nodes.robot.inference import InferenceWorker
from ros_nodes.robot.interfaces.base import ActionInterface
from ros_nodes.robot.motion import Motion
from ros_nodes.robot.observations import Camera, Observations
from ros_nodes.robot.plausibility import PHYSICAL_VELOCITY
from ros_nodes.robot.robot_file import RobotConfig, load_robot_config
from ros_nodes.robot.safety import JOINT_STATES, SafetyFilter, SafetyLimits

if TYPE_CHECKING:
    from ros_nodes.robot.kinematics import ModelArm


@dataclass(frozen=True)
class PolicySetup:
    """Everything that is made at configure."""

    robot: RobotConfig
    interface: ActionInterface
    model: ModelArm | None
    worker: InferenceWorker
    observations: Observations
    safety: SafetyFilter
    controller: PolicyController


def make_setup(
    values: Mapping[str, Any], cancelled: Callable[[], bool], notify: Callable[[], None], slew: float
) -> PolicySetup:
    """Load robot and checkpoint, warm the policy up, and build the controller; `values` are of `POLICY_PARAMETERS`.

    `cancelled` is asked while the checkpoint loads, True gives up; `notify` is called, in another thread, when the
    policy has answered.

    Raises:
        CheckpointError: A checkpoint that does not load.
        ConfigError: Parameters, robot and checkpoint that do not fit each other.
    """
    robot = load_robot_config(values["robot_config"])
    interface = robot.interface(values["action_interface"])
    ticks_per_step(values["command_rate"], robot.action.dt)  # refused before the checkpoint loads
    model = None
    if robot.arm.model is not None:
        from ros_nodes.robot.kinematics import ModelArm

        arm, step = robot.arm, robot.action.max_joint_step
        model = ModelArm(robot.arm.model, arm.tcp, arm.joints, home=arm.home, max_joint_step=step)
    worker = InferenceWorker(
        values["checkpoint"],
        mode=values["inference_mode"],
        discover_packages=values["discover_packages"],
        decoding=values["decoding"],
        replan_steps=values["replan_steps"] or None,
        threads=values["inference_threads"],
        device=values["device"],
        chunk_deadline=values["chunk_deadline"] or robot.action.dt,
        delay_s=values["inference_delay"],
        notify=notify,
    )
    try:
        spec = worker.start(cancelled=cancelled)
        if spec.action_dim != robot.action_dim:
            gripper = robot.gripper.action if robot.gripper else "absent"
            raise ConfigError(
                f"The checkpoint {spec.checkpoint} has actions of {spec.action_dim} values; {robot.action.kind} of "
                f"{robot.source} takes {robot.action_dim} (joints {', '.join(robot.arm.joints)}; gripper {gripper})."
            )
        observations = Observations(robot, spec.cameras, spec.states, model)
        safety = SafetyFilter(_limits(robot, interface, model, observations.cameras, values))
        controller = PolicyController(
            observations,
            Motion(robot, model),
            safety,
            worker,
            action_dt=robot.action.dt,
            command_rate=values["command_rate"],
            replan_steps=values["replan_steps"] or None,
            instruction=values["instruction"],
            slew=slew,
        )
    except BaseException:
        worker.close()
        raise
    return PolicySetup(robot, interface, model, worker, observations, safety, controller)


def _limits(
    robot: RobotConfig,
    interface: ActionInterface,
    model: ModelArm | None,
    cameras: Iterable[Camera],
    values: Mapping[str, Any],
) -> SafetyLimits:
    limits, gripper = robot.limits, robot.gripper
    low, high = np.array(limits.low), np.array(limits.high)
    if model is not None and not limits.low:
        low, high = model.low, model.high
    physical = np.array(limits.physical_velocity)
    if not len(physical):
        own = model.velocity if model is not None else np.full(len(limits.step), np.nan)
        physical = np.where(np.isnan(own), np.maximum(limits.velocity, PHYSICAL_VELOCITY), own)
    step = np.minimum(limits.step, values["max_joint_step"])
    if not interface.commands_joints:  # the arm's posture may be another
        step = np.full_like(step, 2.0 * np.pi)
    opening = {"gripper_low": gripper.closed, "gripper_high": gripper.open} if gripper else {}
    timeouts = {camera.source.name: values["image_timeout"] for camera in cameras}
    return SafetyLimits(
        joint_names=robot.arm.joints,
        position_low=low,
        position_high=high,
        max_velocity=np.minimum(limits.velocity, values["max_joint_velocity"]),
        max_step=step,
        timeouts={JOINT_STATES: values["joint_state_timeout"], **timeouts},
        physical_velocity=physical,
        **opening,
    )
