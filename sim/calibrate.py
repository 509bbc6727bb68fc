"""``ceed-vla calibrate``: choose exit thresholds with a bound on the risk of inexact actions.

A chunk is *off* if an executed action differs from the fixed point's by more than 5 % of its range
in some dimension, or at all in a two-valued one. The risk of an exit is the expected share of off
chunks in an episode that the exit itself drives. Thresholds are tested from the strictest on, each
on the same number of episodes, until one cannot be shown to have a risk below epsilon: "learn then
test" with a fixed sequence (arXiv 2110.01052). The signals share its level alpha. So for each
epsilon the chosen threshold has a risk below epsilon with probability 1 - alpha, for any policy.
Among the thresholds that pass, the one with the fewest layers of block and prefix is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from ceed_vla import invocation
from ceed_vla.backbones.capabilities import check_whole_prefix
from ceed_vla.checkpoint_files import fingerprint
from ceed_vla.checkpoints import load, resolve_checkpoint, save, weights_hash
from ceed_vla.decoding import decoder_ladders, exit_ladders, named_config
from ceed_vla.errors import ConfigError
from ceed_vla.fields import COUNTS, SEEDS, ranged
from ceed_vla.files import write_text
from ceed_vla.outputs import MADE_BY, WRITTEN, claimed_folder, default_console, hashes
from ceed_vla.sim import timing
from ceed_vla.sim.env_tasks import check_open, task_of
from ceed_vla.sim.environment import (
    VALIDATION_SEED,
    Bundle,
    EnvPool,
    check_choice,
    flags,
    joined,
    observation_batch,
)
from ceed_vla.sim.progress import MEASURED, Progress
from ceed_vla.sim.risk import Measured, measured_row, p_value
from ceed_vla.sim.rollout import Chunk, EpisodeResult, PolicyRunner, rollout
from ceed_vla.sim.settings import DrivenConfig
from ceed_vla.sim.summary import versions
from ceed_vla.sim.timing import bare_parts, collect_observations, percentiles
from ceed_vla.workers import MOST, ClusterConfig, Workers, open_workers

OFF = 0.05  # share of an action's range
REPORT, AUDIT = "calibration.json", "audit.json"
CHECKPOINT = "checkpoint"
CAPS = ("cap4", "cap3", "cap2", "cap1")
TIMED = 24  # chunks that are timed for the deadlines of `CAPS`


@dataclass
class CalibrateConfig(DrivenConfig):
    """Options of ``ceed-vla calibrate``.

    Attributes:
        output_dir: Folder for calibration.json and, in `checkpoint`, a copy of the policy with the
            decoders risk<E>.
        epsilons: Bounds of the risk, each in (0, 1).
        alpha: Probability that the risk exceeds its bound.
        signals: Exit rules whose ladders are tested: conf (probability within 2 bins), gap (lead of
            the best token), agree (bins between two states), changed (number of changed tokens),
            and any other rule or decoder with a ladder. Decoders that need an early-exit layer
            carry its depth: deer3.
        decoders: Comma-separated decoders; if set, only their risk is measured, into audit.json.
        episodes: Episodes per threshold.
        seed: First seed. Seeds from 40000 to 49999 are for choices.
        batch: Episodes that run in lock step.
        workers: Processes that share the episodes.
        cluster: Ray cluster that runs the episodes instead.
        executed_steps: Steps executed of each chunk; the policy's n_action_steps if None.
        resume: Continue an interrupted calibration in `output_dir`, after its measured decoders.
    """

    output_dir: str = "outputs/calibrate"
    epsilons: list[float] = ranged([0.02, 0.05, 0.1], "[1e-6, 1)")
    alpha: float = ranged(0.1, "(0, 1)")
    signals: list[str] = field(default_factory=lambda: list(exit_ladders()))
    decoders: str = ""
    episodes: int = ranged(200, COUNTS)
    seed: int = ranged(VALIDATION_SEED + 1000, SEEDS)
    batch: int = ranged(20, "[1, 1000]")
    workers: int = ranged(1, MOST)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    executed_steps: int | None = ranged(None, "[1, 4096]")
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.signals or self.decoders) or not self.epsilons:
            raise ConfigError(
                f"--signals is {self.signals}, --epsilons {self.epsilons}; neither may be empty. "
                "Set both."
            )
        if not self.names:
            check_choice(self.seed, self.episodes)
            check_open(self.env, "Calibration")
        for name in self.names:
            if named_config(name).deadline_s is not None:
                raise ConfigError(
                    f"--decoders has {name}, which has a deadline; episodes share batches here, "
                    "but a deadline applies to a chunk alone. Remove it."
                )

    @property
    def names(self) -> list[str]:
        """The names in `decoders`."""
        return [name.strip() for name in self.decoders.split(",") if name.strip()]


class AuditedRunner(PolicyRunner):
    """A runner that also decodes the fixed point: ``seconds["off"]`` is 1 for an off chunk."""

    @torch.inference_mode()
    def decode(
        self, observations: Any, instructions: Any, previous: Any, frozen_steps: Any = ()
    ) -> list[Chunk]:
        """Decode as `PolicyRunner.decode`, and mark the chunks that are off."""
        chunks = super().decode(observations, instructions, previous, frozen_steps)
        own = torch.stack([chunk.tokens for chunk in chunks]).to(self.policy.config.device)
        batch = self.preprocessor(observation_batch(observations, instructions))
        steps = self.executed_steps
        settled = self.policy.decode(
            batch, "jacobi_h", own, shift_steps=0, executed_steps=steps, read=False
        )
        off = is_off(self.policy.tokenizer, own, settled.tokens, steps).tolist()
        return [
            replace(chunk, seconds={"off": float(one)})
            for chunk, one in zip(chunks, off, strict=True)
        ]


def is_off(tokenizer: Any, tokens: Tensor, exact: Tensor, steps: int) -> Tensor:
    """Compare chunks with the fixed point.

    Args:
        tokenizer: The policy's action tokens.
        tokens: Tokens of the chunks (B, n).
        exact: Tokens of their fixed points (B, n).
        steps: Leading steps that are compared.

    Returns:
        Whether each chunk is off (B,).
    """
    moved = (tokenizer.decode(tokens) - tokenizer.decode(exact)).abs()[:, :steps]  # (B, h, A)
    allowed = OFF * (tokenizer.high - tokenizer.low).to(moved)  # (A,)
    allowed[list(tokenizer.gripper_dims)] = 0
    return (moved > allowed + 1e-6).flatten(1).any(1)


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Choose a threshold for every epsilon, and write them into a copy of the policy.

    Returns:
        The contents of calibration.json, or of audit.json.

    Raises:
        ConfigError: An invalid option.
        CheckpointError: The checkpoint cannot be loaded.
    """
    name, part = (AUDIT, "") if config.names else (REPORT, CHECKPOINT)
    inputs = [resolve_checkpoint(config.policy.given())]
    own, known = (name, MEASURED), (REPORT, AUDIT, MEASURED)
    claim = ("output_dir", config.output_dir, own, known, part, inputs)
    with claimed_folder(*claim) as folder:
        return _calibrate(config, folder / name)


