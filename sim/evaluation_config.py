"""The options of ``ceed-vla eval`` and ``ceed-vla demo``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ceed_vla.errors import ConfigError
from ceed_vla.fields import SEEDS, chosen, ranged
from ceed_vla.sim.engines import ENGINES
from ceed_vla.sim.environment import EVALUATION_SEEDS
from ceed_vla.sim.settings import CheckpointPath, DrivenConfig
from ceed_vla.workers import MOST, ClusterConfig

# former name of a flag -> current name
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
        teacher: The policy's autoregressive teacher; adds the rows teacher_ar and teacher_cap4
            (unless `decoders` begins with only=) and allows other teacher_ rows.
        decoders: Comma-separated names: ar, ar_h (stops after the executed steps), jacobi (strict),
            ceed (the checkpoint's early exit), cap<K> (at most K forwards, e.g. cap2),
            conf<P>_cap<K> (or until confident, e.g. conf0.2_cap3). Jacobi decoders also take _mid
            or _random (the guess); every name takes the prefix teacher_. only=ar,ceed evaluates
            these two rows and adds no others.
        episodes: Episodes per decoder.
        seed: First seed; every decoder runs seed, seed + 1, ... Seeds from 50000 up are for
            evaluation only.
        output_dir: Folder for the report, plots and clips. An earlier complete report of this
            command is replaced.
        batch: Episodes that run in lock step. Every decoder runs these before any runs the next
            ones.
        shard_index: The part of the episodes that this run takes, from 0, where several machines
            share them; `ceed-vla merge` joins the output folders.
        num_shards: Number of these parts.
        workers: Processes that share the episodes, with one torch thread each; 1: this process
            only, with `threads`.
        cluster: Ray cluster that runs the episodes instead.
        delay_ms: Decoding delays in the closed loop [ms], such as 0,100,200. Every decoder runs
            with each delay, as row NAME@100ms. A delay is rounded up to whole control steps; the
            robot meanwhile continues the previous chunk, and holds where it ends.
        delay: Source of the delays. given: `delay_ms`. measured: additionally a row NAME@measured,
            delayed by the decoder's latency (p50), which is measured before the episodes; `resume`
            takes the delays of the start.
        executed_steps: Steps executed of each chunk; None: the policy's own.
        clips: Whether to write one clip per decoder.
        rerun: File to write for Rerun's viewer, PATH.rrd: the episode of the clips with every
            decoder, its images, states, chunks, Jacobi states, latencies and exits. Needs the extra
            `viz`.
        timing_chunks: Chunks on which latency is measured; 0 skips it.
        engine: Engine in which latency is measured: eager; compiled (`ceed_vla.compiled.engine`;
            needs a C++ compiler and some minutes); edge (an export, which is made if it is
            missing); auto (edge if the policy can be exported here, eager otherwise); fastest
            (measures eager, compiled and edge, reports the fastest one of each row). A row that
            does not run in the engine is timed eagerly. Episodes run eagerly, except on an export
            with edge and auto.
        device: Overrides the checkpoints' device.
        reuse: Folder of another evaluation; its episodes are reused for equal decoders, such as the
            teacher's.
        resume: Continue an interrupted evaluation with the same options in `output_dir`.
    """

    moved: ClassVar[dict[str, str]] = MOVED

    teacher: CheckpointPath = field(default_factory=CheckpointPath)
    decoders: str = "ar,jacobi,ceed"
    episodes: int = ranged(20, "[1, 100000]")
    seed: int = ranged(EVALUATION_SEEDS, SEEDS)
    output_dir: str = "outputs/eval"
    batch: int = ranged(20, "[1, 1000]")
    shard_index: int = ranged(0, "[0, 99999]")
    num_shards: int = ranged(1, "[1, 100000]")
    workers: int = ranged(1, MOST)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    delay_ms: list[float] = ranged([0.0], "[0, 1e5]")
    delay: str = chosen("given", ("given", "measured"))
    executed_steps: int | None = ranged(None, "[1, 4096]")
    clips: bool = True
    rerun: str = ""
    timing_chunks: int = ranged(100, "[0, 100000]")
    engine: str = chosen("eager", ENGINES)
    device: str | None = None
    reuse: str = ""
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_index >= self.num_shards:
            raise ConfigError(
                f"--shard_index is {self.shard_index}; with --num_shards {self.num_shards} it must "
                f"be in [0, {self.num_shards - 1}]."
            )

    @property
    def paths(self) -> list[str]:
        """Paths of the checkpoints."""
        return [path for path in (self.policy.path, self.teacher.path) if path]


@dataclass
class DemoConfig(EvalConfig):
    """Options of ``ceed-vla demo``: those of ``ceed-vla eval``, for the shipped checkpoints.

    By default it runs the teacher token by token and with at most 4 parallel forwards, and the
    distilled student to convergence (jacobi) and with early exit (ceed).
    """

    policy: CheckpointPath = field(default_factory=lambda: CheckpointPath("student"))
    teacher: CheckpointPath = field(default_factory=lambda: CheckpointPath("teacher"))
    decoders: str = "teacher_ar,teacher_cap4,jacobi,ceed"
    engine: str = chosen("auto", ENGINES)
    output_dir: str = "outputs/demo"
