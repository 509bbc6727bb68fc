"""Which frames of a dataset show what a policy should do, by LeRobot's flags of a recording.

Frames of an episode that failed do not. If a dataset has no success at all, and no recorder of this
package wrote it, nobody set that flag, and it is ignored. In a dataset with interventions only
those frames do in which a person commanded the arm: the policy commanded the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ceed_vla.wording import counted

INTERVENTION = "intervention"
SUCCESS = "next.success"
FLAGS = (INTERVENTION, SUCCESS)

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Usable:
    """The usable frames.

    Attributes:
        frames: Whether each frame (N,) is usable.
        end: One past the last frame of the usable run of each frame (N,); actions are cut there.
        interventions: Whether they are a person's interventions.
        failures: Number of episodes that failed.
    """

    frames: Flags
    end: NDArray[np.int64]
    interventions: bool
    failures: int

    def __str__(self) -> str:
        """What training imitates, in words; "" if that is every frame."""
        used = f"{int(self.frames.sum()):,} of {len(self.frames):,} frames are imitated"
        if self.interventions:
            return f"{used}: those in which a person intervened"
        if self.failures:
            return f"{used}: {counted(self.failures, 'episode')} failed"
        return ""


def usable_frames(
    episode: NDArray[np.int64], intervention: Flags | None, success: Flags | None
) -> Usable:
    """Return the usable frames of a dataset.

    Args:
        episode: Episode of each frame (N,).
        intervention: Whether a person commanded the arm (N,); None without this column.
        success: Whether the episode was solved in this frame (N,); None without this column. It is
            ignored if it is true nowhere and there is no `intervention` column.
    """
    end = np.searchsorted(episode, episode, side="right").astype(np.int64)
    frames: Flags = np.ones(len(episode), dtype=bool)
    failures = 0
    if success is not None and (success.any() or intervention is not None):
        solved = np.unique(episode[success])
        frames = np.isin(episode, solved)
        failures = len(np.unique(episode)) - len(solved)
    if intervention is None or not intervention.any():
        return Usable(frames, end, False, failures)
    # A correction is right even if the episode fails later.
    last = np.flatnonzero(intervention & ~np.append(intervention[1:], False))
    runs = np.searchsorted(last, np.arange(len(episode)))
    of_run = np.append(last, len(episode) - 1)[runs] + 1
    return Usable(intervention, np.minimum(end, of_run), True, failures)