def _calibrate(config: CalibrateConfig, file: Path) -> dict[str, Any]:
    """Run `calibrate`; write the report `file`, and the checkpoint into its folder."""
    config.place_threads()
    policy, pre, post = load(config.policy.given())
    weights = weights_hash(config.policy.path)  # now, as the folder may get others meanwhile
    policy.requires_grad_(False)  # so that no weight is saved as trainable
    check_whole_prefix(policy, "calibrate")
    if policy.tokenizer.tokens_per_step is None or not hasattr(policy.tokenizer, "low"):
        raise ConfigError(
            f"{config.policy.path} has action tokens that are not bins; calibration needs bins to "
            "measure the distance of two actions. Choose another policy."
        )
    config = replace(config, executed_steps=config.executed_steps or policy.config.n_action_steps)
    bundle = joined((policy, pre, post), config.env)
    progress = Progress(file.parent, _identity(config), config.resume)
    with (
        EnvPool(min(config.batch, config.episodes), config.env, config.instruction) as pool,
        open_workers(
            config.workers,
            config.cluster,
            audited_runner,
            config,
            pool,
            checkpoints=[config.policy.path],
        ) as workers,
    ):
        workers.here = partial(audited, bundle, pool, config.executed_steps)
        measure = partial(measured, config, workers)
        rows, chosen = _choose(
            config, bundle, pool, partial(measured_row, progress, measure=measure)
        )
    report: dict[str, Any] = {
        "program": MADE_BY,
        "policy": {
            "path": str(resolve_checkpoint(config.policy.path)),
            "sha256": weights,
        },
        "alpha": config.alpha,
        "off": OFF,
        "seeds": {"first": config.seed, "count": config.episodes},
        "env": flags(config.env),
        "executed_steps": config.executed_steps,
        "command": invocation.command(),
        "chosen": chosen,
        "decoders": {row.name: row.entry(config.epsilons) for row in rows},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(report, indent=2))  # before the checkpoint, which may fail
    if not config.names:
        stale = (
            ("risk",)
            if config.executed_steps == policy.config.n_action_steps
            else ("risk", "plan", "learned")
        )
        policy.config.forget(*stale, new=chosen)
        policy.config.n_action_steps = int(config.executed_steps or 1)
        save(file.parent / CHECKPOINT, policy, pre, post, unchanged=True)
        report[WRITTEN] = hashes(file.parent, CHECKPOINT)
        write_text(file, json.dumps(report, indent=2))
    progress.end()
    _print(report, default_console(), file)
    return report


