"""``ceed-vla eval``: closed-loop success and latency of decoders on the same seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from ceed_vla.errors import ConfigError
from ceed_vla.outputs import claimed_folder, default_console
from ceed_vla.sim.clips import record_clip
from ceed_vla.sim.decoders import HONEST_RIVALS, ONLY, Row, added_rivals
from ceed_vla.sim.environment import EVALUATION_SEEDS, Bundle, EnvPool
from ceed_vla.sim.episode_log import EPISODES, EpisodeLog, Results, refuse_unfinished
from ceed_vla.sim.evaluation import (
    Evaluation,
    decoder_names,
    identity_of,
    load_bundles,
    planned_episodes,
    rows_of,
    shard_runner,
    shards,
    whole_shards,
)
from ceed_vla.sim.evaluation_config import DemoConfig, EvalConfig
from ceed_vla.sim.evaluation_report import (
    MARKDOWN,
    REPORT,
    build_report,
    write_json,
    write_report,
)
from ceed_vla.sim.evaluation_timing import measure_latency
from ceed_vla.sim.plots import PLOTS
from ceed_vla.sim.report import console_table
from ceed_vla.sim.rollout import EpisodeResult, rollout
from ceed_vla.sim.timing import make_runner
from ceed_vla.wording import counted
from ceed_vla.workers import Workers

# The command table names the two configurations here.
__all__ = ["DemoConfig", "EvalConfig", "evaluate", "prepared"]

logger = logging.getLogger(__name__)


def evaluate(
    config: EvalConfig,
    console: Console | None = None,
    probes: Callable[[dict[str, Bundle]], Any] = lambda bundles: {},
) -> dict[str, Any]:
    """Run every decoder on the same seeds, measure latency, write report, plots and clips; returns
    ``report.json``.

    An interrupt leaves a report of the finished episodes, marked ``"complete": false``, and is
    raised on. `resume` keeps these episodes; the report is then that of an evaluation in one go,
    but for times. (Episodes with random guesses share their source with others of their shard, so
    of these only whole shards are kept.)

    Args:
        config: See `EvalConfig`.
        console: Where the table is printed; standard output by default.
        probes: Gives what else is timed, a `Probe` by name, for the models that were loaded.

    Raises:
        ConfigError: An option that cannot work, e.g. an unknown decoder.
        CheckpointError: A checkpoint that cannot be loaded.
        SimulationError: An environment that cannot be made.
    """
    clips = [f"clip_{name}.mp4" for name in decoder_names(config)] if config.clips else []
    own = (EPISODES, REPORT, MARKDOWN, *PLOTS, *clips)
    with (
        claimed_folder("output_dir", config.output_dir, own, (REPORT, EPISODES)) as folder,
        EnvPool(min(config.batch, config.episodes), config.env, config.instruction) as pool,
        Workers(config.workers, shard_runner, config, pool) as workers,
    ):
        if not config.resume:
            refuse_unfinished(folder, REPORT)
        console = console or default_console()
        if added := added_rivals(config.decoders, has_teacher=bool(config.teacher.path)):
            console.print(_added_note(added), soft_wrap=True, highlight=False)
        run, log = prepared(config, pool, probes)
        return _evaluate(run, log, folder, workers, console)


def _added_note(added: Sequence[str]) -> str:
    """One line: which rows a teacher adds, what they show, and how to leave them out."""
    rows = " and ".join(f"{name} ({HONEST_RIVALS[name]})" for name in added)
    return (
        f"Added: {rows}; {ONLY} before the names of --decoders leaves "
        f"{'them' if len(added) > 1 else 'it'} out."
    )


def _evaluate(
    run: Evaluation,
    log: EpisodeLog,
    folder: Path,
    workers: Workers,
    console: Console,
) -> dict[str, Any]:
    """As `evaluate`, into a claimed folder."""
    config = run.config
    if config.seed < EVALUATION_SEEDS:
        logger.warning(
            "Seeds below %d may have been recorded or tuned on; do not report them as results.",
            EVALUATION_SEEDS,
        )
    folder.mkdir(parents=True, exist_ok=True)
    log.start(run.results)
    complete = False
    try:
        write_json(build_report(run, complete=False), folder)
        _run_all_episodes(run, log, workers)
        if not run.timing:
            measure_latency(run)
        complete = True
    finally:
        report = build_report(run, complete=complete)
        files = write_report(report, folder)
        if not complete:
            console.print(f"Stopped early; the partial report is in {files[1]}.")
    if config.clips:
        files += _write_clips(run, folder)
    console.print(console_table(report, console.width))
    console.print(
        "Written: " + ", ".join(str(file) for file in files), soft_wrap=True, highlight=False
    )
    return report


# ---- before the first episode --------------------------------------------------------------------


def prepared(config: EvalConfig, pool: EnvPool, probes: Any) -> tuple[Evaluation, EpisodeLog]:
    """What is evaluated, with the episodes that are kept of a run before, and where episodes are
    written.

    Raises:
        ConfigError: Options that exclude each other, or a decoder that the policy, its chunks or
            the environment cannot run.
    """
    if config.delay == "measured" and (not config.timing_chunks or min(config.delay_ms, default=0)):
        raise ConfigError(
            "--delay measured needs --timing_chunks and --delay_ms 0, on which it is measured."
        )
    config.limit_threads()
    bundles = load_bundles(config)
    executed = config.executed_steps or bundles["policy"][0].config.n_action_steps
    config = replace(config, executed_steps=executed)
    run = Evaluation(config, rows_of(config, bundles), bundles, {}, pool, executed, probes(bundles))
    if config.delay == "measured":
        measure_latency(run)
        run.rows += _rows_with_measured_delays(run)
    _check_delays(run)
    _check_decoders(run)
    log = EpisodeLog(
        Path(config.output_dir),
        identity_of(config, run.rows, bundles),
        dict(planned_episodes(config)),
        pool.max_episode_steps,
    )
    run.results = whole_shards(config, run.rows, _kept_episodes(run, log))
    return run, log


def _rows_with_measured_delays(run: Evaluation) -> list[Row]:
    """Every row without a delay once more, as late as its chunks took (p50)."""
    return [
        row.delayed(
            1000 * float(np.median(run.samples[row.name].total)), run.config.env.fps, "@measured"
        )
        for row in run.rows
        if not row.delay
    ]


def _check_delays(run: Evaluation) -> None:
    """Raise unless the environment can wait for a chunk, and every delay is below a chunk."""
    steps = min(policy.config.chunk_size for policy, _, _ in run.bundles.values())
    latest = max(run.rows, key=lambda row: row.delay)
    if latest.delay:
        run.pool.env(0).needs("--delay_ms", "hold_action")
    if latest.delay >= steps:
        late = counted(latest.delay, "control step")
        raise ConfigError(f"{latest.name} is {late} late; a chunk has {steps}: leave it out.")


def _check_decoders(run: Evaluation) -> None:
    """Decode one chunk with every row: what a policy cannot decode is known before any episode."""
    env = run.pool.env(0)
    seed, task = planned_episodes(run.config)[0]
    env.reset(seed, task)
    for row in run.rows:
        runner = make_runner(row, run.bundles, run.executed_steps)
        if runner.alone and run.config.workers > 1:
            raise ConfigError(
                f"{row.name} has a deadline, of a machine with nothing else to do: give "
                "--workers 1."
            )
        runner.decode([env.observe()], [env.instruction], [None])


def _kept_episodes(run: Evaluation, log: EpisodeLog) -> Results:
    """Episodes by row that need not be run again: those of `reuse`, and with `resume` our own."""
    config = run.config
    kept: Results = {row.name: [] for row in run.rows}
    if config.reuse:
        kept |= log.shared(Path(config.reuse))
    if config.resume:
        kept |= {name: episodes for name, episodes in log.read().items() if episodes}
    return kept


# ---- episodes ------------------------------------------------------------------------------------


def _run_all_episodes(run: Evaluation, log: EpisodeLog, workers: Workers) -> None:
    """The episodes that are missing, here or in several processes; each is on disk before the next
    one counts.

    All decoders run one shard of seeds after the other, so that an early stop leaves comparable
    rows.
    """
    config = run.config
    done = {name: {episode.seed for episode in episodes} for name, episodes in run.results.items()}
    missing = [
        (row, episodes)
        for shard in shards(config)
        for row in run.rows
        if (episodes := [(seed, task) for seed, task in shard if seed not in done[row.name]])
    ]
    kept = sum(map(len, run.results.values()))
    total = config.episodes * len(run.rows)
    with tqdm(total=total, initial=kept, unit="episode", dynamic_ncols=True) as bar:

        def finish(name: str, episode: EpisodeResult) -> None:
            log.append(name, episode)
            run.results[name].append(episode)
            bar.set_description(name, refresh=False)
            bar.update()

        if config.workers == 1:
            for row, episodes in missing:
                runner = make_runner(row, run.bundles, run.executed_steps)
                rollout(runner, run.pool, episodes, partial(finish, row.name))
            return
        for name, results in workers.map(missing):
            for episode in results:
                finish(name, episode)


def _write_clips(run: Evaluation, folder: Path) -> list[Path]:
    """One clip a decoder, all of the same episode: the first one that the first decoder solved."""
    first = sorted(run.results[run.rows[0].name], key=lambda episode: episode.seed)
    shown = next((episode for episode in first if episode.success), first[0])
    task = dict(planned_episodes(run.config))[shown.seed]
    rows = [row for row in run.rows if not row.delay]
    files = []
    for row in tqdm(rows, desc="clips", unit="clip", dynamic_ncols=True):
        runner = make_runner(row, run.bundles, run.executed_steps)
        files.append(
            record_clip(folder / f"clip_{row.name}.mp4", row, runner, run.pool, shown.seed, task)
        )
    return files
