"""``ceed-vla tune``: the plan with the most success within a budget of milliseconds a chunk.

A plan is a decoding (decoder, signal and threshold of the exit, cap, tail, guess), the engine in
which it is faster, and the steps that are executed of a chunk. The search is evolutionary, after
EEEA-Net (arXiv 2108.06156): a candidate is timed first; for one over the largest budget another is
drawn, before any episode is run. Those that fit run validation episodes by successive halving: the
best quarter of every budget gets as many episodes again, and so on. At the end the best of every
budget and the best that a hand would name play off over four times the episodes, and are timed
again in turns. What is chosen of both drives as many of fresh seeds: the search's own numbers
flatter the winner.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ceed_vla.checkpoints import load, resolve_checkpoint, save, weights_hash
from ceed_vla.decoding import decoder_ladders, exit_ladders
from ceed_vla.errors import ConfigError
from ceed_vla.fields import COUNTS, SEEDS, chosen, ranged
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
from ceed_vla.sim.environment import (
    VALIDATION_SEED,
    Bundle,
    EnvPool,
    check_choice,
    flags,
    joined,
    turns,
)
from ceed_vla.sim.plots import save_figure
from ceed_vla.sim.rollout import SHARD, PolicyRunner, episode_runner, success_entry
from ceed_vla.sim.settings import DrivenConfig
from ceed_vla.sim.summary import hardware
from ceed_vla.sim.timing import (
    ENGINES,
    Observations,
    bare_parts,
    collect_observations,
    engines_of,
    in_engine,
    measure,
    percentiles,
)
from ceed_vla.workers import MOST, Workers

PLANS = "plans.json"
OVER_FLOOR = (1.2, 1.5, 2.0, 3.0)  # budgets, where none is given
GUESSES = ("", "mid")
PLAY_OFF = 4  # times the episodes of a generation
BEST, BEST_BY_HAND = 4, 2  # of every budget that play off
OTHER_DECODERS = 0.2  # share of random plans with a decoder that is not Jacobi's
REDRAWS = 4  # times that plans are drawn for those that did not fit


@dataclass
class TuneConfig(DrivenConfig):
    """Options of ``ceed-vla tune``.

    Attributes:
        output_dir: Folder for plans.json, pareto.png and, with `save`, the folder `checkpoint`.
        save: Write a copy of the policy that executes the steps of the largest budget's plan and
            knows it as plan, and as plan<MS> those of the other budgets that execute as many.
        budgets_ms: Milliseconds a chunk (p50); empty for 1.2, 1.5, 2 and 3 times the floor,
            measured first.
        population: Plans a generation.
        generations: Generations.
        episodes: Episodes of the plans that are left at the end of a generation; all plans run a
            quarter of them, those that play off and the final comparison four times as many.
        chunks: Chunks on which a plan is timed.
        seed: First seed of the search's episodes; the final comparison has those that follow.
        search_seed: Seed of the search.
        engine: Of the timing: eager, compiled, or fastest: each plan in its faster one, which
            plans.json names.
        workers: Processes that share the episodes; timing has the machine to itself.
    """

    output_dir: str = "outputs/tune"
    save: bool = False
    budgets_ms: list[float] = ranged([], "(0, 1e6]")
    population: int = ranged(16, "[4, 1000]")
    generations: int = ranged(3, "[1, 1000]")
    episodes: int = ranged(80, COUNTS)
    chunks: int = ranged(40, "[2, 100000]")
    seed: int = ranged(VALIDATION_SEED + 2000, SEEDS)
    search_seed: int = ranged(0, SEEDS)
    engine: str = chosen("eager", ENGINES)
    workers: int = ranged(1, MOST)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.seed, 2 * PLAY_OFF * self.episodes)


@dataclass(frozen=True)
class Plan:
    """One point on all axes."""

    signal: str = ""  # exit rule with its threshold, such as "conf0.2"; "" for none
    cap: int = 0  # most forwards; 0 for none
    fresh: bool = False  # whether the tail is computed with every iteration
    guess: str = ""  # "mid", or "" for the previous chunk
    executed_steps: int = 4  # steps executed of a chunk
    decoder: str = ""  # "" for Jacobi's; alone, "ceed" is the checkpoint's decoding

    @property
    def decoding(self) -> str:
        """Its name."""
        if self.decoder == "ceed":
            return "ceed"
        rules = [part for part in (self.signal, f"cap{self.cap}" if self.cap else "") if part]
        first = [self.decoder] if self.decoder else [] if rules else ["jacobi"]
        return "_".join(
            [*first, *(rules or ["h"]), *["fresh"] * self.fresh, *filter(None, [self.guess])]
        )


# What a hand would name; the first generation has them.
NAMED = (
    Plan(cap=1),
    Plan(cap=2),
    Plan(cap=3),
    Plan(cap=4),
    Plan(),
    Plan("conf0.2", 2),
    Plan("conf0.2", 2, fresh=True),
    Plan(decoder="ceed"),
)


@dataclass
class Trial:
    """A plan, how long it takes [ms] in which engine, the episodes it solved, by seed, and the
    layers of its chunks.
    """

    plan: Plan
    p50: float
    p99: float
    engine: str = "eager"
    solved: dict[int, bool] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Share of episodes that were solved, shrunk towards a half by one episode each way."""
        return (sum(self.solved.values()) + 1) / (len(self.solved) + 2)

    def entry(self) -> dict[str, Any]:
        """For plans.json."""
        return {
            "decoding": self.plan.decoding,
            "executed_steps": self.plan.executed_steps,
            "engine": self.engine,
            "p50_ms": self.p50,
            "p99_ms": self.p99,
            "layers_mean": round(float(np.mean(self.layers)), 3) if self.layers else None,
            **success_entry(self.solved.values()),
        }


