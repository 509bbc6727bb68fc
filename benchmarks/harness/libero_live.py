"""vla-eval's LIBERO for live episodes, whose clock does not wait for the policy.

vla-eval lets a benchmark say what a robot does at a tick without a new action; its own
`LIBEROBenchmark` does not. With `PYTHONPATH=benchmarks/harness` in vla-eval's environment, its
configurations name this class as `libero_live:LiveLIBERO`.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark


class LiveLIBERO(LIBEROBenchmark):
    """Holds the arm and the fingers where they are commanded to be.

    An observation says whether the robot `held` in the tick before it, so that a server can repeat
    a step that came too late. The result of an episode has the number of such ticks (`holds`), and
    the longest time from one tick to the next (`longest_tick_ms`).
    """

    def reset(self, task: Any) -> Any:
        self._held, self._holds = False, 0
        self._ticks: list[float] = []  # when each began [s]
        return super().reset(task)

    def get_hold_action(self, last_action: Any) -> dict[str, list[float]]:
        """No motion, with the last command of the fingers; they are open before the first one."""
        self._held = True
        gripper = -1.0 if last_action is None else float(last_action["actions"][-1])
        return {"actions": [0.0] * 6 + [gripper]}

    def step(self, action: Any) -> Any:
        self._ticks.append(time.monotonic())
        self._holds += self._held
        return super().step(action)

    def make_obs(self, raw_obs: Any, task: Any) -> Any:
        held, self._held = self._held, False
        return {**super().make_obs(raw_obs, task), "held": held}

    def get_step_result(self, step_result: Any) -> Any:
        longest = max((b - a for a, b in itertools.pairwise(self._ticks)), default=0.0)
        result = super().get_step_result(step_result)
        return {**result, "holds": self._holds, "longest_tick_ms": round(1e3 * longest, 1)}
