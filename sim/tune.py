"""``ceed-vla tune``: find the plan with the highest success within a latency budget per chunk.

A plan is a decoding (decoder, signal and threshold of the exit, cap, tail, guess), its faster
engine, and the number of executed steps. The search is evolutionary, after EEEA-Net (arXiv
2108.06156). Every budget has its own candidates. Each is timed before it runs any episode; one over
its budget is replaced by another draw. The others run validation episodes by successive halving:
the best quarter within every budget runs twice as many, and so on. In a final play-off, the best
plans of every budget and the best hand-picked plans run four times the episodes and are timed
again, interleaved. The chosen ones then run as many episodes on fresh seeds, because the search's
own numbers favour the winner.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ceed_vla import invocation
from ceed_vla.checkpoint_files import fingerprint
from ceed_vla.checkpoints import load, resolve_checkpoint, save, weights_hash
from ceed_vla.errors import ConfigError
from ceed_vla.files import write_text
from ceed_vla.outputs import (
    MADE_BY,
    WRITTEN,
    claimed_folder,
    default_console,
    hashes,
    written_before,
)
from ceed_vla.sim.bench import PARETO, pareto
from ceed_vla.sim.calibrate import CHECKPOINT, plain
from ceed_vla.sim.environment import EnvPool, flags, joined
from ceed_vla.sim.plots import save_figure
from ceed_vla.sim.progress import MEASURED, Progress
from ceed_vla.sim.rollout import SHARD, episode_runner, run_shard
from ceed_vla.sim.summary import hardware, versions
from ceed_vla.sim.timing import PAUSE_S
from ceed_vla.sim.tune_config import PLAY_OFF, TuneConfig
from ceed_vla.sim.tune_plan import Plan, Trial
from ceed_vla.sim.tune_search import Search
from ceed_vla.workers import open_workers

PLANS = "plans.json"

# For every budget [ms]: the chosen plan and the best hand-picked plan.
Chosen = list[tuple[float, Trial | None, Trial | None]]


def tune(config: TuneConfig) -> dict[str, Any]:
    """Search for plans; write plans.json and the plot, and return the contents of plans.json.

    Raises:
        ConfigError: An invalid option, or no plan fits the budgets.
        CheckpointError: The checkpoint cannot be loaded.
    """
    inputs = [resolve_checkpoint(config.policy.given())]
    part = CHECKPOINT if config.save else ""
    own, known = (PLANS, PARETO, MEASURED), (PLANS, MEASURED)
    claim = ("output_dir", config.output_dir, own, known, part, inputs)
    with claimed_folder(*claim) as folder:
        return _tune(config, folder)


def _tune(config: TuneConfig, folder: Path) -> dict[str, Any]:
    """Run `tune` in a claimed folder."""
    config.place_threads()
    policy, pre, post = load(config.policy.given())
    weights = weights_hash(config.policy.path)  # now, as the folder may get others meanwhile
    policy.requires_grad_(False)  # so that no weight is saved as trainable
    progress = Progress(folder, _identity(config, str(policy.config.device)), config.resume)
    with (
        EnvPool(SHARD, config.env, config.instruction) as pool,
        open_workers(
            config.workers,
            config.cluster,
            episode_runner,
            config.policy.path,
            config.env,
            config.instruction,
            checkpoints=[config.policy.path],
        ) as workers,
    ):
        bundle = joined((policy, pre, post), config.env)
        workers.here = partial(run_shard, bundle, pool)
        search = Search(config, bundle, pool, workers, progress)
        trials = search.run()
        final = search.final()
    report = _report(config, search, trials, final, weights)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(
        _figure([t for t in trials if len(t.solved) >= config.episodes], search.floor),
        folder / PARETO,
    )
    if not config.save:  # the checkpoint of an earlier search stays, with its recorded hashes
        report[WRITTEN] = written_before(folder / PLANS)
    write_text(folder / PLANS, json.dumps(report, indent=2))
    if not any(found for _, found, _ in final):
        progress.end()
        raise ConfigError(
            f"No plan fits {search.budgets} ms; the floor is {search.floor} ms ({PLANS}). Raise "
            "--budgets_ms."
        )
    if config.save:
        _name_plans(
            policy, {f"plan{plain(budget)}": trial.plan for budget, trial, _ in final if trial}
        )
        save(folder / CHECKPOINT, policy, pre, post, unchanged=True)
        report[WRITTEN] = hashes(folder, CHECKPOINT)
        write_text(folder / PLANS, json.dumps(report, indent=2))
    progress.end()
    console = default_console()
    _print(report, console)
    console.print(f"Written: {folder / PLANS}, {folder / PARETO}", soft_wrap=True, highlight=False)
    return report


def _identity(config: TuneConfig, device: str) -> dict[str, Any]:
    """Everything that affects the search."""
    names = "budgets_ms population generations episodes chunks seed search_seed engine threads pin"
    return {
        "policy": fingerprint(config.policy.path),
        "env": flags(config.env),
        "instruction": config.instruction,
        **{name: getattr(config, name) for name in names.split()},
        "hardware": hardware(device),
        "versions": versions(),
        "pause_s": PAUSE_S,
    }


def _report(
    config: TuneConfig, search: Search, trials: Sequence[Trial], final: Chosen, weights: str
) -> dict[str, Any]:
    """The contents of ``plans.json``."""
    return {
        "program": MADE_BY,
        "policy": {"path": config.policy.path, "sha256": weights},
        "engine": config.engine,
        "command": invocation.command(),
        "hardware": hardware(str(search.bundle[0].config.device)),
        "floor_ms": search.floor,
        "env": flags(config.env),
        "seeds": {
            "first": config.seed,
            "count": config.episodes,
            "fresh": config.seed + PLAY_OFF * config.episodes,
        },
        "tried": len(trials),
        "rejected": {plain(budget): len(plans) for budget, plans in search.rejected.items()},
        "plans": [
            {
                "budget_ms": budget,
                **(found.entry() if found else {"decoding": None}),
                "by_hand": hand and hand.entry(),
            }
            for budget, found, hand in final
        ],
        "trials": [trial.entry() for trial in sorted(trials, key=lambda trial: trial.p50)],
    }


def _name_plans(policy: Any, plans: dict[str, Plan]) -> None:
    """Store plans in a policy's configuration as decoder names.

    The last one becomes "plan" and sets the policy's executed steps. The others are stored under
    their names if they execute equally many steps.
    """
    plans["plan"] = list(plans.values())[-1]
    before = policy.config.n_action_steps
    steps = plans["plan"].executed_steps
    policy.config.n_action_steps = steps
    # these hold for the former number of executed steps only
    stale = ("plan",) if steps == before else ("plan", "risk", "learned")
    own = {name: plan.decoding for name, plan in plans.items() if plan.executed_steps == steps}
    policy.config.forget(*stale, new=own)


def _figure(trials: Sequence[Trial], floor: float) -> Any:
    rows = {
        f"{trial.plan.decoding} h{trial.plan.executed_steps}": {
            "total_ms": {"p50": trial.p50, "p99": trial.p99},
            **trial.entry(),
        }
        for trial in trials
    }
    return pareto({"decoders": rows, "floor_ms": floor})


def _print(report: dict[str, Any], console: Console) -> None:
    columns = (
        "budget [ms]",
        "decoding",
        "executed steps",
        "engine",
        "p50 / p99 [ms]",
        "solved",
        "by hand",
        "solved",
    )
    title = (
        f"floor {report['floor_ms']:.1f} ms, {report['tried']} plans, "
        f"{sum(report['rejected'].values())} more were too slow for their budget"
    )
    table = Table(*columns, title=title)
    for row in report["plans"]:
        if row["decoding"] is None:
            table.add_row(f"{row['budget_ms']:.1f}", "none fits")
            continue
        times = f"{row['p50_ms']:.1f} / {row['p99_ms']:.1f}"
        solved = f"{row['success']}/{row['episodes']}"
        hand = row["by_hand"] and (
            row["by_hand"]["decoding"],
            f"{row['by_hand']['success']}/{row['episodes']}",
        )
        cells = (
            row["decoding"],
            str(row["executed_steps"]),
            row["engine"],
            times,
            solved,
            *(hand or ()),
        )
        table.add_row(f"{row['budget_ms']:.1f}", *cells)
    console.print(table)
