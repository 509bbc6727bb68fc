"""vla-eval's LIBERO for live episodes, whose clock does not wait for the policy.

vla-eval lets a benchmark say what a robot does at a tick without a new action; its own
`LIBEROBenchmark` does not. With `PYTHONPATH=benchmarks/harness` in vla-eval's environment, its
configurations name this class as `libero_live:LiveLIBERO`.
"""

from __future__ import annotations

from typing import Any

from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark


class LiveLIBERO(LIBEROBenchmark):
    """Holds the arm and the fingers where they are commanded to be."""

    def get_hold_action(self, last_action: Any) -> dict[str, list[float]]:
        """No motion, with the last command of the fingers; they are open before the first one."""
        gripper = -1.0 if last_action is None else float(last_action["actions"][-1])
        return {"actions": [0.0] * 6 + [gripper]}
