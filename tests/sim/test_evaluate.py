"""`ceed-vla eval` and `show` from the options to the files, with a tiny untrained policy."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import draccus
import pytest

from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError
from ceed_vla.outputs import is_own
from ceed_vla.sim.decoders import parse_decoders, resolve_rows
from ceed_vla.sim.evaluate import DemoConfig, EvalConfig, evaluate
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.show import ShowConfig, show
from tests.helpers.evaluations import options, quiet, save_untrained
from tests.helpers.tabletop import tabletop_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("policy"))


def test_options_are_parsed_from_the_command_line() -> None:
    words = (
        "--policy.path p --teacher.path t --decoders ar,ceed --episodes 3 --clips false --threads 2"
    )
    config = draccus.parse(EvalConfig, args=words.split())
    assert (config.policy.path, config.teacher.path) == ("p", "t")
    assert (config.decoders, config.episodes, config.clips, config.threads) == (
        "ar,ceed",
        3,
        False,
        2,
    )
    assert config.seed == 50_000
    assert draccus.parse(ShowConfig, args=["--policy.path=p", "--seed=50001"]).seed == 50_001
    assert draccus.parse(DemoConfig, args=["--episodes=30"]).episodes == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": CheckpointPath()}, "--policy.path"),
        ({"decoders": "jacobian"}, "Unknown decoder 'jacobian'; choose from ceed"),
        ({"env": {"task": "fold_towel"}}, "cube_in_bin"),
        ({"env": {"split": "test"}}, "split is 'test'; it must be one of train, heldout, all"),
        ({"episodes": 0}, "--episodes is 0; it must be a whole number in [1, 100000]"),
        ({"episodes": 10**9}, "--episodes is 1000000000"),
        ({"episodes": 2.5}, "--episodes is 2.5"),
        ({"threads": 0}, "--threads is 0; it must be a whole number in [1, 256]"),
        ({"threads": 100_000}, "--threads is 100000"),
        ({"seed": -1}, "--seed is -1"),
        ({"batch": 10**6}, "--batch is 1000000"),
        ({"timing_chunks": -1}, "--timing_chunks is -1"),
        ({"executed_steps": 99}, "a chunk of"),
        (
            {"delay_ms": [0.0, 350.0]},
            "@350ms is 4 control steps late; a delay must be below a chunk's 4. Leave it out",
        ),
        ({"delay_ms": [-1.0]}, "--delay_ms"),
        ({"delay": "measured", "timing_chunks": 0}, "--timing_chunks"),
        ({"delay": "measured", "delay_ms": [100.0]}, "include 0 in --delay_ms"),
        ({"delay": "measured", "num_shards": 2, "batch": 1}, "set --delay_ms in all shards"),
        ({"decoders": "gap5_cap2"}, "Unknown decoder"),
        ({"workers": 0}, "--workers is 0"),
        ({"device": "cuda:77"}, "The device is 'cuda:77'; this machine has cpu"),
        (
            {"decoders": "ar,cap0"},
            "Decoder 'cap0': its cap K is 0; it must be a whole number in [1, 1e6]",
        ),
        ({"decoders": "teacher_cap0"}, "its cap K is 0"),
        ({"decoders": "ar,keep3_cap2"}, "needs a checkpoint whose context.safetensors"),
        ({"decoders": "conf2_cap1"}, "its confidence P is 2.0"),
        ({"decoders": f"cap{'9' * 20}"}, "its cap K is 99999999999999999999"),
        ({"decoders": "cap" + "9" * 10_000}, "Unknown decoder 'cap999"),
        ({"decoders": "cap\u0662"}, "Unknown decoder"),
        ({"env": {"task": "x" * 10_000}}, "choose 'all', 'mixed'"),
        ({"output_dir": " "}, "--output_dir is empty"),
        ({"output_dir": f"{__file__}"}, "which is a file; name a folder"),
        ({"output_dir": f"{__file__}/new"}, "is a file; name another folder"),
        ({"output_dir": "x" * 5000}, "cannot be a path"),
        ({"output_dir": f"{Path(__file__).parent}"}, "that ceed-vla did not make"),
        ({"output_dir": "a\0b"}, "--output_dir is 'a\\x00b'"),
    ],
)
def test_impossible_options_are_named(
    checkpoint: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        evaluate(options(checkpoint, tmp_path, **changes), quiet())
    assert message in str(error.value)
    assert len(str(error.value)) < 1000
    assert list(tmp_path.iterdir()) == []


def test_demo_is_an_evaluation_of_the_shipped_policies() -> None:
    config = DemoConfig()
    assert (config.policy.path, config.teacher.path) == ("student", "teacher")
    assert parse_decoders(config.decoders, has_teacher=True) == config.decoders.split(",")
    assert config.episodes >= 20


def test_rows_follow_the_checkpoint_and_the_executed_steps() -> None:
    config = tabletop_config(decoding=DecodingConfig(max_iterations=3, watch="executed"))
    names = ["ar_h", "ceed", "teacher_cap2_mid", "jacobi", "conf0.25_cap3", "ceed_random"]
    rows = resolve_rows(names, {"policy": config, "teacher": config})
    assert [row.reference for row in rows] == ["ar", "ar", "teacher_ar", "ar", "ar", "ar"]
    assert rows[0].decoding == DecodingConfig(method="ar", watch="executed")
    assert rows[1].decoding == DecodingConfig(max_iterations=3, watch="executed")
    assert rows[2].decoding == DecodingConfig(max_iterations=2, watch="executed", guess="mid")
    assert rows[3].decoding.strict
    assert rows[4].decoding == DecodingConfig(confidence=0.25, max_iterations=3, watch="executed")
    assert rows[5].decoding == DecodingConfig(max_iterations=3, watch="executed", guess="random")


def test_evaluation_from_options_to_files(checkpoint: Path, tmp_path: Path) -> None:
    config = options(
        checkpoint,
        tmp_path,
        teacher=CheckpointPath(str(checkpoint)),
        decoders="jacobi,jacobi_random,ceed",
        clips=True,
        env={"task": "push_cube,stack_cubes"},
    )
    report = evaluate(config, quiet())

    rows = report["decoders"]
    assert list(rows) == ["teacher_ar", "teacher_cap4", "jacobi", "jacobi_random", "ceed"]
    files = {path.name for path in tmp_path.iterdir()}
    plots = {"success.png", "latency.png", "forwards.png"}
    clips = {f"clip_{name}.mp4" for name in rows}
    assert files == {"report.json", "report.md", "report.html", "episodes.jsonl", *plots, *clips}
    assert all(is_own(tmp_path / name) for name in files)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["complete"]
    assert report["seeds"] == {"first": 50_000, "count": 2}
    for row in rows.values():
        assert row["episodes"] == 2
        assert set(row["per_task"]) == {"push_cube", "stack_cubes"}
        assert (
            set(row["total_ms"])
            == set(row["loop_ms"])
            == set(row["decode_ms"])
            == set(row["prefill_ms"])
            == {"p50", "p95", "p99"}
        )
        assert row["total_ms"]["p50"] >= row["decode_ms"]["p50"]
        assert row["speedup_vs_ar"] > 0
    assert rows["teacher_ar"]["forwards_mean"] == 27  # n - 1
    assert rows["teacher_ar"]["speedup_vs_ar"] == 1
    # strict: exact
    assert rows["jacobi"]["equal_to_ar"] == rows["jacobi_random"]["equal_to_ar"] == 1
    assert rows["ceed"]["forwards_mean"] <= 2
    assert rows["ceed"]["paired"]["teacher_ar"]["episodes"] == 2
    assert "teacher_ar" not in rows["teacher_ar"]["paired"]


def test_rows_that_a_teacher_adds_are_announced_and_can_be_left_out(
    checkpoint: Path, tmp_path: Path
) -> None:
    changes = {"teacher": CheckpointPath(str(checkpoint)), "timing_chunks": 2, "episodes": 1}
    told = {}
    for decoders in ("ceed,teacher_ar", "only=ceed,teacher_ar"):
        console = quiet()
        config = options(checkpoint, tmp_path / decoders, decoders=decoders, **changes)
        rows = list(evaluate(config, console)["decoders"])
        assert isinstance(console.file, StringIO)
        told[decoders] = rows, console.file.getvalue().splitlines()[0]
    rows, first = told["ceed,teacher_ar"]
    assert rows == ["teacher_cap4", "ceed", "teacher_ar"]
    meaning = "what the teacher reaches in 4 forwards without distillation"
    assert (
        first
        == f"Added: teacher_cap4 ({meaning}). To omit it, put only= before the names of --decoders."
    )
    rows, first = told["only=ceed,teacher_ar"]
    assert rows == ["ceed", "teacher_ar"]
    assert "Added" not in first
    # as `ceed-vla bench` extends it
    assert parse_decoders("ar,only=ceed", has_teacher=True) == [
        "ar",
        "ceed",
    ]
    with pytest.raises(ConfigError, match="--decoders is empty"):
        parse_decoders("only=", has_teacher=True)


def test_same_seeds_give_the_same_outcomes(checkpoint: Path, tmp_path: Path) -> None:
    counts = []
    for name in ("a", "b"):
        config = options(checkpoint, tmp_path / name, decoders="jacobi_random", timing_chunks=0)
        counts.append(evaluate(config, quiet())["decoders"]["jacobi_random"]["forwards_histogram"])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["report.json", "success.png", "notes.txt"])
def test_files_of_others_are_left_alone(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"complete": true}')
    for resume in (False, True):
        with pytest.raises(ConfigError, match=f"holds '{name}' that ceed-vla did not make"):
            evaluate(options(checkpoint, tmp_path, resume=resume), quiet())
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"complete": true}'


def test_show_draws_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    config = ShowConfig(
        policy=CheckpointPath(str(checkpoint)),
        teacher=CheckpointPath(str(checkpoint)),
        output=str(tmp_path / "new" / "show.png"),
        chunk=1,
        executed_steps=2,
    )
    assert show(config).read_bytes().startswith(b"\x89PNG")
    assert show(config) == Path(config.output)  # an earlier picture of this command is replaced
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["show.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": -1}, "--chunk is -1"),
        ({"output": ""}, "--output is empty"),
        ({"output": "."}, "is a folder; name a file in it"),
        ({"output": "picture"}, "the name of the file must end in .png"),
        ({"output": "picture.jpg"}, "the name of the file must end in .png"),
        ({"output": "theirs.png"}, "a file that ceed-vla did not make"),
        ({"output": "nowhere.png"}, "a file that ceed-vla did not make"),
        ({"output": "/dev/null/x.png"}, "/dev/null is a file"),
        ({"device": "cuda:77"}, "this machine has cpu"),
    ],
)
def test_show_refuses(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("theirs.png").write_bytes(b"\x89PNG of somebody else")
    Path("nowhere.png").symlink_to("missing")
    with pytest.raises(ConfigError, match=re.escape(words)):
        show(
            ShowConfig(
                **{"policy": CheckpointPath(str(checkpoint)), "executed_steps": 2, **options}
            )
        )
    assert Path("theirs.png").read_bytes() == b"\x89PNG of somebody else"