class Search:
    """The search of one run; `run` returns all trials that fit the largest budget."""

    def __init__(self, config: TuneConfig, bundle: Bundle, pool: EnvPool, workers: Workers) -> None:
        self.config = config
        self.bundle = bundle
        self.pool = pool
        self.workers = workers
        self.random = np.random.default_rng(config.search_seed)
        self.tasks = turns(config.env)
        self.steps = bundle[0].config.chunk_size
        self.usual = min(bundle[0].config.n_action_steps, self.steps)
        engines = ENGINES[:2] if config.engine == "fastest" else (config.engine,)
        self.timed = {engine: in_engine(bundle, engine) for engine in engines}
        self.observed: dict[int, list[Observations]] = {}
        probes = {engine: bare_parts(timed) for engine, timed in self.timed.items()}
        _, parts = measure({}, probes, self.observations(self.usual))
        found = [
            {name: percentiles(seconds)["p50"] for name, seconds in own.items()}
            for own in parts.values()
        ]
        self.floor = round(min(own["prefill"] + own["block"] for own in found), 3)
        self.budgets = sorted(
            config.budgets_ms or [round(self.floor * factor, 3) for factor in OVER_FLOOR]
        )
        self.trials: list[Trial] = []
        self.seen: set[tuple[str, int]] = set()
        self.exits = sorted(getattr(bundle[0].backbone, "exits", {}))
        self.rejected = 0

    def run(self) -> list[Trial]:
        """All generations."""
        named = [replace(plan, executed_steps=self.usual) for plan in NAMED]
        self.halve([*self.admit(named), *self.populate(self.drawn)], "generation 1")
        for generation in range(1, self.config.generations):
            self.halve(
                self.populate(partial(self.child, self.parents())), f"generation {generation + 1}"
            )
        return self.trials

    def populate(self, draw: Callable[[], Plan]) -> list[Trial]:
        """A population of plans within the largest budget: for those that do not fit others are
        drawn, for a while.
        """
        fitting: list[Trial] = []
        for _ in range(1 + REDRAWS):
            fitting += self.admit([draw() for _ in range(self.config.population - len(fitting))])
        return fitting

    def observations(self, steps: int) -> list[Observations]:
        """Observations at the replans of episodes that execute so many steps."""
        if steps not in self.observed:
            driver = PolicyRunner(self.bundle, "jacobi_h", None, steps)
            seeds = ((self.config.seed + i, self.tasks[i % len(self.tasks)]) for i in range(10**6))
            self.observed[steps] = collect_observations(
                driver, self.pool, seeds, self.config.chunks
            )
        return self.observed[steps]

    def timed_plans(self, plans: Sequence[Plan]) -> list[Trial]:
        """Every plan, timed in its faster engine; those that execute equally many steps take
        turns.
        """
        found: list[Trial] = []
        for steps in sorted({plan.executed_steps for plan in plans}):
            pairs = {
                f"{plan.decoding} {engine}": (plan, engine)
                for plan in plans
                if plan.executed_steps == steps
                for engine in engines_of(
                    self.bundle[0].config.named(plan.decoding), tuple(self.timed)
                )
            }
            bundles = {"eager": self.bundle, **self.timed}
            runners = {
                name: PolicyRunner(
                    bundles[engine], plan.decoding, torch.Generator().manual_seed(0), steps
                )
                for name, (plan, engine) in pairs.items()
            }
            samples, _ = measure(runners, {}, self.observations(steps))
            fastest: dict[Plan, Trial] = {}
            for name, (plan, engine) in pairs.items():
                times = percentiles(samples[name].total)
                if plan not in fastest or times["p50"] < fastest[plan].p50:
                    fastest[plan] = Trial(plan, times["p50"], times["p99"], engine)
            found += fastest.values()
        return found

    def runs(self, plan: Plan) -> bool:
        """Whether this policy can decode so: it may have no exits or fewer layers, or the decoder
        other settings.
        """
        observation, instruction = self.observations(plan.executed_steps)[0][0]
        try:
            runner = PolicyRunner(self.bundle, plan.decoding, None, plan.executed_steps)
            runner.decode([observation], [instruction], [None])
        except ConfigError:
            return False
        return True

    def drawn(self) -> Plan:
        """A random plan, on all axes that are registered with a ladder."""
        ladders = exit_ladders()
        steps = int(self.random.integers(min(2, self.steps), self.steps + 1))
        decoders = [name for ladder in decoder_ladders(self.exits).values() for name in ladder]
        other = bool(decoders) and self.random.random() < OTHER_DECODERS
        decoder = str(self.random.choice(decoders)) if other else ""
        if decoder and self.random.random() < 0.5:  # most of them take no exit rule
            return Plan(decoder=decoder, executed_steps=steps)
        signal = str(self.random.choice(["", *ladders]))
        threshold = str(self.random.choice(ladders[signal])) if signal else ""
        cap = int(self.random.integers(0, 5))
        fresh = bool(self.random.random() < 0.5)
        return Plan(
            threshold, cap, fresh, str(self.random.choice(GUESSES, p=(0.85, 0.15))), steps, decoder
        )

    def child(self, parents: Sequence[Plan]) -> Plan:
        """A plan whose settings come from two parents, one of them drawn anew."""
        first, second = (parents[int(self.random.integers(len(parents)))] for _ in range(2))
        new = self.drawn()
        names = [field.name for field in fields(Plan)]
        changed = self.random.choice(names)
        genes = {
            n: getattr(new if n == changed else (first, second)[int(self.random.integers(2))], n)
            for n in names
        }
        return Plan(**genes)

    def admit(self, candidates: Sequence[Plan]) -> list[Trial]:
        """Time the candidates that are new and run, and drop those over the largest budget."""
        new = {(plan.decoding, plan.executed_steps): plan for plan in candidates}
        new = {key: plan for key, plan in new.items() if key not in self.seen}
        self.seen |= new.keys()
        new = {key: plan for key, plan in new.items() if self.runs(plan)}
        times = self.timed_plans(list(new.values()))
        admitted = [trial for trial in times if trial.p50 <= self.budgets[-1]]
        self.rejected += len(times) - len(admitted)
        self.trials += admitted
        return admitted

    def halve(self, trials: list[Trial], title: str) -> None:
        """Successive halving: a quarter of the episodes for all, then twice as many for the best of
        every budget.
        """
        left = trials
        for share in (4, 2, 1):
            episodes = -(-self.config.episodes // share)
            for trial in tqdm(
                left, desc=f"{title}, {episodes} episodes", unit="plan", dynamic_ncols=True
            ):
                self.drive(trial, range(self.config.seed, self.config.seed + episodes))
            kept = {
                id(trial)
                for budget in self.budgets
                for trial in self.best(left, budget, max(1, len(left) // 4))
            }
            left = [trial for trial in left if id(trial) in kept]

    def best(self, trials: Sequence[Trial], budget: float, count: int) -> list[Trial]:
        """The `count` best within a budget."""
        within = [trial for trial in trials if trial.p50 <= budget]
        return sorted(within, key=lambda trial: (-trial.rate, trial.p50))[:count]

    def parents(self) -> list[Plan]:
        """The plans that the next generation comes from: the best of every budget."""
        known = [trial for trial in self.trials if trial.plan.decoder != "ceed"]
        found = [trial.plan for budget in self.budgets for trial in self.best(known, budget, 4)]
        return found or [self.drawn() for _ in range(4)]

    def final(self) -> list[tuple[float, Trial | None, Trial | None]]:
        """For every budget what the search chose and the best of `NAMED`, timed again together, on
        fresh seeds.
        """
        names = {plan.decoding for plan in NAMED}
        seed = self.config.seed
        episodes = PLAY_OFF * self.config.episodes
        by_hand = [
            t
            for t in self.trials
            if t.plan.decoding in names and t.plan.executed_steps == self.usual
        ]
        playing: dict[Plan, Trial] = {}
        for budget in self.budgets:
            best = (
                *self.best(self.trials, budget, BEST),
                *self.best(by_hand, budget, BEST_BY_HAND),
            )
            playing |= {trial.plan: trial for trial in best}
        for trial in tqdm(
            playing.values(), desc=f"play-off, {episodes} episodes", unit="plan", dynamic_ncols=True
        ):
            self.drive(trial, range(seed, seed + episodes))
        # in turns, as a budget cuts between neighbours
        for again in self.timed_plans(list(playing)):
            known = playing[again.plan]
            known.p50 = again.p50
            known.p99 = again.p99
            known.engine = again.engine
        named = [trial for trial in by_hand if trial.plan in playing]
        chosen = [
            [
                next(iter(self.best(trials, budget, 1)), None)
                for trials in (list(playing.values()), named)
            ]
            for budget in self.budgets
        ]
        fresh = {t.plan: replace(t, solved={}, layers=[]) for pair in chosen for t in pair if t}
        for trial in tqdm(fresh.values(), desc="fresh seeds", unit="plan", dynamic_ncols=True):
            self.drive(trial, range(seed + episodes, seed + 2 * episodes))
        pairs = [[trial and fresh[trial.plan] for trial in pair] for pair in chosen]
        return [
            (budget, found, hand) for budget, (found, hand) in zip(self.budgets, pairs, strict=True)
        ]

    def drive(self, trial: Trial, seeds: range) -> None:
        """Run the episodes that are missing of `seeds`."""
        missing = [seed for seed in seeds if seed not in trial.solved]
        episodes = [
            (seed, self.tasks[(seed - self.config.seed) % len(self.tasks)]) for seed in missing
        ]
        plan = trial.plan
        for found in self.workers.map(
            (plan.decoding, plan.executed_steps, shard) for shard in batched(episodes, SHARD)
        ):
            trial.solved |= {result.seed: result.success for result in found}
            for result in found:
                trial.layers += np.add(result.block_layers, result.prefix_layers).tolist()


def tune(config: TuneConfig) -> dict[str, Any]:
    """Search, write plans.json and the plot, and return plans.json.

    Raises:
        ConfigError: An option that cannot work, or budgets that no plan fits.
        CheckpointError: A checkpoint that cannot be loaded.
    """
    inputs = [resolve_checkpoint(config.policy.given())]
    part = CHECKPOINT if config.save else ""
    claim = ("output_dir", config.output_dir, (PLANS, PARETO), (PLANS,), part, inputs)
    with claimed_folder(*claim) as folder:
        return _tune(config, folder)


def _tune(config: TuneConfig, folder: Path) -> dict[str, Any]:
    """As `tune`, into a folder of its own."""
    config.limit_threads()
    policy, pre, post = load(config.policy.given())
    policy.requires_grad_(False)  # nor is any weight saved as trained
    with (
        EnvPool(SHARD, config.env, config.instruction) as pool,
        Workers(
            config.workers, episode_runner, config.policy.path, config.env, config.instruction
        ) as workers,
    ):
        search = Search(config, joined((policy, pre, post), config.env), pool, workers)
        trials = search.run()
        final = search.final()
    report: dict[str, Any] = {
        "program": MADE_BY,
        "policy": {"path": config.policy.path, "sha256": weights_hash(config.policy.path)},
        "engine": config.engine,
        "hardware": hardware(str(policy.config.device)),
        "floor_ms": search.floor,
        "env": flags(config.env),
        "seeds": {
            "first": config.seed,
            "count": config.episodes,
            "fresh": config.seed + PLAY_OFF * config.episodes,
        },
        "tried": len(trials),
        "rejected": search.rejected,
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
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(
        _figure([t for t in trials if len(t.solved) >= config.episodes], search.floor),
        folder / PARETO,
    )
    if not config.save:  # a checkpoint of an earlier search stays, and stays ours
        report[WRITTEN] = written_before(folder / PLANS)
    write_text(folder / PLANS, json.dumps(report, indent=2))
    if not any(found for _, found, _ in final):
        raise ConfigError(
            f"No plan fits {search.budgets} ms, floor {search.floor} ({PLANS}); raise --budgets_ms."
        )
    if config.save:
        found = {f"plan{plain(budget)}": trial.plan for budget, trial, _ in final if trial}
        found["plan"] = list(found.values())[-1]
        before = policy.config.n_action_steps
        steps = found["plan"].executed_steps
        policy.config.n_action_steps = steps
        # proven of other executed steps
        stale = ("plan",) if steps == before else ("plan", "risk", "learned")
        own = {name: plan.decoding for name, plan in found.items() if plan.executed_steps == steps}
        policy.config.forget(*stale, new=own)
        save(folder / CHECKPOINT, policy, pre, post)
        report[WRITTEN] = hashes(folder, CHECKPOINT)
        write_text(folder / PLANS, json.dumps(report, indent=2))
    _print(report, console := default_console())
    console.print(f"Written: {folder / PLANS}, {folder / PARETO}", soft_wrap=True, highlight=False)
    return report


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
        f"floor {report['floor_ms']:.1f} ms, {report['tried']} plans, {report['rejected']} too slow"
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
