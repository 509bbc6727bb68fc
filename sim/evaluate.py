"""``ceed-vla eval``: closed-loop success and latency of decoders on the same seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from ceed_vla.errors import ConfigError
from ceed_vla.outputs import claimed_folder, default_console
from ceed_vla.report.command import PAGE, write_page
from ceed_vla.sim.clips import record_clip
from ceed_vla.sim.decoders import HONEST_RIVALS, ONLY, Row, added_rivals
from ceed_vla.sim.engines import resolved
from ceed_vla.sim.environment import EVALUATION_SEEDS, Bundle, EnvPool
from ceed_vla.sim.episode_log import (
    EPISODES,
    EpisodeLog,
    Results,
    read_identity,
    refuse_unfinished,
)
from ceed_vla.sim.evaluation import (
    Evaluation,
    batch_runner,
    batches,
    checkpoint_entries,
    decoder_names,
    engines_of_run,
    identity_of,
    load_bundles,
    planned_episodes,
    rows_of,
    whole_batches,
)
from ceed_vla.sim.evaluation_config import DemoConfig, EvalConfig
from ceed_vla.sim.evaluation_report import (
    MARKDOWN,
    REPORT,
    build_report,
    shown_seed,
    write_json,
    write_report,
)
from ceed_vla.sim.evaluation_timing import measure_latency
from ceed_vla.sim.plots import PLOTS
from ceed_vla.sim.report import console_table
from ceed_vla.sim.rerun_episodes import log_episode
from ceed_vla.sim.rollout import drive
from ceed_vla.sim.summary import versions
from ceed_vla.viz import RerunLog, check_rerun
from ceed_vla.wording import counted
from ceed_vla.workers import Workers, open_workers

# The command table finds the two configurations here.
__all__ = ["DemoConfig", "EvalConfig", "evaluate", "prepared"]

logger = logging.getLogger(__name__)


def evaluate(
    config: EvalConfig,
    console: Console | None = None,
    probes: Callable[[dict[str, Bundle]], Any] = lambda bundles: {},
) -> dict[str, Any]:
    """Run every decoder on the same seeds, measure latency, and write report, plots and clips.

    An interrupt is re-raised after a report of the finished episodes was written, marked
    ``"complete": false``. With `resume` these episodes are reused, and except for times the report
    equals that of an uninterrupted evaluation. (The episodes of a batch share a source of random
    guesses, so with random guesses only complete batches are reused.)

    Args:
        config: See `EvalConfig`.
        console: Console for the table; standard output by default.
        probes: Returns what else is timed, a `Probe` by name, for the loaded models.

    Returns:
        The contents of ``report.json``.

    Raises:
        ConfigError: An invalid option, e.g. an unknown decoder.
        CheckpointError: A checkpoint cannot be loaded.
        SimulationError: The environment cannot be created.
    """
    batches(config)  # which refuses too many shards
    config = replace(config, engine=resolved(config.engine, config))
    if config.rerun:
        check_rerun("rerun", config.rerun)
    clips = [f"clip_{name}.mp4" for name in decoder_names(config)] if config.clips else []
    own = (EPISODES, REPORT, MARKDOWN, PAGE, *PLOTS, *clips)
    with (
        claimed_folder("output_dir", config.output_dir, own, (REPORT, EPISODES)) as folder,
        EnvPool(min(config.batch, config.episodes), config.env, config.instruction) as pool,
        open_workers(
            config.workers, config.cluster, batch_runner, config, pool, checkpoints=config.paths
        ) as workers,
    ):
        if not config.resume:
            refuse_unfinished(folder, REPORT)
        console = console or default_console()
        if added := added_rivals(config.decoders, has_teacher=bool(config.teacher.path)):
            console.print(_added_note(added), soft_wrap=True, highlight=False)
        run, log = prepared(config, pool, probes)
        workers.here = run.run_batch  # with the models that are loaded already
        return _evaluate(run, log, folder, workers, console)


def _added_note(added: Sequence[str]) -> str:
    """Text that names the rows added for a teacher, what they show, and how to omit them."""
    rows = " and ".join(f"{name} ({HONEST_RIVALS[name]})" for name in added)
    return (
        f"Added: {rows}. To omit {'them' if len(added) > 1 else 'it'}, put {ONLY} before the names "
        "of --decoders."
    )


def _evaluate(
    run: Evaluation,
    log: EpisodeLog,
    folder: Path,
    workers: Workers,
    console: Console,
) -> dict[str, Any]:
    """Run `evaluate` in a claimed folder."""
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
        files = [*write_report(report, folder), write_page([folder], folder / PAGE)]
        if not complete:
            console.print(f"Stopped early; the partial report is in {files[1]}.")
    if config.clips:
        files += _write_clips(run, folder)
    if config.rerun:
        files.append(_write_rerun(run))
    write_page([folder], folder / PAGE)  # again, with the clips
    console.print(console_table(report, console.width))
    console.print(
        "Written: " + ", ".join(str(file) for file in files), soft_wrap=True, highlight=False
    )
    return report


# ---- before the first episode --------------------------------------------------------------------


def prepared(config: EvalConfig, pool: EnvPool, probes: Any) -> tuple[Evaluation, EpisodeLog]:
    """Load the models, check the options, and read the episodes that are reused.

    Returns:
        The evaluation and its episode file.

    Raises:
        ConfigError: Options exclude each other, or the policy, its chunks or the environment cannot
            run a decoder.
    """
    if config.delay == "measured" and (not config.timing_chunks or min(config.delay_ms, default=0)):
        raise ConfigError(
            "--delay measured needs a row without a delay, on which it is measured. Set "
            "--timing_chunks above 0, and include 0 in --delay_ms."
        )
    if config.delay == "measured" and config.num_shards > 1:
        raise ConfigError(
            f"--delay is measured, --num_shards {config.num_shards}; each would measure another "
            "delay. Measure it once, and set --delay_ms in all shards."
        )
    config.place_threads()
    bundles = load_bundles(config)
    executed = config.executed_steps or bundles["policy"][0].config.n_action_steps
    config = replace(config, executed_steps=executed)
    rows = rows_of(config, bundles)
    engines = engines_of_run(config, bundles)
    run = Evaluation(
        config,
        rows,
        bundles,
        {},
        pool,
        executed,
        engines,
        probes(bundles),
        checkpoint_entries(config),
    )
    if config.delay == "measured":
        measure_latency(run)
        run.rows += _rows_with_measured_delays(run)
    _check_delays(run)
    _check_episodes(run)
    _check_decoders(run)
    log = EpisodeLog(
        Path(config.output_dir),
        identity_of(config, run.rows, bundles, engines),
        dict(planned_episodes(config)),
        pool.max_episode_steps,
        versions(),
    )
    run.results = whole_batches(config, run.rows, _reused_episodes(run, log))
    return run, log


def _rows_with_measured_delays(run: Evaluation) -> list[Row]:
    """Copies of the rows without a delay, each delayed by its measured latency (p50).

    A resumed evaluation has the delays that were measured when it began.
    """
    folder = Path(run.config.output_dir)
    resumed = run.config.resume and (folder / EPISODES).exists()
    known = read_identity(folder)["decoders"] if resumed else {}
    delayed = [
        row.delayed(
            1000 * float(np.median(run.samples[row.name].total)), run.config.env.fps, "@measured"
        )
        for row in run.rows
        if not row.delay
    ]
    return [
        replace(row, delay=known[row.name].get("delay", row.delay)) if row.name in known else row
        for row in delayed
    ]


def _check_delays(run: Evaluation) -> None:
    """Raise unless the environment can hold and every delay is below the length of a chunk."""
    steps = min(policy.config.chunk_size for policy, _, _ in run.bundles.values())
    latest = max(run.rows, key=lambda row: row.delay)
    if latest.delay:
        run.pool.env(0).needs("--delay_ms", "hold_action")
    if latest.delay >= steps:
        late = counted(latest.delay, "control step")
        raise ConfigError(
            f"{latest.name} is {late} late; a delay must be below a chunk's {steps}. Leave it out."
        )


def _check_episodes(run: Evaluation) -> None:
    """Raise if episodes would repeat: equal ones are no further evidence."""
    distinct = run.pool.env(0).distinct
    if distinct is not None and run.config.episodes > distinct:
        raise ConfigError(
            f"--episodes is {run.config.episodes}; --env.type={run.config.env.type} as it is set "
            f"has {distinct} different ones. Lower --episodes to that, or draw its states from the "
            "seeds."
        )


def _check_decoders(run: Evaluation) -> None:
    """Decode one chunk with every row, so that unsupported decoders fail before any episode."""
    env = run.pool.env(0)
    seed, task = planned_episodes(run.config)[0]
    env.reset(seed, task)
    for row in run.rows:
        runner = run.runner(row)
        if runner.alone and (run.config.workers > 1 or run.config.cluster.chosen):
            raise ConfigError(
                f"{row.name} has a deadline, which needs an otherwise idle machine: set "
                "--workers 1, and no --cluster.address."
            )
        runner.decode([env.observe()], [env.instruction], [None])


def _reused_episodes(run: Evaluation, log: EpisodeLog) -> Results:
    """Finished episodes by row: those of `reuse`, and with `resume` those in the output folder."""
    config = run.config
    reused: Results = {row.name: [] for row in run.rows}
    if config.reuse:
        reused |= log.shared(Path(config.reuse))
    if config.resume:
        reused |= {name: episodes for name, episodes in log.read().items() if episodes}
    return reused


# ---- episodes ------------------------------------------------------------------------------------


def _run_all_episodes(run: Evaluation, log: EpisodeLog, workers: Workers) -> None:
    """Let the workers run the missing episodes.

    Each episode is on disk before the next one is counted. Every decoder runs a batch of seeds
    before any runs the next one, so that an early stop leaves comparable rows.
    """
    config = run.config
    done = {name: {episode.seed for episode in episodes} for name, episodes in run.results.items()}
    own = batches(config)
    missing = [
        (row, episodes)
        for batch in own
        for row in run.rows
        if (episodes := [(seed, task) for seed, task in batch if seed not in done[row.name]])
    ]
    finished = sum(map(len, run.results.values()))
    total = sum(map(len, own)) * len(run.rows)
    with tqdm(total=total, initial=finished, unit="episode", dynamic_ncols=True) as bar:
        for (row, _), episode in workers.stream(missing):
            if episode.seed in done[row.name]:
                continue  # it came again, because its worker was lost
            done[row.name].add(episode.seed)
            log.append(row.name, episode)
            run.results[row.name].append(episode)
            bar.set_description(row.name, refresh=False)
            bar.update()


def _write_rerun(run: Evaluation) -> Path:
    """Write the episode of the clips, with every decoder, for Rerun."""
    seed = shown_seed(run)
    task = dict(planned_episodes(run.config))[seed]
    file = Path(run.config.rerun)
    with RerunLog(file) as log:
        for row in run.rows:
            if not row.delay:
                runner = run.runner(row)
                episode = drive(runner, run.pool, seed, task)
                log_episode(log, row.name, runner, episode, run.config.env.fps)
    return file


def _write_clips(run: Evaluation, folder: Path) -> list[Path]:
    """Write a clip per decoder, all of the first episode that the first decoder solved."""
    seed = shown_seed(run)
    task = dict(planned_episodes(run.config))[seed]
    rows = [row for row in run.rows if not row.delay]
    files = []
    for row in tqdm(rows, desc="clips", unit="clip", dynamic_ncols=True):
        runner = run.runner(row)
        files.append(
            record_clip(folder / f"clip_{row.name}.mp4", row, runner, run.pool, seed, task)
        )
    return files
