"""The parts of an evaluation: its models, its rows, and its episodes in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ceed_vla.checkpoint_files import fingerprint
from ceed_vla.checkpoints import load, resolve_checkpoint, weights_hash
from ceed_vla.errors import ConfigError
from ceed_vla.sim.decoders import Row, parse_decoders, resolve_rows
from ceed_vla.sim.engines import Engine, drives, open_engines
from ceed_vla.sim.env_tasks import at_once, task_of, turns
from ceed_vla.sim.environment import Bundle, EnvPool, flags, joined
from ceed_vla.sim.episode_log import Results
from ceed_vla.sim.evaluation_config import EvalConfig
from ceed_vla.sim.rollout import EpisodeResult, PolicyRunner, rollout
from ceed_vla.sim.timing import Probe, Samples, make_runner
from ceed_vla.wording import counted


@dataclass
class Evaluation:
    """The state of an evaluation.

    Attributes:
        config: Its options, with `executed_steps` filled in.
        rows: Decoders, with their delays.
        bundles: Policy, preprocessor and postprocessor by model: "policy" and optionally "teacher".
        results: Finished episodes by row.
        pool: The environments.
        executed_steps: Steps executed of each chunk.
        engines: The engines in which latency is measured.
        probes: What else is timed, by name.
        checkpoints: Name and hash of every model, as they were loaded.
        samples: Times by row, once latency is measured.
        timing: The report's entry on latency; empty until it is measured.
    """

    config: EvalConfig
    rows: list[Row]
    bundles: dict[str, Bundle]
    results: Results
    pool: EnvPool
    executed_steps: int
    engines: dict[str, Engine] = field(default_factory=dict)
    probes: Mapping[str, Probe] = field(default_factory=dict)
    checkpoints: Mapping[str, dict[str, str]] = field(default_factory=dict)
    samples: dict[str, Samples] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)

    def runner(self, row: Row) -> PolicyRunner:
        """The runner of a row's episodes."""
        return driver_of(self.engines, row, self.bundles, self.executed_steps)

    def run_batch(self, item: tuple[Row, list[tuple[int, str]]]) -> Iterator[EpisodeResult]:
        """Run a batch of a row's episodes in this process."""
        row, episodes = item
        return rollout(self.runner(row), self.pool, episodes)


def driver_of(
    engines: Mapping[str, Engine],
    row: Row,
    bundles: Mapping[str, Bundle],
    executed_steps: int | None,
) -> PolicyRunner:
    """The runner of a row's episodes: the export if only that engine is chosen and runs the row,
    eager torch otherwise.
    """
    if drives(engines) and engines["edge"].runs(row.model, row.decoding):
        return engines["edge"].runner(row, executed_steps)
    return make_runner(row, bundles, executed_steps)


def engines_of_run(config: EvalConfig, bundles: Mapping[str, Bundle]) -> dict[str, Engine]:
    """The engines that the options choose; none if nothing is timed or runs on an export."""
    if not config.timing_chunks and config.engine != "edge":
        return {}
    paths = {"policy": config.policy.path, "teacher": config.teacher.path}
    return open_engines(config.engine, bundles, paths, config.env, config.pin)


def checkpoint_entries(config: EvalConfig) -> dict[str, dict[str, str]]:
    """Name and hash of the weights of every model."""
    paths = {"policy": config.policy.path, "teacher": config.teacher.path}
    return {
        model: {"name": resolve_checkpoint(path).name, "sha256": weights_hash(path)}
        for model, path in paths.items()
        if path
    }


def decoder_names(config: EvalConfig) -> list[str]:
    """The decoders to evaluate, with those that a teacher adds; `ConfigError` for unknown ones."""
    return parse_decoders(config.decoders, has_teacher=bool(config.teacher.path))


def rows_of(config: EvalConfig, bundles: dict[str, Bundle]) -> list[Row]:
    """Rows of every decoder with every delay."""
    rows = resolve_rows(
        decoder_names(config), {model: bundle[0].config for model, bundle in bundles.items()}
    )
    return [
        row.delayed(ms, config.env.fps)
        for ms in dict.fromkeys(config.delay_ms or [0.0])
        for row in rows
    ]


