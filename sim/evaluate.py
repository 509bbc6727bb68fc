"""``ceed-vla eval``: closed-loop success and latency of decoders on the same seeds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from tqdm import tqdm

from ceed_vla.checkpoints import load, resolve_checkpoint, weights_hash
from ceed_vla.errors import ConfigError
from ceed_vla.fields import SEEDS, chosen, ranged
from ceed_vla.files import write_text
from ceed_vla.outputs import MADE_BY, claimed_folder, default_console
from ceed_vla.sim.clips import record_clip
from ceed_vla.sim.decoders import (
    HONEST_RIVALS,
    ONLY,
    Row,
    added_rivals,
    parse_decoders,
    resolve_rows,
)
from ceed_vla.sim.environment import EVALUATION_SEEDS, Bundle, EnvPool, flags, joined, turns
from ceed_vla.sim.episode_log import EPISODES, EpisodeLog, Results, fingerprint, refuse_unfinished
from ceed_vla.sim.plots import PLOTS, write_plots
from ceed_vla.sim.report import console_table, markdown
from ceed_vla.sim.rollout import EpisodeResult, rollout
from ceed_vla.sim.settings import CheckpointPath, DrivenConfig
from ceed_vla.sim.summary import hardware, paired_entries, row_entry, versions
from ceed_vla.sim.timing import (
    ENGINES,
    Probe,
    Samples,
    bare_parts,
    collect_observations,
    engines_of,
    in_engine,
    make_runner,
    measure,
    percentiles,
    summarise,
)
from ceed_vla.wording import counted
from ceed_vla.workers import MOST, Workers

logger = logging.getLogger(__name__)

REPORT = "report.json"
MOVED = {
    "env": "env.type",
    "task": "env.task",
    "split": "env.split",
    "max_episode_steps": "env.episode_length",
}
MOVED |= {"compile": "engine"}


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
        engine: How latency is measured: eager, compiled (`ceed_vla.engine`; needs a C++ compiler
            and some minutes), or fastest: every row in both, and in the faster one in the report.
            The episodes stay eager.
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


@dataclass
class Evaluation:
    """What an evaluation has gathered so far."""

    config: EvalConfig
    rows: list[Row]
    bundles: dict[str, Bundle]
    results: Results
    pool: EnvPool
    executed_steps: int
    probes: Mapping[str, Probe] = field(default_factory=dict)
    samples: dict[str, Samples] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)


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
    of these only whole shards are kept.) `probes` gives what else is timed, a `Probe` by name, for
    the models that were loaded.

    Raises:
        ConfigError: An option that cannot work, e.g. an unknown decoder.
        CheckpointError: A checkpoint that cannot be loaded.
        SimulationError: An environment that cannot be made.
    """
    clips = [f"clip_{name}.mp4" for name in _decoders(config)] if config.clips else []
    own = (EPISODES, REPORT, "report.md", *PLOTS, *clips)
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


def _evaluate(
    run: Evaluation,
    log: EpisodeLog,
    folder: Path,
    workers: Workers,
    console: Console,
) -> dict[str, Any]:
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
        _write_json(_build_report(run, complete=False), folder)
        _run_all_episodes(run, log, workers)
        if not run.timing:
            _run_timing(run)
        complete = True
    finally:
        report = _build_report(run, complete=complete)
        files = _write_report(report, folder)
        if not complete:
            console.print(f"Stopped early; the partial report is in {files[1]}.")
    if config.clips:
        files += _write_clips(run, folder)
    console.print(console_table(report, console.width))
    console.print(
        "Written: " + ", ".join(str(file) for file in files), soft_wrap=True, highlight=False
    )
    return report


def _decoders(config: EvalConfig) -> list[str]:
    return parse_decoders(config.decoders, has_teacher=bool(config.teacher.path))


def _added_note(added: Sequence[str]) -> str:
    """One line: which rows a teacher adds, what they show, and how to leave them out."""
    rows = " and ".join(f"{name} ({HONEST_RIVALS[name]})" for name in added)
    return (
        f"Added: {rows}; {ONLY} before the names of --decoders leaves "
        f"{'them' if len(added) > 1 else 'it'} out."
    )


