"""`ceed-vla eval` and `show` from the options to the files, with a tiny untrained policy."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import draccus
import pytest
import torch
from rich.console import Console

import sim.evaluate as evaluate_module
from ceed_vla.checkpoints import save
from ceed_vla.configuration_ceed_vla import tabletop_config
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from sim.decoders import resolve_rows
from sim.demo import DECODERS, DemoConfig
from sim.evaluate import CheckpointPath, EvalConfig, check, evaluate
from sim.show import ShowConfig, show
from sim.tabletop.tasks import vocabulary


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = tabletop_config(
        width=16, layers=1, heads=2, mlp_width=16, stem_channels=[4, 4, 4, 4], chunk_size=4, n_action_steps=2,
        decoding=DecodingConfig(method="jacobi", max_iterations=2, executed_steps=2),
    )  # fmt: skip
    stats = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    pre, post = make_ceed_vla_pre_post_processors(config, stats, instructions=vocabulary())
    return save(tmp_path_factory.mktemp("policy"), CeedVLAPolicy(config), pre, post)


def options(checkpoint: Path, folder: Path, **changes: object) -> EvalConfig:
    values: dict[str, object] = {
        "policy": CheckpointPath(str(checkpoint)),
        "decoders": "ar,jacobi,ceed",
        "episodes": 2,
        "executed_steps": 2,
        "max_episode_steps": 8,  # an untrained policy solves nothing anyway
        "timing_chunks": 4,
        "clips": False,
        "output_dir": str(folder),
    }
    return EvalConfig(**{**values, **changes})  # type: ignore[arg-type]


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


def test_options_are_parsed_from_the_command_line() -> None:
    words = [
        "--policy.path",
        "p",
        "--teacher.path",
        "t",
        "--decoders",
        "ar,ceed",
        "--episodes",
        "3",
        "--clips",
        "false",
        "--threads",
        "2",
    ]
    config = draccus.parse(EvalConfig, args=words)
    assert (config.policy.path, config.teacher.path) == ("p", "t")
    assert (config.decoders, config.episodes, config.clips, config.threads) == ("ar,ceed", 3, False, 2)
    assert config.seed == 50_000
    assert draccus.parse(ShowConfig, args=["--policy.path=p", "--seed=50001"]).seed == 50_001
    assert draccus.parse(DemoConfig, args=["--episodes=30"]).episodes == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": CheckpointPath()}, "--policy.path"),
        ({"decoders": "jacobian"}, "Unknown decoder 'jacobian'; choose from ar"),
        ({"env": "kitchen"}, "tabletop"),
        ({"task": "fold_towel"}, "cube_in_bin"),
        ({"task": "mixed,push_cube"}, "--task"),
        ({"split": "test"}, "heldout"),
        ({"episodes": 0}, "--episodes is 0"),
        ({"threads": 0}, "--threads is 0"),
        ({"executed_steps": 99}, "a chunk of"),
    ],
)
def test_impossible_options_are_named(
    checkpoint: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        evaluate(options(checkpoint, tmp_path, **changes), quiet())
    assert message in str(error.value)


def test_demo_is_an_evaluation_with_valid_decoders(checkpoint: Path, tmp_path: Path) -> None:
    teacher = CheckpointPath(str(checkpoint))
    assert check(options(checkpoint, tmp_path, decoders=DECODERS, teacher=teacher)) == DECODERS.split(",")
    assert DemoConfig().episodes >= 20


def test_rows_follow_the_checkpoint_and_the_executed_steps() -> None:
    config = tabletop_config(decoding=DecodingConfig(max_iterations=3, executed_steps=4))
    names = ["ar_h", "ceed", "teacher_cap2_mid", "jacobi", "conf0.25_cap3", "ceed_random"]
    rows = resolve_rows(names, {"policy": config, "teacher": config}, executed_steps=2)
    assert [row.reference for row in rows] == ["ar", "ar", "teacher_ar", "ar", "ar", "ar"]
    assert rows[0].decoding == DecodingConfig(method="ar", executed_steps=2)
    assert rows[1].decoding == DecodingConfig(max_iterations=3, executed_steps=2)
    assert rows[2].decoding == DecodingConfig(max_iterations=2, executed_steps=2, guess="mid")
    assert rows[3].decoding.strict
    assert rows[4].decoding == DecodingConfig(confidence=0.25, max_iterations=3, executed_steps=2)
    assert rows[5].decoding == DecodingConfig(max_iterations=3, executed_steps=2, guess="random")


def test_evaluation_from_options_to_files(checkpoint: Path, tmp_path: Path) -> None:
    config = options(
        checkpoint,
        tmp_path,
        teacher=CheckpointPath(str(checkpoint)),
        decoders="jacobi,jacobi_random,ceed",
        clips=True,
        task="push_cube,stack_cubes",
    )
    report = evaluate(config, quiet())

    rows = report["decoders"]
    assert list(rows) == ["teacher_ar", "teacher_cap4", "jacobi", "jacobi_random", "ceed"]
    files = {path.name for path in tmp_path.iterdir()}
    plots = {"success.png", "latency.png", "forwards.png"}
    assert files == {"report.json", "report.md", *plots, *(f"clip_{name}.mp4" for name in rows)}
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["complete"]
    assert report["seeds"] == {"first": 50_000, "count": 2}
    for row in rows.values():
        assert row["episodes"] == 2
        assert set(row["per_task"]) == {"push_cube", "stack_cubes"}
        assert (
            set(row["latency_ms"]) == set(row["decode_ms"]) == set(row["prefill_ms"]) == {"p50", "p95", "p99"}
        )
        assert row["latency_ms"]["p50"] >= row["decode_ms"]["p50"]
        assert row["speedup_vs_ar"] > 0
    assert rows["teacher_ar"]["forwards_mean"] == 27  # n - 1
    assert rows["teacher_ar"]["speedup_vs_ar"] == 1
    assert rows["jacobi"]["ar_agreement"] == rows["jacobi_random"]["ar_agreement"] == 1  # strict: exact
    assert rows["ceed"]["forwards_mean"] <= 2
    assert rows["ceed"]["paired"]["teacher_ar"]["episodes"] == 2
    assert "teacher_ar" not in rows["teacher_ar"]["paired"]


def test_same_seeds_give_the_same_outcomes(checkpoint: Path, tmp_path: Path) -> None:
    counts = []
    for name in ("a", "b"):
        config = options(checkpoint, tmp_path / name, decoders="jacobi_random", timing_chunks=0)
        counts.append(evaluate(config, quiet())["decoders"]["jacobi_random"]["forwards_histogram"])
    assert counts[0] == counts[1]


def test_interrupt_leaves_a_partial_report(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(checkpoint, tmp_path, decoders="ceed"), quiet())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"] is False
    assert report["decoders"]["ceed"]["episodes"] == 2
    assert "latency_ms" not in report["decoders"]["ceed"]
    assert "Partial" in (tmp_path / "report.md").read_text()


def test_show_draws_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    config = ShowConfig(
        policy=CheckpointPath(str(checkpoint)),
        teacher=CheckpointPath(str(checkpoint)),
        output=str(tmp_path / "new" / "show.png"),
        chunk=1,
        executed_steps=2,
    )
    assert show(config).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--chunk"):
        show(ShowConfig(policy=config.policy, chunk=-1))
