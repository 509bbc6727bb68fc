"""A benchmark of vla-eval without a simulator; runs in the harness's own environment."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult

STEPS = 10  # of an episode by default
TASKS = ("put the red cube in the bin", "sing loudly")  # the student does not know the second


class Tabletop(StepBenchmark):
    """Sends the student's features, with the names of the harness's LIBERO; every action succeeds.

    Args:
        send_wrist_image: Whether to send the second camera; off by default, as in LIBERO.
        send_state: Whether to send the state; off by default, as in LIBERO.
        reset_seconds: Time for which a reset blocks the harness's event loop.
        steps: Steps of an episode.
    """

    def __init__(
        self,
        send_wrist_image: bool = False,
        send_state: bool = False,
        reset_seconds: float = 0.0,
        steps: int = STEPS,
    ) -> None:
        super().__init__()
        self._wrist, self._state, self._reset_seconds = send_wrist_image, send_state, reset_seconds
        self._steps = steps
        self._step = 0

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": name} for name in TASKS]

    def reset(self, task: dict[str, Any]) -> None:
        time.sleep(self._reset_seconds)
        self._step = 0

    def step(self, action: dict[str, Any]) -> StepResult:
        actions = action["actions"]
        assert actions.shape == (7,)
        assert actions.dtype == np.float32
        self._step += 1
        return StepResult(obs=None, reward=0.0, done=self._step == self._steps, info={})

    def make_obs(self, raw_obs: None, task: dict[str, Any]) -> dict[str, Any]:
        image = np.full((96, 96, 3), self._step, np.uint8)
        observation: dict[str, Any] = {
            "images": {"agentview": image},
            "task_description": task["name"],
        }
        if self._wrist:
            observation["images"]["wrist"] = image
        if self._state:
            observation["states"] = np.full(14, 0.1 * self._step)
        return observation

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": step_result.done}

    def get_hold_action(self, last_action: Any) -> dict[str, Any]:
        return {"actions": np.zeros(7, np.float32)}

    def get_metadata(self) -> dict[str, Any]:
        return {"max_steps": 2 * self._steps}