def _identity(config: CalibrateConfig) -> dict[str, Any]:
    """Everything that affects a measured decoder."""
    return {
        "policy": fingerprint(config.policy.path),
        "env": flags(config.env),
        "instruction": config.instruction,
        "seed": config.seed,
        "episodes": config.episodes,
        "batch": config.batch,
        "executed_steps": config.executed_steps,
        "versions": versions(),
    }


def _choose(
    config: CalibrateConfig, bundle: Bundle, pool: EnvPool, measure: Callable[[str], Measured]
) -> tuple[list[Measured], dict[str, str]]:
    """Measure the candidates, and choose a decoder for every epsilon.

    Returns:
        All measurements, and by name (risk<E>) the passing decoder with the fewest layers.
    """
    if config.names:
        return [measure(name) for name in config.names], {}
    ladders = {
        **exit_ladders(),
        **decoder_ladders(sorted(getattr(bundle[0].backbone, "exits", {}))),
    }
    if unknown := [signal for signal in config.signals if signal not in ladders]:
        raise ConfigError(
            f"--signals has {', '.join(unknown)}; this policy has {', '.join(ladders)}."
        )
    rows: list[Measured] = []
    level = config.alpha / len(config.signals)
    proven: dict[float, list[Measured]] = {epsilon: [] for epsilon in config.epsilons}
    for signal in config.signals:
        open_ = set(config.epsilons)
        for name in ladders[signal]:
            rows.append(measure(name))
            open_ = {epsilon for epsilon in open_ if p_value(rows[-1].risks, epsilon) <= level}
            for epsilon in open_:
                proven[epsilon].append(rows[-1])
            if not open_:
                break
    chosen = {
        f"risk{plain(epsilon)}": (
            min(rows, key=lambda row: row.layers.mean()).name if rows else "jacobi_h"
        )
        for epsilon, rows in proven.items()
    }
    # For the report: the deadline that allows the forwards of each cap, from the prefill on.
    caps = [measure(cap) for cap in CAPS]
    runner = PolicyRunner(bundle, "jacobi_h", None, config.executed_steps)
    seeds = range(config.seed, config.seed + 99)
    observed = collect_observations(
        runner, pool, ((seed, task_of(config.env, seed)) for seed in seeds), TIMED
    )
    _, parts = timing.measure({}, {"all": bare_parts(bundle)}, observed)
    slow = {name: percentiles(seconds)["p95"] for name, seconds in parts["all"].items()}
    for row in caps:
        row.deadline_ms = round(float(slow["block"] * row.forwards.max()), 1)
    return rows + caps, chosen


