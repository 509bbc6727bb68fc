"""The options of ``ceed-vla eval`` and ``ceed-vla demo``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ceed_vla.fields import SEEDS, chosen, ranged
from ceed_vla.sim.environment import EVALUATION_SEEDS
from ceed_vla.sim.settings import CheckpointPath, DrivenConfig
from ceed_vla.sim.timing import ENGINES
from ceed_vla.workers import MOST

# former name of a flag -> its name now
MOVED = {
    "env": "env.type",
    "task": "env.task",
    "split": "env.split",
    "max_episode_steps": "env.episode_length",
    "compile": "engine",
}


@dataclass
class EvalConfig(DrivenConfig):
    """Options of ``ceed-vla eval``.

    Attributes:
        teacher: Its autoregressive teacher; adds the rows teacher_ar and teacher_cap4 (unless
            `decoders` begins with only=), and allows others.
        decoders: Comma-separated names: ar, ar_h (stops after the executed steps), jacobi (strict),
            ceed (the checkpoint's early exit), cap<K> (at most K forwards, e.g. cap2),
            conf<P>_cap<K> (or until confident, e.g. conf0.2_cap3); Jacobi ones also with _mid or
            _random (the guess); all with teacher_ in front. only=ar,ceed evaluates these two rows
            and adds no others.
        episodes: Episodes a decoder.
        seed: First seed; every decoder runs seed, seed + 1, ... Seeds from 50000 up are for
            evaluation only.
        output_dir: Folder for the report, plots and clips. A report that we completed there earlier
            is replaced.
        batch: Episodes that run in lock-step, and the seeds of one shard: a decoder runs a shard,
            then the next one.
        workers: Processes that share the shards, with one thread of torch each; 1 is this process,
            with `threads`.
        delay_ms: Times that a chunk takes in the closed loop, such as 0,100,200: every decoder runs
            with each, as NAME@100ms. The chunk before goes on meanwhile, rounded up to whole steps;
            where it ends, the robot holds.
        delay: given: as `delay_ms` says; measured: beside it as NAME@measured, with the time (p50)
            that the decoder's chunks took on this machine, in this run, before the episodes;
            `resume` refuses other delays.
        executed_steps: Steps executed of each chunk; None: the policy's own.
        clips: Whether to write one clip a decoder.
        timing_chunks: Chunks on which latency is measured; 0 skips it.
        engine: How latency is measured: eager, compiled (`ceed_vla.compiled.engine`; needs a C++
            compiler and some minutes), or fastest: every row in both, and in the faster one in the
            report. The episodes stay eager.
        device: Overrides the checkpoints' device.
        reuse: Folder of another evaluation, whose episodes of the same decoders, such as the
            teacher's, are taken.
        resume: Keep the finished episodes of an interrupted evaluation with the same options in
            `output_dir`.
    """

    moved: ClassVar[dict[str, str]] = MOVED

    teacher: CheckpointPath = field(default_factory=CheckpointPath)
    decoders: str = "ar,jacobi,ceed"
    episodes: int = ranged(20, "[1, 100000]")
    seed: int = ranged(EVALUATION_SEEDS, SEEDS)
    output_dir: str = "outputs/eval"
    batch: int = ranged(20, "[1, 1000]")
    workers: int = ranged(1, MOST)
    delay_ms: list[float] = ranged([0.0], "[0, 1e5]")
    delay: str = chosen("given", ("given", "measured"))
    executed_steps: int | None = ranged(None, "[1, 4096]")
    clips: bool = True
    timing_chunks: int = ranged(100, "[0, 100000]")
    engine: str = chosen("eager", ENGINES)
    device: str | None = None
    reuse: str = ""
    resume: bool = False


@dataclass
class DemoConfig(EvalConfig):
    """Options of ``ceed-vla demo``: those of ``ceed-vla eval``, for the shipped checkpoints: the
    teacher token by token and in at most 4 parallel forwards, the distilled student to convergence
    (jacobi) and with early exit (ceed).
    """

    policy: CheckpointPath = field(default_factory=lambda: CheckpointPath("student"))
    teacher: CheckpointPath = field(default_factory=lambda: CheckpointPath("teacher"))
    decoders: str = "teacher_ar,teacher_cap4,jacobi,ceed"
    output_dir: str = "outputs/demo"
