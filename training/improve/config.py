"""Settings of ``ceed-vla improve``."""

from __future__ import annotations

from dataclasses import dataclass

from ceed_vla.fields import COUNTS, SEEDS, Checked, chosen, ranged
from ceed_vla.training.settings import BATCHES, RATES


@dataclass
class ImproveConfig(Checked):
    """Settings of `ceed-vla improve`.

    Attributes:
        policy_path: Checkpoint of the policy.
        output_dir: New folder for improve.json and the checkpoint, checkpoints/final.
        decoding: Decoder that drives the episodes; empty: the checkpoint's own.
        cap: Most forwards of a decode path, and so the states of a group.
        decay: Factor of the reward for each forward.
        starts: Where chunks are decoded. first: at the start of an episode. uniform: half of them
            at states which earlier episodes passed, with equal chances. grown: these states are
            taken up only where outcomes differ, and drawn in proportion to the variance of the
            reward (ExIt, arXiv 2509.04575).
        known: Most states that are remembered.
        iterations: Rounds of rollouts, each followed by learning.
        groups: Groups per iteration.
        max_control_steps: Ends the run after the iteration in which so many control steps were
            simulated; 0: without effect. To compare ways to choose the starts at equal cost.
        rank: Rank of the adapters, which are added to the weights at the end.
        lr: Learning rate.
        epochs: Passes over the groups of an iteration.
        batch_size: Groups per optimiser step.
        clip: Largest deviation of a probability ratio from 1 that still earns reward.
        leash: Weight of the divergence from the policy at the start.
        seed: First seed, in 30000 to 39999; behind the last it goes on with this one.
        resume: Continue an interrupted run in `output_dir`.
    """

    policy_path: str = ""
    output_dir: str = ""
    decoding: str = ""
    cap: int = ranged(2, "[2, 64]")
    decay: float = ranged(0.95, "(0, 1]")
    starts: str = chosen("grown", ("grown", "uniform", "first"))
    known: int = ranged(1024, "[1, 10000]")
    iterations: int = ranged(10, COUNTS)
    groups: int = ranged(200, COUNTS)
    max_control_steps: int = ranged(0, "[0, 1e12]")
    rank: int = ranged(16, "[1, 4096]")
    lr: float = ranged(1e-4, RATES)
    epochs: int = ranged(2, COUNTS)
    batch_size: int = ranged(32, BATCHES)
    clip: float = ranged(0.2, "(0, 10]")
    leash: float = ranged(0.1, "[0, 1e6]")
    seed: int = ranged(37_000, SEEDS)
    resume: bool = False
