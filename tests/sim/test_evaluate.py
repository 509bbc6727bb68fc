"""`ceed-vla eval` and `show` from the options to the files, with a tiny untrained policy."""

from __future__ import annotations

import errno
import json
import re
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import draccus
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

import ceed_vla.sim.evaluate as evaluate_module
from ceed_vla.checkpoints import save
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.outputs import is_own
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.sim.decoders import parse_decoders, resolve_rows
from ceed_vla.sim.episode_log import EPISODES, EpisodeLog
from ceed_vla.sim.evaluate import DemoConfig, EvalConfig, evaluate
from ceed_vla.sim.plots import write_plots
from ceed_vla.sim.rollout import EpisodeResult
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.show import ShowConfig, show
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from ceed_vla.sim.tabletop.tasks import TASKS, combinations
from ceed_vla.sim.timing import Samples
from tests.helpers.edits import unsealed
from tests.helpers.episodes import as_of_before, episodes_of
from tests.helpers.tabletop import tabletop_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = tabletop_config(
        width=16,
        layers=1,
        heads=2,
        mlp_width=16,
        stem_channels=[4, 4, 4, 4],
        chunk_size=4,
        n_action_steps=2,
        decoding=DecodingConfig(method="jacobi", max_iterations=2, watch="executed"),
    )
    stats = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    instructions = [command.text for family in TASKS for command in combinations(family, "all")]
    pre, post = make_ceed_vla_pre_post_processors(config, stats, instructions=instructions)
    return save(tmp_path_factory.mktemp("policy"), CeedVLAPolicy(config), pre, post)


