"""`ceed-vla bench`: ratios of a report to its floor, and a run from options to files."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ceed_vla.sim.bench
from ceed_vla import CeedVLAPolicy, load
from ceed_vla.axes import AXES
from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.checkpoints import resolve_checkpoint
from ceed_vla.compiled.engine import CompiledBackbone, compiled
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.decoding.names import named_config
from ceed_vla.errors import ConfigError, MalformedChunkError
from ceed_vla.folders import CONTEXT, EXITS
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.sim.bench import (
    BENCH,
    MOST_LINES,
    PARETO,
    ROWS,
    TABLE,
    TEACHER_ROWS,
    BenchConfig,
    bench,
    markdown,
    pareto,
    rows_of,
    usual_rows,
)
from ceed_vla.sim.bench_engines import engine_tables
from ceed_vla.sim.decoders import parse_decoders
from ceed_vla.sim.engines import CompiledEngine, EdgeEngine, Engine, engines_of
from ceed_vla.sim.evaluate import EvalConfig, evaluate
from ceed_vla.sim.plots import GREY, INK
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from ceed_vla.sim.timing import WARM_UP, measure
from ceed_vla.tokens.fast import FastTokensConfig
from ceed_vla.workers import ClusterConfig
from tests.helpers.tabletop import tabletop_config

needs_depth = pytest.mark.skipif("depth" not in AXES, reason="the axis of depth was deleted")


def ms(value: float) -> dict[str, float]:
    return {"p50": value, "p95": value + 1, "p99": value + 2}


def entry(total: float, success: int, **more: Any) -> dict[str, Any]:
    rates = {
        "success": success,
        "episodes": 10,
        "success_rate": success / 10,
        "success_ci95": [0.1, 0.9],
    }
    times = {
        "total_ms": ms(total),
        "loop_ms": ms(total - 3),
        "prefill_ms": ms(4),
        "decode_ms": ms(total - 4),
    }
    return {
        **rates,
        **times,
        "forwards_mean": 2.0,
        "forwards_p95": 3.0,
        "action_error": 0.0,
        "equal_to_ar": 1,
        "decoding": {"watch": "executed"},
        **more,
    }


REPORT: dict[str, Any] = {
    "block_length": 56,
    "chunk_size": 8,
    "executed_steps": 4,
    "decoders": {
        "ar": entry(60, 9),
        "ar_h": entry(30, 9),
        "cap1": entry(12, 8),
        "cap3": entry(20, 8),
    },
    "timing": {
        "engines": {"ar": "eager", "ar_h": "eager", "cap1": "compiled", "cap3": "eager"},
        "parts": {
            "policy eager": {"process": ms(1), "prefill": ms(5), "block": ms(6), "token": ms(1)},
            "policy compiled": {"prefill": ms(4), "block": ms(6), "token": ms(2)},
            "act": {"total": ms(40)},
        },
    },
}


def test_rows_are_compared_with_the_floor_of_the_faster_engine() -> None:
    rows = rows_of(REPORT)
    assert rows["cap1"]["ratio_to_floor"] == 1.2
    assert (rows["cap1"]["ratio_to_ar_compiled"], rows["cap1"]["ratio_to_ar_h_compiled"]) == (
        5,
        2.5,
    )
    assert rows["cap1"]["total_ms"] == ms(12)
    assert rows["cap1"]["tokens_per_forward"] == 14  # for the 28 executed tokens
    assert rows["ar"]["engine"] == "eager"


def test_every_engine_is_compared_with_its_own_ar_and_floor() -> None:
    parts = dict.fromkeys(("process", "checks", "prefill", "block", "token"), ms(1))
    totals = {
        "ar": {"eager": ms(60), "edge": ms(20)},
        "ceed": {"eager": ms(12), "edge": ms(5)},
        "deer2t1": {"eager": ms(8)},
    }
    timing = {
        "totals": totals,
        "loops": totals | {"ceed": {"eager": ms(11), "edge": ms(4)}},
        "parts": {
            "policy eager": {**parts, "prefill": ms(4), "block": ms(6)},
            "policy edge": {**parts, "prefill": ms(2), "block": ms(2)},
            "act": {"total": ms(40)},
        },
    }
    lines = engine_tables(timing).splitlines()
    assert "| `ceed` | eager | 12.0 / 13.0 / 14.0 | 11.0 / 13.0 | 5.0 | - | 1.20 |" in lines
    assert "| `ceed` | edge | 5.0 / 6.0 / 7.0 | 4.0 / 6.0 | 4.0 | - | 1.25 |" in lines
    assert "| `deer2t1` | eager | 8.0 / 9.0 / 10.0 | 8.0 / 10.0 | 7.5 | - | 0.80 |" in lines
    (floors,) = (line for line in lines if line.startswith("| policy | edge |"))
    assert floors.endswith("| 4.0 |")
    assert not any("act" in line for line in lines)
    del timing["totals"]["ar"]["edge"], timing["totals"]["ceed"]["edge"]
    assert engine_tables(timing) == ""


def test_the_figure_greys_what_another_row_beats() -> None:
    result = {"decoders": rows_of(REPORT), "floor_ms": 10.0}
    times, failures = pareto(result).axes
    labels = times.get_yticklabels()
    assert [label.get_text() for label in labels] == ["cap1", "cap3", "ar_h", "ar"]  # by latency
    assert {label.get_text() for label in labels if label.get_color() == GREY} == {"ar", "cap3"}
    for axes in (times, failures):
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        assert len(dots) == 4
        assert {dot.get_markerfacecolor() for dot in dots} == {INK, "white"}
        assert all(dot.get_xdata()[0] > 0 for dot in dots)  # none that failed is half an episode


def test_the_figure_leaves_out_those_that_fail_most() -> None:
    many = {f"cap{i}": entry(100 - i, 9 if i % 2 else 1) for i in range(1, 62)}
    figure = pareto({"decoders": many, "floor_ms": 10.0})
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == MOST_LINES
    assert names[0] == "cap61"
    assert all(int(name.removeprefix("cap")) % 2 for name in names)
    assert "31 that fail more are left out" in figure.get_suptitle()


@pytest.mark.parametrize("name", f"{ROWS},{TEACHER_ROWS}".split(","))
def test_the_usual_rows_are_known(name: str) -> None:
    parse_decoders(name, has_teacher=True)


ROWS_OF_AXES: dict[str, dict[str, list[str]]] = {  # by kind of exits, after layers 2, 4 and 5
    "depth": {
        "": [],
        "layer": ["depth2_cap2_fresh", "depth4_cap2_fresh", "depth5_cap2_fresh"],
        "coarse": [
            *["depth2_cap2_fresh", "depth4_cap2_fresh", "depth5_cap2_fresh"],
            "deer5t3_conf0.2_cap2",
        ],
        "linear": [
            *["depth2_cap2_fresh", "depth4_cap2_fresh", "depth5_cap2_fresh"],
            *["sure4p0.2_conf0.2_cap2", "sure5p0.2_conf0.2_cap2", "deer5t3_conf0.2_cap2"],
        ],
    },
    "drafts": {
        "": ["ngram8_h"],
        "coarse": ["ngram8_h"],  # exits at layers are read after committed tokens
        "linear": ["ngram8_h", "spec2x4", "spec2x4r2", "del"],
    },
    "programs": {"": ["program0-1-3_cap2"]},
}


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_has_rows_for_what_a_policy_can(axis: str, tmp_path: Path) -> None:
    config = CeedVLAConfig.read(resolve_checkpoint("student"))
    for kind, rows in ROWS_OF_AXES.get(axis, {"": []}).items():
        (tmp_path / EXITS).unlink(missing_ok=True)
        if kind:
            about = {"kind": kind, "depths": "2,4,5"}
            save_file({"weight": torch.zeros(1)}, tmp_path / EXITS, metadata=about)
        assert AXES[axis].bench_rows(config, tmp_path) == rows, kind
        for name in rows:
            assert parse_decoders(name, has_teacher=False) == [name]
    if axis == "context":
        (tmp_path / CONTEXT).touch()
        assert AXES[axis].bench_rows(config, tmp_path) == ["keep24_conf0.2_cap2"]
    if axis == "programs":
        shallow = replace(config, backbone=CompactConfig(layers=2))
        assert AXES[axis].bench_rows(shallow, tmp_path) == []


@needs_depth
def test_decoders_run_in_the_engines_that_they_can_run_in() -> None:
    export: Any = None
    bundles = {"policy": load("student")}
    engines = {
        "eager": Engine(bundles),
        "compiled": CompiledEngine(bundles),
        "edge": EdgeEngine(bundles, {"policy": export}),
    }
    assert engines_of(engines, "policy", named_config("cap1")) == ["eager", "compiled", "edge"]
    assert engines_of(engines, "policy", named_config("deer2t1")) == ["eager"]
    none = {"edge": EdgeEngine(bundles, {})}
    assert engines_of(none, "policy", named_config("ar")) == ["eager"]


def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "pareto.png").write_bytes(b"mine")
    config = BenchConfig(
        policy=CheckpointPath("student"), decoders="ceed", output_dir=str(tmp_path)
    )
    with pytest.raises(ConfigError, match=r"pareto\.png"):
        bench(config)
    assert [file.name for file in tmp_path.iterdir()] == ["pareto.png"]


@needs_depth
@pytest.mark.slow
def test_a_row_that_runs_eagerly_only_is_timed_beside_compiled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ceed_vla.sim.engines.compiled", lambda backbone: compiled(backbone, "eager")
    )
    config = EvalConfig(
        policy=CheckpointPath("student"),
        decoders="ceed,sure2p0.2_conf0.2_cap2",
        engine="compiled",
        episodes=1,
        timing_chunks=2,
        clips=False,
        env=CeedTabletopEnv(task="mixed", episode_length=8),
        output_dir=str(tmp_path / "out"),
    )
    engines = evaluate(config)["timing"]["engines"]
    assert (engines["ceed"], engines["sure2p0.2_conf0.2_cap2"]) == ("compiled", "eager")


@pytest.mark.slow
def test_from_the_options_to_the_files(tmp_path: Path) -> None:
    config = BenchConfig(
        policy=CheckpointPath("student"),
        decoders="cap1",
        episodes=1,
        seed=40_000,
        timing_chunks=2,
        engine="eager",
        output_dir=str(tmp_path / "bench"),
        threads=1,
    )
    result = bench(config)
    stored = json.loads((tmp_path / "bench" / BENCH).read_text())
    assert stored == json.loads(json.dumps(result))
    assert (tmp_path / "bench" / PARETO).stat().st_size > 1000
    assert (tmp_path / "bench" / TABLE).read_text() == markdown(stored)
    for row in stored["decoders"].values():
        assert {
            "total_ms",
            "loop_ms",
            "prefill_ms",
            "decode_ms",
            "ratio_to_ar_compiled",
            "ratio_to_floor",
        } <= row.keys()
    assert stored["decoders"]["ar"]["equal_to_ar"] == stored["decoders"]["ar_h"]["equal_to_ar"] == 1
    assert stored["decoders"]["cap1"]["equal_to_ar"] < 1
    assert stored["timing"]["parts"]["act"]["total"]["p50"] > 0


def test_the_compiled_bundle_shares_its_weights_and_leaves_the_other_alone() -> None:
    bundle = load("student")
    faster = CompiledEngine({"policy": bundle}).bundles["policy"]
    assert faster[0].backbone is not bundle[0].backbone
    mine, theirs = dict(faster[0].named_parameters()), dict(bundle[0].named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    assert not isinstance(bundle[0].backbone, CompiledBackbone)


def test_the_usual_rows_are_those_that_a_policy_can() -> None:
    small = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 32, "stem_channels": [8] * 4}
    uniform = tabletop_config(**small)
    assert usual_rows(uniform) == ROWS.split(",")
    tokens = FastTokensConfig(most_ids=300)
    tokens.fit_chunks(torch.randn(200, 8, 7, generator=torch.Generator().manual_seed(0)))
    policy = CeedVLAPolicy(tabletop_config(action_tokens=tokens, **small)).eval()
    pre, _ = make_ceed_vla_pre_post_processors(policy.config, instructions=["push the red cube"])
    cameras = {camera: torch.rand(1, 3, 96, 96) for camera in policy.config.cameras}
    batch = pre({**cameras, "observation.state": torch.rand(1, 14), "task": "push the red cube"})
    for name in ["ar", "ar_h", *usual_rows(policy.config)]:
        # the weights are random; it only must not raise a ConfigError
        with suppress(MalformedChunkError):
            assert policy.decode(batch, name).tokens.shape == (1, policy.config.block_length)
    with pytest.raises(ConfigError):
        policy.decode(batch, "conf0.2_cap2")


@pytest.mark.parametrize(
    ("changes", "alone"),
    [({}, True), ({"workers": 2}, False), ({"cluster": ClusterConfig("local")}, False)],
)
def test_rows_with_a_deadline_need_a_machine_of_their_own(
    changes: dict[str, Any], alone: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen: list[str] = []

    def noted(config: BenchConfig, folder: Path) -> dict[str, Any]:
        chosen.extend(config.decoders.split(","))
        return {}

    monkeypatch.setattr(ceed_vla.sim.bench, "_bench", noted)
    bench(BenchConfig(CheckpointPath("student"), output_dir=str(tmp_path / "out"), **changes))
    assert any(name.startswith("deadline") for name in chosen) == alone
    assert "ceed" in chosen


def test_a_pause_precedes_every_timed_chunk_and_none_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    monkeypatch.setattr(
        "ceed_vla.sim.timing.time.sleep", lambda seconds: events.append(f"{1e3 * seconds:.0f}")
    )

    class Runner:
        def __init__(self, name: str) -> None:
            self.name = name

        def decode(self, observations: Any, instructions: Any, previous: Any) -> list[Any]:
            events.append(f"{self.name}{observations[0]}{previous[0] or ''}")
            seconds = {"prefill": 0.0, "decode": 0.0}
            warm = f"<{observations[0]}"
            return [SimpleNamespace(seconds=seconds, tokens=None, warm_start=warm)]

    runners: Any = {"a": Runner("a"), "b": Runner("b")}
    episodes: Any = [[(0, ""), (1, "")]]
    samples, _ = measure(runners, {}, episodes)
    assert {len(found) for s in samples.values() for found in (s.total, s.loop)} == {2}
    timed = events[2 * WARM_UP :]
    first, second = timed[:4], timed[4:8]
    for part, chunks in ((first, {"a0", "b0"}), (second, {"a1<0", "b1<0"})):
        assert part[0] == part[2]  # the same pause for all
        assert 10 <= float(part[0]) <= 100
        assert {part[1], part[3]} == chunks
    loops = [timed[8:10], timed[10:]]
    assert sorted(loops) == [["a0", "a1<0"], ["b0", "b1<0"]]
