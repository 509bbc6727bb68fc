"""The evolutionary search of ``ceed-vla tune``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import batched, chain, count
from typing import Any

import numpy as np
from tqdm import tqdm

from ceed_vla.decoding import decoder_ladders, exit_ladders
from ceed_vla.errors import ConfigError
from ceed_vla.sim.decoders import Row
from ceed_vla.sim.engines import engines_of, open_engines, resolved, with_eager
from ceed_vla.sim.env_tasks import task_of
from ceed_vla.sim.environment import Bundle, EnvPool
from ceed_vla.sim.progress import Progress
from ceed_vla.sim.rollout import SHARD, PolicyRunner
from ceed_vla.sim.timing import (
    Observations,
    collect_observations,
    measure,
    percentiles,
)
from ceed_vla.sim.tune_config import PLAY_OFF, TuneConfig
from ceed_vla.sim.tune_plan import NAMED, Plan, Trial
from ceed_vla.workers import Workers

OVER_FLOOR = (1.1, 1.2, 1.5, 2.0)  # default budgets, in multiples of the floor
GUESSES = ("", "mid")
BEST = 4  # plans per budget in the play-off
BEST_BY_HAND = 2  # hand-picked plans per budget in the play-off
OTHER_DECODERS = 0.2  # share of random plans with another decoder than Jacobi
REDRAWS = 4  # redraws for plans that do not fit their budget


class Search:
    """The search of one run; `run` returns all trials that fit the largest budget.

    What it measures is kept in `progress`. A search with the same measurements makes the same
    choices, so an interrupted one continues where it ended.
    """

    def __init__(
        self,
        config: TuneConfig,
        bundle: Bundle,
        pool: EnvPool,
        workers: Workers,
        progress: Progress,
    ) -> None:
        self.config = config
        self.progress = progress
        self.bundle = bundle
        self.pool = pool
        self.workers = workers
        self.random = np.random.default_rng(config.search_seed)
        self.steps = bundle[0].config.chunk_size
        self.usual = min(bundle[0].config.n_action_steps, self.steps)
        bundles = {"policy": bundle}
        paths = {"policy": config.policy.path}
        self.engines = open_engines(
            resolved(config.engine, config), bundles, paths, config.env, config.pin
        )
        self.opened = with_eager(self.engines, bundles)
        self.observed: dict[int, list[Observations]] = {}
        self.floor = progress.measured("floor [ms]", self._floor, float)
        self.budgets = sorted(
            config.budgets_ms or [round(self.floor * factor, 3) for factor in OVER_FLOOR]
        )
        self.trials: list[Trial] = []
        # decoding and executed steps of every plan so far -> its times; None if it does not run
        self.timed: dict[tuple[str, int], Trial | None] = {}
        self.exits = sorted(getattr(bundle[0].backbone, "exits", {}))
        # plans over the budget that they were drawn for
        self.rejected: dict[float, set[tuple[str, int]]] = {b: set() for b in self.budgets}
        self.turns = 0  # how many times plans were timed in turns

    def _floor(self) -> float:
        """Time the prefix and one block forward in the faster engine [ms]."""
        probes = {name: own.parts()["policy"] for name, own in self.engines.items()}
        _, parts = measure({}, probes, self.observations(self.usual))
        found = [
            {name: percentiles(seconds)["p50"] for name, seconds in own.items()}
            for own in parts.values()
        ]
        return round(min(own["prefill"] + own["block"] for own in found), 3)

    def run(self) -> list[Trial]:
        """Run all generations and return their trials."""
        named = [replace(plan, executed_steps=self.usual) for plan in NAMED]
        first = self.admit(named, self.budgets[-1])
        self.halve([*first, *self.populate(lambda budget: self.drawn)], "generation 1")
        for generation in range(1, self.config.generations):
            self.halve(
                self.populate(lambda budget: partial(self.child, self.parents(budget))),
                f"generation {generation + 1}",
            )
        return self.trials

    def populate(self, draw_for: Callable[[float], Callable[[], Plan]]) -> list[Trial]:
        """Draw and time a population of plans, an equal part for every budget.

        A plan over its budget is dropped and drawn again, at most `REDRAWS` times.

        Args:
            draw_for: Budget [ms] -> what draws a plan for it.
        """
        fitting: list[Trial] = []
        shares = np.diff(np.linspace(0, self.config.population, len(self.budgets) + 1).round())
        for budget, share in zip(self.budgets, shares.astype(int), strict=True):
            draw = draw_for(budget)
            own: list[Trial] = []
            for _ in range(1 + REDRAWS):
                own += self.admit([draw() for _ in range(share - len(own))], budget)
            fitting += own
        return fitting

    def observations(self, steps: int) -> list[Observations]:
        """Observations at the replans of episodes that execute `steps` steps of each chunk."""
        if steps not in self.observed:
            driver = PolicyRunner(self.bundle, "jacobi_h", None, steps)
            numbers = count(self.config.seed)
            seeds = ((seed, task_of(self.config.env, seed)) for seed in numbers)
            self.observed[steps] = collect_observations(
                driver, self.pool, seeds, self.config.chunks
            )
        return self.observed[steps]

    def timed_plans(self, plans: Sequence[Plan]) -> list[Trial]:
        """Time every plan in its faster engine; plans with equal executed steps are interleaved."""
        found: list[Trial] = []
        for steps in sorted({plan.executed_steps for plan in plans}):
            found += self._timed_in_turns(
                [plan for plan in plans if plan.executed_steps == steps], steps
            )
        return found

    def _timed_in_turns(self, plans: Sequence[Plan], steps: int) -> list[Trial]:
        """Time plans that all execute `steps` steps, interleaved, in their faster engines."""
        policy = self.bundle[0]
        pairs = {
            f"{plan.decoding} {engine}": (plan, engine)
            for plan in plans
            for engine in engines_of(self.engines, "policy", policy.config.named(plan.decoding))
        }
        self.turns += 1
        key = f"times [ms], turn {self.turns}: {', '.join(pairs)}, {steps} steps"

        def timed() -> dict[str, list[float]]:
            runners = {
                name: self.opened[engine].runner(
                    Row(plan.decoding, "policy", policy.config.named(plan.decoding)), steps
                )
                for name, (plan, engine) in pairs.items()
            }
            samples, _ = measure(runners, {}, self.observations(steps))
            found = {name: percentiles(samples[name].total) for name in pairs}
            return {name: [times["p50"], times["p99"]] for name, times in found.items()}

        def read(found: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
            return {name: (float(found[name][0]), float(found[name][1])) for name in pairs}

        times = self.progress.measured(key, timed, read)
        fastest: dict[Plan, Trial] = {}
        for name, (plan, engine) in pairs.items():
            p50, p99 = times[name]
            if plan not in fastest or p50 < fastest[plan].p50:
                fastest[plan] = Trial(plan, p50, p99, engine)
        return list(fastest.values())

    def runs(self, plan: Plan) -> bool:
        """Whether the policy supports a plan: it may lack the exits, layers or settings for it."""
        key = f"runs: {plan.decoding}, {plan.executed_steps} steps"
        return self.progress.measured(key, partial(self._runs, plan), bool)

    def _runs(self, plan: Plan) -> bool:
        observation, instruction = self.observations(plan.executed_steps)[0][0]
        try:
            runner = PolicyRunner(self.bundle, plan.decoding, None, plan.executed_steps)
            runner.decode([observation], [instruction], [None])
        except ConfigError:
            return False
        return True

    def drawn(self) -> Plan:
        """Draw a random plan on all axes that are registered with a ladder."""
        ladders = exit_ladders()
        steps = int(self.random.integers(min(2, self.steps), self.steps + 1))
        decoders = [name for ladder in decoder_ladders(self.exits).values() for name in ladder]
        other = bool(decoders) and self.random.random() < OTHER_DECODERS
        decoder = str(self.random.choice(decoders)) if other else ""
        if decoder and self.random.random() < 0.5:  # most of these take no exit rule
            return Plan(decoder=decoder, executed_steps=steps)
        signal = str(self.random.choice(["", *ladders]))
        threshold = str(self.random.choice(ladders[signal])) if signal else ""
        cap = int(self.random.integers(0, 5))
        fresh = bool(self.random.random() < 0.5)
        return Plan(
            threshold, cap, fresh, str(self.random.choice(GUESSES, p=(0.85, 0.15))), steps, decoder
        )

    def child(self, parents: Sequence[Plan]) -> Plan:
        """Combine the settings of two parents to a plan, and draw one setting at random."""
        first, second = (parents[int(self.random.integers(len(parents)))] for _ in range(2))
        new = self.drawn()
        names = [field.name for field in fields(Plan)]
        changed = self.random.choice(names)
        genes = {
            n: getattr(new if n == changed else (first, second)[int(self.random.integers(2))], n)
            for n in names
        }
        return Plan(**genes)

    def admit(self, candidates: Sequence[Plan], budget: float) -> list[Trial]:
        """Time the candidates that are new; returns those within the budget [ms] that the policy
        supports and that no budget has admitted yet.
        """
        drawn = {_key(plan): plan for plan in candidates}
        new = {key: plan for key, plan in drawn.items() if key not in self.timed}
        self.timed |= dict.fromkeys(new)
        runs = [plan for plan in new.values() if self.runs(plan)]
        self.timed |= {_key(trial.plan): trial for trial in self.timed_plans(runs)}
        found = {key: trial for key in drawn if (trial := self.timed[key])}
        known = {_key(trial.plan) for trial in self.trials}
        admitted = [t for key, t in found.items() if t.p50 <= budget and key not in known]
        self.rejected[budget] |= {key for key, trial in found.items() if trial.p50 > budget}
        self.trials += admitted
        return admitted

    def halve(self, trials: list[Trial], title: str) -> None:
        """Successive halving of `trials`.

        All run a quarter of the episodes, the best quarter within every budget runs half of them,
        and the best quarter of those runs all.
        """
        left = trials
        for share in (4, 2, 1):
            episodes = -(-self.config.episodes // share)
            for trial in tqdm(
                left, desc=f"{title}, {episodes} episodes", unit="plan", dynamic_ncols=True
            ):
                self.drive(trial, range(self.config.seed, self.config.seed + episodes))
            survivors = {
                id(trial)
                for budget in self.budgets
                for trial in self.best(left, budget, max(1, len(left) // 4))
            }
            left = [trial for trial in left if id(trial) in survivors]

    def best(self, trials: Sequence[Trial], budget: float, count: int) -> list[Trial]:
        """The `count` best within a budget."""
        within = [trial for trial in trials if trial.p50 <= budget]
        return sorted(within, key=lambda trial: (-trial.rate, trial.p50))[:count]

    def parents(self, budget: float) -> list[Plan]:
        """The parents of the next generation's plans for a budget: its best plans."""
        known = [trial for trial in self.trials if trial.plan.decoder != "ceed"]
        found = [trial.plan for trial in self.best(known, budget, 4)]
        return found or [self.drawn() for _ in range(4)]

    def final(self) -> list[tuple[float, Trial | None, Trial | None]]:
        """Measure the chosen and the best hand-picked plan of every budget on fresh seeds."""
        episodes = PLAY_OFF * self.config.episodes
        playing, named = self._play_off(episodes)
        chosen = [
            [next(iter(self.best(trials, budget, 1)), None) for trials in (playing, named)]
            for budget in self.budgets
        ]
        fresh = {t.plan: replace(t, solved={}, layers=[]) for pair in chosen for t in pair if t}
        first = self.config.seed + episodes
        for trial in tqdm(fresh.values(), desc="fresh seeds", unit="plan", dynamic_ncols=True):
            self.drive(trial, range(first, first + episodes))
        pairs = [[trial and fresh[trial.plan] for trial in pair] for pair in chosen]
        return [
            (budget, found, hand) for budget, (found, hand) in zip(self.budgets, pairs, strict=True)
        ]

    def _play_off(self, episodes: int) -> tuple[list[Trial], list[Trial]]:
        """Run `episodes` episodes with the best trials of every budget, and time them again.

        Returns:
            All trials of the play-off, and the hand-picked ones among them.
        """
        names = {plan.decoding for plan in NAMED}
        by_hand = [
            trial
            for trial in self.trials
            if trial.plan.decoding in names and trial.plan.executed_steps == self.usual
        ]
        playing: dict[Plan, Trial] = {}
        for budget in self.budgets:
            best = self.best(self.trials, budget, BEST)
            best += self.best(by_hand, budget, BEST_BY_HAND)
            playing |= {trial.plan: trial for trial in best}
        for trial in tqdm(
            playing.values(), desc=f"play-off, {episodes} episodes", unit="plan", dynamic_ncols=True
        ):
            self.drive(trial, range(self.config.seed, self.config.seed + episodes))
        # interleaved, because a budget may separate plans of nearly equal latency
        for again in self.timed_plans(list(playing)):
            known = playing[again.plan]
            known.p50 = again.p50
            known.p99 = again.p99
            known.engine = again.engine
        return list(playing.values()), [trial for trial in by_hand if trial.plan in playing]

    def drive(self, trial: Trial, seeds: range) -> None:
        """Run the missing episodes of `seeds`."""
        missing = [seed for seed in seeds if seed not in trial.solved]
        if not missing:
            return
        plan, steps = trial.plan, trial.plan.executed_steps
        key = f"episodes: {plan.decoding}, {steps} steps, {len(missing)} from seed {missing[0]}"

        def driven() -> dict[str, Any]:
            episodes = [(seed, task_of(self.config.env, seed)) for seed in missing]
            shards = ((plan.decoding, steps, shard) for shard in batched(episodes, SHARD))
            found = list(chain.from_iterable(self.workers.map(shards)))
            layers = [np.add(r.block_layers, r.prefix_layers).tolist() for r in found]
            return {
                "solved": {result.seed: result.success for result in found},
                "layers": list(chain.from_iterable(layers)),
            }

        def read(found: dict[str, Any]) -> tuple[dict[int, bool], list[int]]:
            solved = {int(seed): bool(success) for seed, success in found["solved"].items()}
            if sorted(solved) != missing:
                raise ValueError(key)
            return solved, [int(layers) for layers in found["layers"]]

        solved, layers = self.progress.measured(key, driven, read)
        trial.solved |= solved
        trial.layers += layers


def _key(plan: Plan) -> tuple[str, int]:
    """What distinguishes a plan from others."""
    return plan.decoding, plan.executed_steps
