r"""The simulated arm as a LeRobot robot, for `lerobot-rollout`.

    PYTHONPATH=examples lerobot-rollout --discover_packages_path=simulated_robot \
        --robot.type=simulated_arm --policy.path=ceed_vla/pretrained/student \
        --task="move the red cube into the bin" --inference.type=rtc

Each tick is one control step; without an action, the arm holds. A robot plugin is a package:
LeRobot imports it, and searches it for the class that the configuration is named after.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

from ceed_vla.sim.environment import VALIDATION_SEED, Environment
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv

STATE = [f"state_{i}.pos" for i in range(14)]  # LeRobot takes numbers named .pos or .vel only
ACTION = [f"{name}.pos" for name in ("x", "y", "z", "roll", "pitch", "yaw", "gripper")]


@RobotConfig.register_subclass("simulated_arm")
@dataclass
class SimulatedArmConfig(RobotConfig):
    """The scene."""

    seed: int = VALIDATION_SEED  # of the episode
    family: str = "cube_in_bin"  # task family


class SimulatedArm(Robot):
    """The simulated arm; prints at the end whether the episode was solved."""

    config_class = SimulatedArmConfig
    name = "simulated_arm"

    def __init__(self, config: SimulatedArmConfig) -> None:
        super().__init__(config)
        self.config = config
        self._env: Environment | None = None
        self._steps = 0
        self._solved = 0
        self._idle = False

    @property
    def observation_features(self) -> dict[str, Any]:
        return {**dict.fromkeys(STATE, float), "front": (96, 96, 3), "wrist": (96, 96, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(ACTION, float)

    @property
    def is_connected(self) -> bool:
        return self._env is not None

    def connect(self, calibrate: bool = True) -> None:
        self._env = Environment(CeedTabletopEnv(task=self.config.family))
        self._env.reset(self.config.seed, self.config.family)
        print(f"The episode's instruction: {self._env.instruction}")

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        """Nothing to do: a simulated arm needs no calibration."""

    def configure(self) -> None:
        """Nothing to do."""

    def get_observation(self) -> dict[str, Any]:
        if self._idle:  # no action since the last observation: advance the time
            self._advance(self._env.hold_action())
        self._idle = True
        seen = self._env.observe()
        return {**dict(zip(STATE, seen["agent_pos"].tolist(), strict=True)), **seen["pixels"]}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self._advance(np.array([float(action[name]) for name in ACTION], dtype=np.float32))
        self._idle = False
        return action

    def disconnect(self) -> None:
        if self._env is not None:
            print(
                f"Solved after {self._solved} control steps."
                if self._solved
                else f"{self._steps} steps, not solved."
            )
            self._env.close()
        self._env = None

    def _advance(self, action: np.ndarray) -> None:
        self._steps += 1
        if self._env.advance(action) and not self._solved:
            self._solved = self._steps
