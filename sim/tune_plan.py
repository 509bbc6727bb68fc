"""Plans, the candidates of ``ceed-vla tune``, and their measurements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ceed_vla.sim.success import success_entry


@dataclass(frozen=True)
class Plan:
    """One point on all axes."""

    signal: str = ""  # exit rule with its threshold, such as "conf0.2"; "": none
    cap: int = 0  # largest number of forwards; 0: no limit
    fresh: bool = False  # whether the tail is computed in every iteration
    guess: str = ""  # "mid", or "" for the previous chunk
    executed_steps: int = 4  # steps executed of a chunk
    decoder: str = ""  # "": Jacobi; "ceed" alone is the checkpoint's decoding

    @property
    def decoding(self) -> str:
        """Decoder name of the plan."""
        if self.decoder == "ceed":
            return "ceed"
        rules = [part for part in (self.signal, f"cap{self.cap}" if self.cap else "") if part]
        first = [self.decoder] if self.decoder else [] if rules else ["jacobi"]
        return "_".join(
            [*first, *(rules or ["h"]), *["fresh"] * self.fresh, *filter(None, [self.guess])]
        )


# Hand-picked plans, in the first generation.
NAMED = (
    Plan(cap=1),
    Plan(cap=2),
    Plan(cap=3),
    Plan(cap=4),
    Plan(),
    Plan("conf0.2", 2),
    Plan("conf0.2", 2, fresh=True),
    Plan(decoder="ceed"),
)


@dataclass
class Trial:
    """Measurements of a plan: latency [ms] in its engine, success by seed, layers per chunk."""

    plan: Plan
    p50: float
    p99: float
    engine: str = "eager"
    solved: dict[int, bool] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Success rate, shrunk towards 1/2 by one solved and one failed pseudo-episode."""
        return (sum(self.solved.values()) + 1) / (len(self.solved) + 2)

    def entry(self) -> dict[str, Any]:
        """Return the entry of plans.json."""
        return {
            "decoding": self.plan.decoding,
            "executed_steps": self.plan.executed_steps,
            "engine": self.engine,
            "p50_ms": self.p50,
            "p99_ms": self.p99,
            "layers_mean": round(float(np.mean(self.layers)), 3) if self.layers else None,
            **success_entry(self.solved.values()),
        }