def prepared(config: EvalConfig, pool: EnvPool, probes: Any) -> tuple[Evaluation, EpisodeLog]:
    """What is evaluated, with the episodes that are kept of a run before, and where episodes are
    written.
    """
    if config.delay == "measured" and (not config.timing_chunks or min(config.delay_ms, default=0)):
        raise ConfigError(
            "--delay measured needs --timing_chunks and --delay_ms 0, on which it is measured."
        )
    config.limit_threads()
    bundles = load_bundles(config)
    executed = config.executed_steps or bundles["policy"][0].config.n_action_steps
    config = replace(config, executed_steps=executed)
    run = Evaluation(config, _rows(config, bundles), bundles, {}, pool, executed, probes(bundles))
    if config.delay == "measured":
        _run_timing(run)
        took = {
            name: 1000 * float(np.median(samples.total)) for name, samples in run.samples.items()
        }
        run.rows += [
            row.delayed(took[row.name], config.env.fps, "@measured")
            for row in run.rows
            if not row.delay
        ]
    rows = run.rows
    steps = min(b[0].config.chunk_size for b in bundles.values())
    latest = max(rows, key=lambda row: row.delay)
    if latest.delay:
        pool.env(0).needs("--delay_ms", "hold_action")
    if latest.delay >= steps:
        late = counted(latest.delay, "control step")
        raise ConfigError(f"{latest.name} is {late} late; a chunk has {steps}: leave it out.")
    # what a policy cannot decode is known before any episode
    (env := pool.env(0)).reset(*_plan(config)[0])
    for row in rows:
        runner = make_runner(row, bundles, executed)
        if runner.alone and config.workers > 1:
            raise ConfigError(
                f"{row.name} has a deadline, of a machine with nothing else to do: give "
                "--workers 1."
            )
        runner.decode([env.observe()], [env.instruction], [None])
    log = EpisodeLog(
        Path(config.output_dir),
        _identity(config, rows, bundles),
        dict(_plan(config)),
        pool.max_episode_steps,
    )
    kept: Results = {row.name: [] for row in rows} | (
        log.shared(Path(config.reuse)) if config.reuse else {}
    )
    kept |= {
        name: episodes
        for name, episodes in (log.read() if config.resume else {}).items()
        if episodes
    }
    run.results = _whole_shards(config, rows, kept)
    return run, log


def _rows(config: EvalConfig, bundles: dict[str, Bundle]) -> list[Row]:
    rows = resolve_rows(
        _decoders(config), {model: bundle[0].config for model, bundle in bundles.items()}
    )
    return [
        row.delayed(ms, config.env.fps)
        for ms in dict.fromkeys(config.delay_ms or [0.0])
        for row in rows
    ]


def load_bundles(config: Any) -> dict[str, Bundle]:
    """Load ``policy`` and, where it is given, ``teacher``; both replan after
    ``config.executed_steps`` steps.

    Raises:
        CheckpointError: A checkpoint that cannot be loaded.
        ConfigError: No policy, no such device, or more steps are to be executed than a chunk has.
    """
    paths = {"policy": config.policy.given(), "teacher": config.teacher.path}
    bundles = {model: load(path, device=config.device) for model, path in paths.items() if path}
    for model, (policy, _, _) in bundles.items():
        if (config.executed_steps or 1) > policy.config.chunk_size:
            raise ConfigError(
                f"--executed_steps is {config.executed_steps}; "
                f"a chunk of {paths[model]} has {counted(policy.config.chunk_size, 'step')}."
            )
    return {model: joined(bundle, config.env) for model, bundle in bundles.items()}


def _plan(config: EvalConfig) -> list[tuple[int, str]]:
    """(seed, task) of every episode."""
    tasks = turns(config.env)
    return [(config.seed + i, tasks[i % len(tasks)]) for i in range(config.episodes)]


def _identity(
    config: EvalConfig, rows: Sequence[Row], bundles: dict[str, Bundle]
) -> dict[str, Any]:
    """What decides an episode."""
    options = ("seed", "episodes", "executed_steps", "batch", "instruction")
    return {
        "env": flags(config.env),
        **{name: getattr(config, name) for name in options},
        "device": str(bundles["policy"][0].config.device),
        "policy": fingerprint(config.policy.path),
        "teacher": fingerprint(config.teacher.path) if config.teacher.path else None,
        "decoders": {
            row.name: {
                "model": row.model,
                **asdict(row.decoding),
                **({"delay": row.delay} if row.delay else {}),
            }
            for row in rows
        },
    }


def shards(config: EvalConfig) -> list[list[tuple[int, str]]]:
    """(seed, task) of the episodes that one decoder runs before the next one."""
    plan = _plan(config)
    return [plan[start : start + config.batch] for start in range(0, len(plan), config.batch)]


def _whole_shards(config: EvalConfig, rows: Sequence[Row], results: Results) -> Results:
    """Without the episodes that cannot be gone on with: random guesses come from one source for a
    whole shard.
    """
    for row in rows:
        if row.decoding.guess == "random":
            done = {episode.seed for episode in results[row.name]}
            whole = {
                seed
                for shard in shards(config)
                if done >= {s for s, _ in shard}
                for seed, _ in shard
            }
            results[row.name] = [episode for episode in results[row.name] if episode.seed in whole]
    return results


def shard_runner(
    config: EvalConfig, pool: EnvPool
) -> Callable[[tuple[Row, Any]], tuple[str, list[EpisodeResult]]]:
    """What runs the episodes of a shard by the decoder of a row, in a process of its own; see
    `Workers`.
    """
    bundles = load_bundles(config)
    executed = config.executed_steps or bundles["policy"][0].config.n_action_steps

    def run(item: tuple[Row, list[tuple[int, str]]]) -> tuple[str, list[EpisodeResult]]:
        row, episodes = item
        return row.name, rollout(make_runner(row, bundles, executed), pool, episodes)

    return run


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