def load_bundles(config: Any) -> dict[str, Bundle]:
    """Load the policy and, if set, the teacher, `joined` for the environment.

    Raises:
        CheckpointError: A checkpoint cannot be loaded.
        ConfigError: No policy is set, the device does not exist, or ``config.executed_steps`` is
            more than a chunk has.
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


def identity_of(
    config: EvalConfig,
    rows: Sequence[Row],
    bundles: dict[str, Bundle],
    engines: Mapping[str, Engine],
) -> dict[str, Any]:
    """Return everything that affects an episode, as JSON values."""
    options = ("seed", "episodes", "executed_steps", "batch", "instruction")
    return {
        "env": flags(config.env),
        **{name: getattr(config, name) for name in options},
        **({"engine": "edge"} if drives(engines) else {}),  # others run episodes with eager torch
        **({"shard": [config.shard_index, config.num_shards]} if config.num_shards > 1 else {}),
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


# ---- episodes ------------------------------------------------------------------------------------


EPISODES_IN_A_ROW = 10  # of a task, where only one environment fits into a process


def planned_episodes(config: EvalConfig) -> list[tuple[int, str]]:
    """(seed, task) of every episode; a seed has one task in all evaluations of an environment."""
    seeds = range(config.seed, config.seed + config.episodes)
    return [(seed, task_of(config.env, seed)) for seed in seeds]


def batches(config: EvalConfig) -> list[list[tuple[int, str]]]:
    """Batches of (seed, task) of this run; every decoder runs a batch before any runs the next one.

    Where a process has room for one environment, which loads a task in seconds and keeps few, a
    task has several episodes in a row.

    Raises:
        ConfigError: There are fewer batches than shards.
    """
    episodes = planned_episodes(config)
    if at_once(config.env, 2) == 1:
        round_of_all = EPISODES_IN_A_ROW * len(turns(config.env))
        episodes.sort(key=lambda one: ((one[0] - config.seed) // round_of_all, one[1]))
    found = [
        episodes[start : start + config.batch] for start in range(0, len(episodes), config.batch)
    ]
    if len(found) < config.num_shards:
        raise ConfigError(
            f"--num_shards is {config.num_shards}; {counted(config.episodes, 'episode')} in "
            f"batches of {config.batch} can have at most {counted(len(found), 'shard')}. Lower "
            "--num_shards or --batch."
        )
    return found[config.shard_index :: config.num_shards]


def whole_batches(config: EvalConfig, rows: Sequence[Row], results: Results) -> Results:
    """Drop the episodes of incomplete batches from rows with random guesses, or that learn from
    chunk to chunk.

    A batch has one source of random guesses, and learning begins with it: it cannot be continued.
    """
    for row in rows:
        if row.decoding.guess == "random" or row.decoding.decoder.forget is not None:
            done = {episode.seed for episode in results[row.name]}
            whole = {
                seed
                for batch in batches(config)
                if done >= {s for s, _ in batch}
                for seed, _ in batch
            }
            results[row.name] = [episode for episode in results[row.name] if episode.seed in whole]
    return results


def batch_runner(
    config: EvalConfig, pool: EnvPool
) -> Callable[[tuple[Row, Any]], Iterator[EpisodeResult]]:
    """Make the function of a worker: (row, batch) -> results.

    See `Workers`.
    """
    bundles = load_bundles(config)
    executed = config.executed_steps or bundles["policy"][0].config.n_action_steps
    # A worker has one thread, and may be on a machine that lacks the cores of `pin`.
    alone = replace(config, pin="none")
    engines = engines_of_run(alone, bundles) if config.engine == "edge" else {}

    def run(item: tuple[Row, list[tuple[int, str]]]) -> Iterator[EpisodeResult]:
        row, episodes = item
        return rollout(driver_of(engines, row, bundles, executed), pool, episodes)

    return run