def plain(value: float) -> str:
    """Format a positive number for a name: no exponent, at most six decimal places."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def audited_runner(
    config: CalibrateConfig, pool: EnvPool
) -> Callable[[tuple[str, Sequence[tuple[int, str]]]], Iterator[EpisodeResult]]:
    """Make the function of a worker: (decoder, shard) -> results; see `audited`."""
    bundle = joined(load(config.policy.given()), config.env)
    return partial(audited, bundle, pool, config.executed_steps)


def audited(
    bundle: Bundle,
    pool: EnvPool,
    executed_steps: int | None,
    item: tuple[str, Sequence[tuple[int, str]]],
) -> Iterator[EpisodeResult]:
    """Run a shard of (seed, task) with a decoder; see `AuditedRunner`."""
    decoder, episodes = item
    generator = torch.Generator().manual_seed(0)
    return rollout(AuditedRunner(bundle, decoder, generator, executed_steps), pool, episodes)


def measured(config: CalibrateConfig, workers: Workers, name: str) -> Measured:
    """Run episodes with the decoder `name`, and measure its risk."""
    seeds = range(config.seed, config.seed + config.episodes)
    episodes = [(seed, task_of(config.env, seed)) for seed in seeds]
    found: dict[int, EpisodeResult] = {}  # by seed
    with tqdm(total=len(episodes), desc=name, unit="episode", dynamic_ncols=True) as bar:
        for _, result in workers.stream((name, one) for one in batched(episodes, config.batch)):
            bar.update(result.seed not in found)
            found[result.seed] = result
    results = [found[seed] for seed, _ in episodes]
    risks = np.array(
        [np.mean([seconds["off"] for seconds in result.seconds]) for result in results]
    )
    forwards = np.array([count for result in results for count in result.forwards], dtype=float)
    block, prefix = (
        [n for r in results for n in getattr(r, name)] for name in ("block_layers", "prefix_layers")
    )
    layers = np.add(block, prefix, dtype=float)
    return Measured(name, risks, forwards, layers, [result.success for result in results])


def _print(report: dict[str, Any], console: Console, file: Path) -> None:
    table = Table(
        title=f"Risk, {report['seeds']['count']} episodes from seed {report['seeds']['first']}"
    )
    for column in (
        "decoder",
        "risk [95 %], at most",
        "forwards mean / p95",
        "layers",
        "deadline [ms]",
        "solved",
    ):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    for name, row in report["decoders"].items():
        low, high = row["risk_ci95"]
        risk = f"{row['risk']:.4f} [{low:.4f}, {high:.4f}], {row['risk_upper95']:.4f}"
        forwards = f"{row['forwards_mean']:.2f}"
        ran = f"{row['layers_mean']:.1f}"
        deadline = f"{row.get('deadline_ms', '')}"
        solved = f"{row['success']}/{row['episodes']}"
        table.add_row(name, risk, f"{forwards} / {row['forwards_p95']:.0f}", ran, deadline, solved)
    console.print(table)
    for name, decoder in report["chosen"].items():
        console.print(f"{name} is {decoder}")
    console.print(
        f"Written: {file}" + (f", {file.parent / CHECKPOINT}" if report["chosen"] else "")
    )
