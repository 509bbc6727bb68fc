"""`ceed-vla tune`: names of plans, rejection of slow ones, successive halving, a complete run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ceed_vla.sim.tune_search
from ceed_vla import load
from ceed_vla.decoding import decoder_ladders, exit_ladders, named_config
from ceed_vla.errors import ConfigError
from ceed_vla.report.command import write_page
from ceed_vla.sim.engines import Engine
from ceed_vla.sim.evaluate import EvalConfig, evaluate
from ceed_vla.sim.progress import MEASURED, Progress
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tune import TuneConfig, tune
from ceed_vla.sim.tune_plan import NAMED, Plan, Trial
from ceed_vla.sim.tune_search import Search


class AnyEngine(Engine):
    """Runs every plan, with a runner that decodes nothing."""

    def runner(self, row: Any, executed_steps: int | None) -> Any:
        return SimpleNamespace(decode=lambda *_: None)


@pytest.fixture
def search(tmp_path: Path) -> Search:
    """A search without policy and environment."""
    found = Search.__new__(Search)
    found.progress, found.turns = Progress(tmp_path / "search", {}, False), 0
    found.config = TuneConfig(population=8, episodes=16, generations=2)
    found.random, found.steps, found.usual = np.random.default_rng(0), 8, 4
    found.bundle = (SimpleNamespace(config=SimpleNamespace(named=named_config)), None, None)  # type: ignore[assignment]
    found.pool, found.exits = None, [2, 3]  # type: ignore[assignment]
    found.engines = {"eager": AnyEngine({})}
    found.opened = found.engines
    found.budgets, found.trials, found.timed = [10.0, 20.0], [], {}
    found.rejected = {budget: set() for budget in found.budgets}
    found.observed = {steps: [[({}, "go")]] for steps in range(1, 9)}
    return found


def test_every_plan_has_a_name_that_decodes_so(search: Search) -> None:
    search.steps = 1
    assert {search.drawn().executed_steps for _ in range(20)} == {1}
    search.steps = 8
    plans = [search.drawn() for _ in range(200)]
    for plan in [*plans, *(search.child(plans) for _ in range(200))]:
        config = named_config(plan.decoding)
        assert config.method == (plan.decoder or "jacobi")
        assert config.max_iterations == (plan.cap or None)
        assert (config.tail == "fresh") == plan.fresh
        assert config.guess == (plan.guess or "previous")
        assert config.watch == "executed"
        assert 2 <= plan.executed_steps <= 8
    assert len({plan.decoding for plan in plans}) > 50
    signals, names = {plan.signal for plan in plans}, {plan.decoder for plan in plans}
    for ladder in exit_ladders().values():  # every registered axis is found
        assert set(ladder) & signals
    assert "" in names
    ladders = decoder_ladders([2, 3])
    assert {"deer3", "depth2", "spec2", "del", "keep"} < ladders.keys()
    assert names <= {"", *(name for ladder in ladders.values() for name in ladder)}
    assert len(names) > len(ladders)
    # all axes at once
    assert any(plan.decoder.startswith("deer") and plan.signal and plan.cap for plan in plans)
    names = [plan.decoding for plan in NAMED]
    assert names == [
        "cap1",
        "cap2",
        "cap3",
        "cap4",
        "jacobi_h",
        "conf0.2_cap2",
        "conf0.2_cap2_fresh",
        "ceed",
    ]


def test_slow_plans_run_no_episode_and_the_better_half_runs_on(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(runners: dict[str, Any], probes: Any, observations: Any) -> Any:
        slow = {
            name: 0.05 if name.startswith("cap4") or name == "cap2 eager" else 0.008
            for name in runners
        }
        return {name: SimpleNamespace(total=[slow[name]] * 3) for name in runners}, {}

    driven: list[tuple[str, int]] = []

    def drive(trial: Trial, seeds: range) -> None:
        driven.append((trial.plan.decoding, len(seeds)))
        trial.solved |= dict.fromkeys(seeds, trial.plan.cap == 2)

    monkeypatch.setattr(ceed_vla.sim.tune_search, "measure", measure)
    monkeypatch.setattr(
        ceed_vla.sim.tune_search, "PolicyRunner", lambda *_: SimpleNamespace(decode=lambda *_: None)
    )
    monkeypatch.setattr(search, "drive", drive)
    plans = [Plan(cap=cap) for cap in (1, 2, 3, 4)]
    search.engines["compiled"] = AnyEngine({})
    fitting = search.admit(plans, 20.0)
    # each in its faster engine
    assert [trial.engine for trial in fitting] == [
        "eager",
        "compiled",
        "eager",
    ]
    assert [len(plans) for plans in search.rejected.values()] == [0, 1]
    search.halve(fitting, "test")
    assert driven == [("cap1", 4), ("cap2", 4), ("cap3", 4), ("cap2", 8), ("cap2", 16)]
    assert search.admit(plans, 20.0) == []  # all are known, including the slow one
    assert [len(plans) for plans in search.rejected.values()] == [0, 1]
    assert search.best(fitting, 10, 1)[0].plan.cap == 2
    assert search.best(fitting, 5, 1) == []
    assert {plan.cap for plan in search.parents(20.0)} == {1, 2, 3}
    driven.clear()
    (_, found, hand), _ = search.final()
    assert found is not None
    assert found.plan == Plan(cap=2) == (hand and hand.plan)
    assert sorted(driven[:3]) == [("cap1", 64), ("cap2", 64), ("cap3", 64)]  # the play-off
    assert driven[3:] == [("cap2", 64)]  # fresh seeds
    assert sorted(found.solved) == list(range(search.config.seed + 64, search.config.seed + 128))


def test_a_plan_that_the_policy_cannot_decode_is_left_out(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runner:
        def __init__(self, _: Any, decoding: str, *__: Any) -> None:
            self.decoding = decoding

        def decode(self, *_: Any) -> None:
            if self.decoding.startswith("spec"):
                raise ConfigError("fewer layers")

    monkeypatch.setattr(ceed_vla.sim.tune_search, "PolicyRunner", Runner)
    search.observed = {4: [[({}, "go")]]}
    assert search.runs(Plan(decoder="ngram4"))
    assert not search.runs(Plan(decoder="spec2x4"))


def test_others_are_drawn_for_plans_that_do_not_fit(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(runners: dict[str, Any], probes: Any, observations: Any) -> Any:
        return {
            n: SimpleNamespace(total=[0.05 if n.startswith("cap4") else 0.008]) for n in runners
        }, {}

    monkeypatch.setattr(ceed_vla.sim.tune_search, "measure", measure)
    monkeypatch.setattr(
        ceed_vla.sim.tune_search, "PolicyRunner", lambda *_: SimpleNamespace(decode=lambda *_: None)
    )
    drawn = (
        [Plan(cap=4, executed_steps=steps) for steps in range(1, 9)]
        + [Plan(cap=2)] * 3
        + [Plan(cap=3)] * 99
    )
    fitting = search.populate(lambda budget: lambda: drawn.pop(0))
    # eight were too slow for the first budget; known plans count once
    assert [trial.plan.cap for trial in fitting] == [2, 3]
    assert [len(plans) for plans in search.rejected.values()] == [8, 0]
    # four plans for each budget; redraws replace those that were too slow or known
    assert len(drawn) == 110 - (4 + 4 + 4 + 2 + 2) - 5 * 4


def test_a_plan_that_one_budget_rejects_may_fit_another(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def measure(runners: dict[str, Any], probes: Any, observations: Any) -> Any:
        timed.extend(runners)
        return {name: SimpleNamespace(total=[0.015]) for name in runners}, {}

    monkeypatch.setattr(ceed_vla.sim.tune_search, "measure", measure)
    monkeypatch.setattr(
        ceed_vla.sim.tune_search, "PolicyRunner", lambda *_: SimpleNamespace(decode=lambda *_: None)
    )
    assert search.admit([Plan(cap=2)], 10.0) == []
    assert [trial.plan.cap for trial in search.admit([Plan(cap=2)], 20.0)] == [2]
    assert len(timed) == 1
    assert [len(plans) for plans in search.rejected.values()] == [1, 0]


def test_options_that_cannot_work() -> None:
    for change in ({"budgets_ms": [0.0]}, {"population": 1}, {"engine": "graphs"}):
        with pytest.raises(ConfigError):
            TuneConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"seeds are 42000 to 50007; .* on seeds 40000 to 49999 only"
    ):
        TuneConfig(episodes=1001)
    with pytest.raises(ConfigError, match=r"policy\.path"):
        tune(TuneConfig())


@pytest.mark.slow
def test_an_interrupted_search_resumes_after_its_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(**changed: Any) -> TuneConfig:
        given: dict[str, Any] = {"population": 4, "generations": 1, "episodes": 4, "chunks": 2}
        given |= {"threads": 1, "budgets_ms": [1e5], **changed}
        path, output = CheckpointPath("student"), str(tmp_path / "tuned")
        return TuneConfig(policy=path, output_dir=output, **given)

    made: list[str] = []
    measured, most = Progress.measured, 12

    def counted(self: Progress, key: str, measure: Any, read: Any) -> Any:
        def measure_now() -> Any:
            if len(made) == most:
                raise KeyboardInterrupt
            made.append(key)
            return measure()

        return measured(self, key, measure_now, read)

    monkeypatch.setattr(Progress, "measured", counted)
    with pytest.raises(KeyboardInterrupt):
        tune(options())
    assert any(key.startswith("times") for key in made)
    with pytest.raises(ConfigError, match=r"interrupted run \(12 measurements\)"):
        tune(options())
    with pytest.raises(ConfigError, match="was measured with other chunks, search_seed;"):
        tune(options(chunks=3, search_seed=1, resume=True))
    first = list(made)
    made.clear()
    most = 1000
    report = tune(options(resume=True))
    assert made
    assert not set(first) & set(made)
    assert report["plans"][0]["episodes"] == 16
    assert not (tmp_path / "tuned" / MEASURED).exists()


@pytest.mark.slow
def test_from_the_shipped_student_to_a_plan(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "population": 4,
        "generations": 2,
        "episodes": 4,
        "chunks": 3,
        "threads": 1,
    }
    config = TuneConfig(
        policy=CheckpointPath("student"), output_dir=str(tmp_path / "tuned"), save=True, **options
    )
    config.budgets_ms = [0.01, 1e5]
    report = tune(config)
    assert report == json.loads((tmp_path / "tuned" / "plans.json").read_text())
    nothing, best = report["plans"]
    assert nothing["decoding"] is None
    assert best["episodes"] == 16
    assert best["layers_mean"] >= 8  # four for the prefix, and a forward
    assert report["tried"] >= 8
    assert best["by_hand"]["episodes"] == 16
    assert report["floor_ms"] > 0
    page = write_page([tmp_path / "tuned"], tmp_path / "report.html").read_text()
    assert f"The best plan of each budget on fresh seeds: 100000 ms: {best['decoding']}." in page
    policy, _, _ = load(tmp_path / "tuned" / "checkpoint")
    assert policy.config.n_action_steps == best["executed_steps"]
    assert (
        policy.decoding_config("plan")
        == policy.decoding_config("plan100000")
        == named_config(best["decoding"], policy.config.decoding)
    )
    checkpoint, out = CheckpointPath(str(tmp_path / "tuned" / "checkpoint")), str(tmp_path / "eval")
    evaluated = evaluate(
        EvalConfig(
            policy=checkpoint,
            decoders="plan",
            output_dir=out,
            seed=40_000,
            episodes=1,
            clips=False,
            timing_chunks=0,
        )
    )
    assert evaluated["executed_steps"] == best["executed_steps"]
    assert (
        evaluated["decoders"]["plan"]["decoding"]["method"] == policy.decoding_config("plan").method
    )
    with pytest.raises(ConfigError, match="No plan fits"):
        tune(
            TuneConfig(
                policy=CheckpointPath("student"),
                output_dir=str(tmp_path / "none"),
                budgets_ms=[0.01],
                **options,
            )
        )
    rejected = json.loads((tmp_path / "none" / "plans.json").read_text())["rejected"]
    assert rejected.keys() == {"0.01"}
    assert rejected["0.01"] > 0
