"""The settings of `ceed-vla collect`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.frame_stream import StreamingConfig
from ceed_vla.errors import ConfigError
from ceed_vla.fields import COUNTS, SEEDS, THREADS, check_fields, ranged
from ceed_vla.training.clipping import MOST_CLIPPED
from ceed_vla.training.settings import SHARES, number_list
from ceed_vla.training.shards import GUESSES
from ceed_vla.workers import MOST, ClusterConfig


@dataclass
class CollectConfig:
    """Settings of `ceed-vla collect`.

    Attributes:
        policy_path: The teacher's checkpoint.
        roots: Comma-separated LeRobotDataset folders.
        output_dir: Folder for shards and ``meta.json``.
        states: Store every Jacobi state; false stores only guess and fixed point (an AR decode,
            about twice as fast).
        guesses: Shares of previous, mid and random guesses.
        device: Device to decode on.
        frame_stride: Visit every k-th frame of an episode; it must divide the policy's
            ``n_action_steps``.
        max_frames: Approximate number of frames, of whole episodes drawn at random; 0 for all.
        batch_size: Frames decoded together.
        shard_index: Index of this process's part, from 0.
        num_shards: Processes that share the work; under torchrun or `accelerate launch` leave both
            out.
        workers: Processes that this one starts for its part.
        cluster: Ray cluster that decodes instead; its nodes must see the datasets under the same
            absolute paths.
        seed: Seed of episodes and guesses.
        threads: CPU threads; 0 leaves torch's default.
        max_clipped: Largest share of a dimension's actions far outside the policy's range.
        streaming: Which datasets are decoded into files, and how much of the others is in memory.
        resume: Skip complete shards, after a check.
    """

    policy_path: str = ""
    roots: str = ""
    output_dir: str = ""
    states: bool = True
    guesses: str = "0.7,0.2,0.1"
    device: str = "cpu"
    frame_stride: int = ranged(2, COUNTS)
    max_frames: int = ranged(0, "[0, 1e9]")
    batch_size: int = ranged(64, "[1, 1e6]")
    shard_index: int = ranged(0, "[0, 1e6]")
    num_shards: int = ranged(1, "[1, 1e6]")
    workers: int = ranged(1, MOST)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seed: int = ranged(0, SEEDS)
    threads: int = ranged(0, THREADS)
    max_clipped: float = ranged(MOST_CLIPPED, SHARES)
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    resume: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        guess_shares(self.guesses)
        if self.shard_index >= self.num_shards:
            raise ConfigError(
                f"shard_index is {self.shard_index}; with {self.num_shards} shards it must be one "
                f"of 0..{self.num_shards - 1}."
            )


def guess_shares(text: str) -> NDArray[np.float64]:
    """Parse three non-negative shares (previous, mid, random), and normalise them.

    Raises:
        ConfigError: The text is of another form, or all shares are zero.
    """
    shares = number_list(text, "guesses")
    if len(shares) != len(GUESSES) or not sum(shares):
        raise ConfigError(
            f"guesses is {text!r}; it must be the shares of {', '.join(GUESSES)}: 0.7,0.2,0.1."
        )
    return np.array(shares) / sum(shares)