def options(checkpoint: Path, folder: Path, **changes: object) -> EvalConfig:
    values: dict[str, object] = {
        "policy": CheckpointPath(str(checkpoint)),
        "decoders": "ar,jacobi,ceed",
        "episodes": 2,
        "executed_steps": 2,
        "env": {},
        "timing_chunks": 4,
        "clips": False,
        "output_dir": str(folder),
    }
    values |= changes
    env: Any = values.pop("env")
    # Few steps: an untrained policy solves nothing anyway.
    env = CeedTabletopEnv(**{"task": "mixed", "episode_length": 8, **env})
    return EvalConfig(env=env, **values)  # type: ignore[arg-type]


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


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
        ({"delay_ms": [0.0, 350.0]}, "@350ms is 4 control steps late; a chunk has 4: leave it out"),
        ({"delay_ms": [-1.0]}, "--delay_ms"),
        ({"delay": "measured", "timing_chunks": 0}, "--timing_chunks"),
        ({"delay": "measured", "delay_ms": [100.0]}, "--delay_ms 0"),
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
    assert files == {"report.json", "report.md", "episodes.jsonl", *plots, *clips}
    assert all(is_own(tmp_path / name) for name in files)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["complete"]
    assert report["seeds"] == {"first": 50_000, "count": 2}
    for row in rows.values():
        assert row["episodes"] == 2
        assert set(row["per_task"]) == {"push_cube", "stack_cubes"}
        assert (
            set(row["total_ms"])
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
        == f"Added: teacher_cap4 ({meaning}); only= before the names of --decoders leaves it out."
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
    assert "total_ms" not in report["decoders"]["ceed"]
    assert "Partial" in (tmp_path / "report.md").read_text()


def lines_of(folder: Path) -> list[str]:
    return (folder / EPISODES).read_text().splitlines()


@pytest.mark.parametrize("killed", [False, True])
def test_resume_gives_the_report_of_a_run_in_one_go(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    changes = {"decoders": "jacobi_random,ceed", "episodes": 5, "batch": 2, "timing_chunks": 0}
    whole = evaluate(options(checkpoint, tmp_path / "whole", **changes), quiet())
    folder, append = tmp_path / "parts", EpisodeLog.append
    started: list[tuple[str, int]] = []

    def interrupted(log: EpisodeLog, name: str, episode: EpisodeResult) -> None:
        append(log, name, episode)
        started.append((name, episode.seed))
        if len(started) == 5:  # the first of the second group
            raise KeyboardInterrupt

    monkeypatch.setattr(EpisodeLog, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(checkpoint, folder, **changes), quiet())
    assert len(lines_of(folder)) == 6
    if killed:  # no last report, and the last line is not whole
        (folder / "report.json").unlink()
        (folder / EPISODES).write_text((folder / EPISODES).read_text()[:-20])
    with pytest.raises(ConfigError, match=r"interrupted evaluation .* --resume=true"):
        evaluate(options(checkpoint, folder, **changes), quiet())
    again = evaluate(options(checkpoint, folder, resume=True, **changes), quiet())

    assert again == whole
    assert episodes_of(folder) == episodes_of(tmp_path / "whole")
    assert started.count(("ceed", 50_000)) == 1  # finished episodes are kept
    assert started.count(("jacobi_random", 50_002)) == (
        2 if started[4][0] == "jacobi_random" else 1
    )
    assert len(started) == 5 + 10 - 4
    assert evaluate(options(checkpoint, folder, resume=True, **changes), quiet()) == whole
    assert len(started) == 11
    # a complete report is replaced
    assert evaluate(options(checkpoint, folder, **changes), quiet()) == whole
    assert len(started) == 21


def test_latency_in_the_loop_has_rows_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    changes = {"decoders": "ar,ceed", "timing_chunks": 0, "delay_ms": [0.0, 150.0], "clips": True}
    report = evaluate(options(checkpoint, tmp_path, **changes), quiet())
    rows = report["decoders"]
    assert {name: entry["delay_steps"] for name, entry in rows.items()} == {
        "ar": 0,
        "ceed": 0,
        "ar@150ms": 2,
        "ceed@150ms": 2,
    }
    assert list(rows["ceed@150ms"]["paired"]) == ["ar@150ms"]
    assert rows["ceed@150ms"]["episodes"] == 2
    text = (tmp_path / "report.md").read_text()
    assert "## Latency in the loop" in text
    assert "| ceed@150ms | 2 | 0/2" in text
    assert is_own(tmp_path / "delays.png")
    assert {file.name for file in tmp_path.glob("*.mp4")} == {"clip_ar.mp4", "clip_ceed.mp4"}
    episodes = [json.loads(line) for line in lines_of(tmp_path)[1:]]
    assert all(set(episode["motion"]) == {"action_rate", "path", "jerk"} for episode in episodes)
    with pytest.raises(ConfigError, match="is of another evaluation: its decoders"):
        evaluate(
            options(checkpoint, tmp_path, **{**changes, "delay_ms": [0.0, 250.0]}, resume=True),
            quiet(),
        )


def test_decoders_are_as_late_as_they_are_slow(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def run_timing(run: Any) -> None:
        timed.append(len(run.rows))
        run.samples = {
            row.name: Samples([s], [0.0], [s], [torch.zeros(28)])
            for row, s in zip(run.rows, (0.11, 0.03), strict=True)
        }
        run.timing = {"chunks": 1}

    monkeypatch.setattr("ceed_vla.sim.evaluate._run_timing", run_timing)
    monkeypatch.setattr("ceed_vla.sim.evaluate.summarise", lambda *_: {})
    monkeypatch.setattr("ceed_vla.sim.evaluate.write_plots", lambda *_: [])
    monkeypatch.setattr("ceed_vla.sim.evaluate.markdown", lambda *_: "")
    config = options(checkpoint, tmp_path, decoders="ar,ceed", delay="measured", clips=False)
    rows = evaluate(config, quiet())["decoders"]
    assert timed == [2]  # once, before the episodes
    late = {"ar": 0, "ceed": 0, "ar@measured": 2, "ceed@measured": 1}
    assert {name: entry["delay_steps"] for name, entry in rows.items()} == late
    assert list(rows["ceed@measured"]["paired"]) == ["ar@measured"]
    assert all(entry["episodes"] == 2 for entry in rows.values())


def test_the_teachers_rows_are_taken_from_an_earlier_report(
    checkpoint: Path, tmp_path: Path
) -> None:
    changes = {"timing_chunks": 0, "teacher": CheckpointPath(str(checkpoint)), "decoders": "ceed"}
    first = evaluate(options(checkpoint, tmp_path / "first", **changes), quiet())
    as_of_before(tmp_path / "first")
    # to tell them apart
    rows = (tmp_path / "first" / EPISODES).read_text().replace('"steps": 8', '"steps": 7')
    (tmp_path / "first" / EPISODES).write_text(rows)
    changes |= {"decoders": "ceed,cap1", "reuse": str(tmp_path / "first")}
    again = evaluate(options(checkpoint, tmp_path / "again", **changes), quiet())
    assert list(again["decoders"]) == [*first["decoders"], "cap1"]
    steps = {
        json.loads(line)["decoder"]: json.loads(line)["steps"]
        for line in lines_of(tmp_path / "again")[1:]
    }
    assert steps == {"teacher_ar": 7, "teacher_cap4": 7, "ceed": 7, "cap1": 8}
    header = json.loads(lines_of(tmp_path / "first")[0])["identity"]
    plan = {json.loads(line)["seed"]: "mixed" for line in lines_of(tmp_path / "first")[1:]}
    log = EpisodeLog(tmp_path / "other", {**header, "policy": "another student"}, plan, 8)
    row = header["decoders"]["teacher_ar"]
    for identity in (header, log.identity):
        identity["decoders"] = {"teacher_ar": row, "teacher_from_cap1": {**row, "draft": "cap1"}}
    kept = [
        line
        for line in lines_of(tmp_path / "first")[1:]
        if json.loads(line)["decoder"] == "teacher_ar"
    ]
    start = json.dumps({**json.loads(lines_of(tmp_path / "first")[0]), "identity": header})
    (tmp_path / "drafted").mkdir()
    (tmp_path / "drafted" / EPISODES).write_text("\n".join([start, *kept, ""]))
    # what drafted was another student
    assert list(log.shared(tmp_path / "drafted")) == ["teacher_ar"]
    with pytest.raises(ConfigError, match=r"first, an evaluation with other seed; nothing fits"):
        evaluate(options(checkpoint, tmp_path / "other", **changes, seed=50_010), quiet())
    with pytest.raises(ConfigError, match=r"--reuse is .* which has no episodes"):
        evaluate(
            options(checkpoint, tmp_path / "none", **{**changes, "reuse": str(tmp_path)}), quiet()
        )


@pytest.mark.slow
def test_workers_run_the_same_episodes(checkpoint: Path, tmp_path: Path) -> None:
    changes = {
        "decoders": "jacobi_random,ceed",
        "episodes": 5,
        "batch": 2,
        "timing_chunks": 0,
        "threads": 1,
    }
    changes |= {"delay_ms": [0.0, 100.0]}
    alone = evaluate(options(checkpoint, tmp_path / "alone", **changes), quiet())
    shared = evaluate(options(checkpoint, tmp_path / "shared", **changes, workers=2), quiet())
    assert shared["decoders"] == alone["decoders"]
    assert episodes_of(tmp_path / "shared") == episodes_of(tmp_path / "alone")
    kept = lines_of(tmp_path / "shared")
    (tmp_path / "shared" / EPISODES).write_text("\n".join([*kept[:-3], ""]))
    again = evaluate(
        options(checkpoint, tmp_path / "shared", **changes, workers=2, resume=True), quiet()
    )
    assert again["decoders"] == alone["decoders"]


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    evaluate(options(checkpoint, folder, decoders="ceed", timing_chunks=0), quiet())
    return folder


def test_episodes_of_another_checkpoint_are_not_believed(
    checkpoint: Path, finished: Path, tmp_path: Path
) -> None:
    other = unsealed(shutil.copytree(checkpoint, tmp_path / "other"))
    file = other / "policy_preprocessor.json"
    file.write_text(file.read_text() + " ")
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ConfigError, match="its policy is"):
        evaluate(options(other, folder, decoders="ceed", timing_chunks=0, resume=True), quiet())


@pytest.mark.parametrize("name", ["report.json", "success.png", "notes.txt"])
def test_files_of_others_are_left_alone(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"complete": true}')
    for resume in (False, True):
        with pytest.raises(ConfigError, match=f"holds '{name}' that ceed-vla did not make"):
            evaluate(options(checkpoint, tmp_path, resume=resume), quiet())
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"complete": true}'


def test_a_full_disk_leaves_what_was_there(
    checkpoint: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, *_: object, **__: object) -> None:
        Path(str(file)).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = shutil.copytree(finished, tmp_path / "run")
    before = (folder / "forwards.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: full(file))
    with pytest.raises(OSError, match="No space left") as error:
        write_plots(json.loads((folder / "report.json").read_text()), folder)
    assert error.value.filename == str(folder / "success.png")
    assert (folder / "forwards.png").read_bytes() == before
    assert {file.name for file in folder.iterdir()} == {file.name for file in finished.iterdir()}


def test_show_draws_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    config = ShowConfig(
        policy=CheckpointPath(str(checkpoint)),
        teacher=CheckpointPath(str(checkpoint)),
        output=str(tmp_path / "new" / "show.png"),
        chunk=1,
        executed_steps=2,
    )
    assert show(config).read_bytes().startswith(b"\x89PNG")
    assert show(config) == Path(config.output)  # our own picture is replaced
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["show.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": -1}, "--chunk is -1"),
        ({"output": ""}, "--output is empty"),
        ({"output": "."}, "is a folder; name a file in it"),
        ({"output": "picture"}, "a file with the ending .png is written"),
        ({"output": "picture.jpg"}, "a file with the ending .png is written"),
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
