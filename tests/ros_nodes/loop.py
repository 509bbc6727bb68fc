"""A robot, its cameras, a policy and the controller on one simulated clock, for the tests of the
controller.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from builtin_interfaces.msg import Time
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image, JointState

from ceed_vla.ros_nodes.robot.controller import PolicyController
from ceed_vla.ros_nodes.robot.intervention.base import Wish
from ceed_vla.ros_nodes.robot.intervention.guides import LeaderGuide
from ceed_vla.ros_nodes.robot.intervention.patience import Patience
from ceed_vla.ros_nodes.robot.intervention.person import Person
from ceed_vla.ros_nodes.robot.messages import array_to_image
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.outage import RESUME_WITHIN
from ceed_vla.ros_nodes.robot.policy_stream import PolicyStream
from ceed_vla.ros_nodes.robot.robot_config import Action, Arm, ImageSource, Limits, RobotConfig
from ceed_vla.ros_nodes.robot.safety import JOINT_STATES, Decision, SafetyFilter, SafetyLimits
from ceed_vla.ros_nodes.robot.step_grid import SLEW, StepGrid
from ceed_vla.serving.predictor import PolicySpec, Request, Response

FEATURE = "observation.images.front"
JOINTS = ("shoulder", "elbow")
M, H, DT, RATE = 8, 4, 0.1, 100.0
CLIMB = 0.02  # change of the policy's action per step [rad]
EVEN = CLIMB / (RATE * DT)  # change per tick without disturbances [rad]
PIXELS = np.zeros((4, 4, 3), np.uint8)


def robot() -> RobotConfig:
    """Two joints, one camera."""
    return RobotConfig(
        source=Path("robot.yaml"),
        images=(ImageSource(FEATURE, "front/image_raw", "raw", False),),
        joint_states="joint_states",
        states={"observation.state": ("joint_positions",)},
        arm=Arm(None, "", JOINTS, (), "rad"),
        gripper=None,
        action=Action("joint_position", DT),
        limits=Limits((-9.0, -9.0), (9.0, 9.0), (5.0, 5.0), (9.0, 9.0)),
        interfaces={},
    )


def stamp(now: float) -> Time:
    return Time(sec=int(now), nanosec=int(1e9 * (now % 1)))


class Policy:
    """Replaces the worker: every action is `CLIMB` above the last one, and answers take `delay`.

    Attributes:
        delay: Time of the next answers [s].
        asked: Every request, with its time.
    """

    def __init__(self) -> None:
        self.spec = PolicySpec(
            "fake", "ceed_vla", {FEATURE: (3, 4, 4)}, {"observation.state": 2}, 2, M, H, 0.02
        )
        self.delay, self.now = 0.02, 0.0
        self.error: tuple[str, str] | None = None  # of the next answers: text, code
        self.failed: str | None = None
        self.ready = True
        self.asked: list[tuple[float, Request]] = []
        self._due: float | None = None
        self._chunks: dict[int, np.ndarray] = {}

    @property
    def idle(self) -> bool:
        return self._due is None

    @property
    def due(self) -> float:
        return np.inf if self._due is None else self._due

    def submit(self, request: Request) -> bool:
        assert self.idle
        self.asked.append((self.now, request))
        self._due = self.now + self.delay
        return True

    def poll(self) -> Response | None:
        if self._due is None or self.now < self._due - 1e-9:
            return None
        self._due = None
        request = self.asked[-1][1]
        if self.error is not None:
            return Response(request.id, error=self.error[0], code=self.error[1])
        at = request.observation["observation.state"][0]
        chunk = at + CLIMB * np.arange(1, M + 1)
        if request.previous is not None:
            before = self._chunks[int(request.previous[0])]
            k = request.frozen_steps
            frozen = before[request.shift_steps : request.shift_steps + k]
            base = frozen[-1] if k else before[request.shift_steps - 1]
            chunk = np.concatenate([frozen, base + CLIMB * np.arange(1, M + 1 - k)])
        self._chunks[request.id] = chunk
        actions = np.stack([chunk, np.zeros(M)], axis=1).astype(np.float32)
        seconds = {"total": self.delay}
        return Response(request.id, actions, np.array([request.id]), 1, "converged", seconds)


class Loop:
    """A robot, its cameras and the controller on one simulated clock.

    Attributes:
        sent: (time, decision) of every tick.
        cameras: Whether images arrive.
        states: Whether joint states arrive.
        alive: Whether the images change.
        leader: Positions (2,) of a leader arm; None while it sends nothing.
        hand: Whether a person holds the leader arm.
        late: Tick -> its delay [s].
    """

    def __init__(
        self,
        camera_rate: float = 30.0,
        phase: float = 0.017,
        enable: bool = True,
        dt: float = DT,
        slew: float = SLEW,
        replan_steps: int | None = 4,
        blend_in: float = 0.0,
        step: float = 9.0,
        resume_within: float = RESUME_WITHIN,
    ) -> None:
        self.policy, self.now = Policy(), 100.0
        config = robot()
        self.observations = Observations(
            config, self.policy.spec.cameras, self.policy.spec.states, None
        )
        limits = config.limits
        self.safety = SafetyFilter(
            SafetyLimits(
                JOINTS,
                np.array(limits.low),
                np.array(limits.high),
                np.array(limits.velocity),
                np.full(len(JOINTS), step),
                {JOINT_STATES: 0.2, "front": 0.3},
            )
        )
        motion, grid = Motion(config), StepGrid(RATE, dt, slew)
        worker: Any = self.policy
        self.stream = PolicyStream(
            self.observations,
            motion,
            worker,
            grid,
            replan_steps=replan_steps,
            instruction="climb",
            within=resume_within,
        )
        guide = LeaderGuide(JOINTS, np.full(len(JOINTS), step), None)
        self.person = Person(guide, Patience(timeout=0.2, release=0.1, by_button=False))
        self.controller = PolicyController(
            self.observations,
            motion,
            self.safety,
            self.stream,
            blend_in,
            resume_within,
            person=self.person,
        )
        self.leader: np.ndarray | None = None
        self.hand = False
        self.sent: list[tuple[float, Decision | None]] = []
        self.position = np.zeros(2)
        self.follows = True  # whether commands move the arm
        self.cameras = self.states = self.alive = True
        self._images = 0
        self.late: dict[int, float] = {}
        self._grid = self.now
        self._image_period = 1.0 / camera_rate
        self._next_image, self._next_tick = self.now + phase, self.now
        self.settle()
        self._image()
        if enable:
            assert self.controller.enable(self.now) is None

    def settle(self) -> None:
        """Send joint states of the last 0.3 s that agree, so that the pose is trusted."""
        for step in range(-30, 1):
            self._joints(self.now + 0.01 * step)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while (event := min(self._next_tick, self._next_image, self.policy.due)) < end:
            self.now = self.policy.now = max(event, self.now)
            if event == self.policy.due:
                self.controller.receive(self.now)
                assert self.policy.idle
            elif event == self._next_image:
                self._next_image += self._image_period
                self._image()
                self.controller.observed(self.now)
            else:
                self._tick()

    def _tick(self) -> None:
        self._joints()
        if self.leader is not None:
            self.person.take(Wish(self.hand, joints=self.leader), self.now)
        decision = self.controller.tick(self.now, self.now)
        self.sent.append((self.now, decision))
        if decision is not None and decision.positions is not None and self.follows:
            self.position = decision.positions
        self.controller.after_tick(self.now)
        # Like rclpy's timer: a late tick does not move the grid, and past ticks are skipped.
        self._grid += self.controller.grid.period
        while self._grid <= self.now:
            self._grid += self.controller.grid.period
        self._next_tick = self._grid + self.late.get(len(self.sent), 0.0)

    def _joints(self, now: float | None = None) -> None:
        message = JointState(name=list(JOINTS), position=self.position.tolist())
        message.header.stamp = stamp(self.now if now is None else now)
        if self.states:
            self.safety.measure(*self.observations.take_joints(message))

    def _image(self) -> None:
        if self.cameras:
            self._images += self.alive
            image: Image = array_to_image(
                PIXELS + np.uint8(self._images % 200), stamp(self.now), "camera"
            )
            self.observations.cameras[0].take(serialize_message(image))

    @property
    def path(self) -> np.ndarray:
        """Return the commands (T, 2)."""
        return np.array(
            [d.positions for _, d in self.sent if d is not None and d.positions is not None]
        )

    def steps(self, since: int = 0) -> np.ndarray:
        """Return the change of the first joint from command to command."""
        return np.diff(self.path[since:, 0])
