"""Whole episodes that training never sees, on which its summary and `open-loop` measure.

Neighbouring frames look alike: a policy that is measured on frames between those it was trained on
seems to know what it has only remembered.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.frames import FrameStore

SHARE = 0.04  # of a data set's episodes
SHARES = "[0, 0.5]"
_MOST = 50  # episodes of a data set
_FEWEST = 10  # episodes of a data set of which one can be spared
_RUNS = 4  # neighbouring episodes may be of one scene (`record --mode perturb`): they stay together


def held_out_frames(store: FrameStore, share: float = SHARE) -> NDArray[np.bool_]:
    """Which frames (N,) belong to held-out episodes: the same ones wherever it is asked.

    With a `share` above 0 at least one episode is held out, of fewer than ten none. They lie in a
    few runs of neighbours, spread over the data set.
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