def _run_timing(run: Evaluation) -> None:
    """Latency of all rows and their autoregressive references, on observations of the episodes of
    one row.
    """
    config = run.config
    rows = [row for row in run.rows if not row.delay]
    if not (rows and config.timing_chunks):
        return
    references = resolve_rows(
        sorted({row.reference for row in rows} - {row.name for row in rows}),
        {model: bundle[0].config for model, bundle in run.bundles.items()},
    )
    driver = next((row for row in rows if row.name == "ceed"), rows[-1])
    runner = make_runner(driver, run.bundles, run.executed_steps)
    episodes = collect_observations(runner, run.pool, _plan(config), config.timing_chunks)
    chunks = sum(len(episode) for episode in episodes)
    engines = ENGINES[:2] if config.engine == "fastest" else (config.engine,)
    bundles = {
        e: {model: in_engine(bundle, e) for model, bundle in run.bundles.items()}
        for e in {"eager", *engines}
    }
    runners = {
        f"{row.name} {e}": make_runner(row, bundles[e], run.executed_steps)
        for row in (*rows, *references)
        for e in engines_of(row.decoding, engines)
    }
    parts = {
        f"{model} {e}": bare_parts(bundle) for e in engines for model, bundle in bundles[e].items()
    }
    with tqdm(total=chunks, desc="latency", unit="chunk", dynamic_ncols=True) as bar:
        samples, probed = measure(runners, {**parts, **run.probes}, episodes, bar.update)
    used = {}
    for row in (*rows, *references):
        mine = engines_of(row.decoding, engines)
        used[row.name] = min(mine, key=lambda e: np.median(samples[f"{row.name} {e}"].total))
        run.samples[row.name] = samples[f"{row.name} {used[row.name]}"]
    run.timing = {
        "chunks": chunks,
        "episodes": len(episodes),
        "driver": driver.name,
        "batch": 1,
        "engines": used,
        "parts": {
            name: {part: percentiles(s) for part, s in found.items()}
            for name, found in probed.items()
        },
    }


def _build_report(run: Evaluation, *, complete: bool) -> dict[str, Any]:
    config = run.config
    policy = run.bundles["policy"][0]
    entries = {}
    for row in run.rows:
        entry = row_entry(run.results[row.name])
        if row.name in run.samples:
            reference = run.samples[row.reference]
            entry |= summarise(
                run.samples[row.name],
                reference,
                run.bundles[row.model][0].tokenizer,
                run.executed_steps,
            )
        entry |= {"delay_steps": row.delay, "delay_of": row.name.removesuffix(row.suffix)}
        entry["paired"] = paired_entries(
            row.name,
            run.results,
            (f"ar{row.suffix}", f"teacher_ar{row.suffix}", f"teacher_{row.name}"),
        )
        entry["decoding"] = {**asdict(row.decoding), "exits": list(row.decoding.exits)}
        entries[row.name] = entry
    return {
        "program": MADE_BY,
        "complete": complete,
        "env": config.env.type,
        "task": config.env.task,
        "split": getattr(config.env, "split", None),
        "seeds": {"first": config.seed, "count": config.episodes},
        "executed_steps": config.executed_steps,
        "fps": config.env.fps,
        "max_episode_steps": run.pool.max_episode_steps,
        "chunk_size": policy.config.chunk_size,
        "block_length": policy.config.block_length,
        "policy": _checkpoint_entry(config.policy.path),
        "teacher": _checkpoint_entry(config.teacher.path) if config.teacher.path else None,
        "decoders": entries,
        "timing": run.timing,
        "versions": versions(),
        "hardware": hardware(str(policy.config.device)),
    }


def _checkpoint_entry(path: str) -> dict[str, str]:
    return {"name": resolve_checkpoint(path).name, "sha256": weights_hash(path)}


def _write_json(report: dict[str, Any], folder: Path) -> Path:
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return folder / REPORT


def _write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    files = [_write_json(report, folder), folder / "report.md"]
    plots = write_plots(report, folder)
    write_text(files[1], markdown(report, [plot.name for plot in plots]))
    return files + plots


def _write_clips(run: Evaluation, folder: Path) -> list[Path]:
    """One clip a decoder, all of the same episode: the first one that the first decoder solved."""
    config = run.config
    first = sorted(run.results[run.rows[0].name], key=lambda episode: episode.seed)
    shown = next((episode for episode in first if episode.success), first[0])
    task = dict(_plan(config))[shown.seed]
    rows = [row for row in run.rows if not row.delay]
    files = []
    for row in tqdm(rows, desc="clips", unit="clip", dynamic_ncols=True):
        runner = make_runner(row, run.bundles, run.executed_steps)
        files.append(
            record_clip(folder / f"clip_{row.name}.mp4", row, runner, run.pool, shown.seed, task)
        )
    return files
