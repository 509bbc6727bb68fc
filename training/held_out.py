"""Held-out episodes, on which the summary of a training and `open-loop` measure.

Whole episodes are held out, because neighbouring frames look alike: measured on frames between
those of its training, a policy that only memorised them would seem accurate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.frames import FrameStore

SHARE = 0.04  # of a dataset's episodes
SHARES = "[0, 0.5]"
_MOST = 50  # episodes of a dataset
_FEWEST = 10  # smallest dataset that holds out an episode [episodes]
_RUNS = 4  # runs of neighbours, which may show one scene (`record --mode perturb`)


def held_out_frames(store: FrameStore, share: float = SHARE) -> NDArray[np.bool_]:
    """Which frames (N,) belong to held-out episodes; deterministic for a dataset and share.

    With a `share` above 0 at least one episode is held out, but none of fewer than ten. They form a
    few runs of neighbours, spread over the dataset.
    """
    first = np.flatnonzero(np.diff(store.episode, prepend=-1))  # of every episode
    episodes = len(first)
    spared = share > 0 and episodes >= _FEWEST
    count = min(max(1, round(share * episodes)), _MOST) if spared else 0
    held = np.zeros(episodes, dtype=bool)
    runs = min(_RUNS, count)
    for run in range(runs):
        length = count // runs + (run < count % runs)
        begin = (run + 1) * episodes // (runs + 1)
        held[begin : begin + length] = True
    lengths = np.diff([*first, len(store.episode)])
    return np.repeat(held, lengths)
