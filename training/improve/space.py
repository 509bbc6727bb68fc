"""The states from which episodes start: a task space that grows where outcomes differ (ExIt).

After ExIt (arXiv 2509.04575): partial histories whose returns vary much teach most, so they become
tasks of their own, are drawn in proportion to this variance, and give rise to further ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ceed_vla.starts import SerialGroup, Start

NEW = 0.5  # share of the starts that are starts of episodes


@dataclass
class StartSpace:
    """Known partial histories.

    Attributes:
        mode: "grown", "uniform" or "first"; see `ceed_vla.training.improve.config`.
        size: Most known states.
        known: State -> its score: the variance of the rewards when it was last tried, or of those
            of the group that led to it if it was not tried yet. 1 in mode "uniform".
    """

    mode: str
    size: int
    known: dict[Start, float] = field(default_factory=dict)

    def draw(self, count: int, random: np.random.Generator) -> list[Start]:
        """Draw known states, at most so many that `NEW` of `count` remain for new episodes."""
        wanted = min(int(count * (1 - NEW)), len(self.known))
        if not wanted:
            return []
        states = list(self.known)
        scores = np.array(list(self.known.values()))
        picked = random.choice(len(states), wanted, replace=False, p=scores / scores.sum())
        return [states[i] for i in picked]

    def learn(self, groups: Sequence[SerialGroup], decay: float) -> None:
        """Take up the states which the episodes of the groups reached."""
        if self.mode == "first":
            return
        for group in groups:
            variance = float(np.var(group.rewards(decay))) if group.solved else 0.0
            # equal outcomes, which differ only in the number of forwards, teach nothing new
            score = variance if len(set(group.solved)) > 1 else 0.0
            if self.mode == "uniform":
                self.known |= dict.fromkeys(group.reached, 1.0)
            elif score:
                self.known |= dict.fromkeys([group.start, *group.reached], score)
            else:
                self.known.pop(group.start, None)
        ordered = sorted(self.known.items(), key=lambda item: item[1])  # stable: oldest first
        self.known = dict(ordered[-self.size :])
