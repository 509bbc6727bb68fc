"""Episodes of an evaluation: interruption and resuming, delays, reuse of earlier reports."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from ceed_vla.errors import ConfigError
from ceed_vla.outputs import is_own
from ceed_vla.sim import evaluation_timing
from ceed_vla.sim.episode_log import EPISODES, EpisodeLog
from ceed_vla.sim.evaluate import evaluate
from ceed_vla.sim.plots import write_plots
from ceed_vla.sim.rollout import EpisodeResult
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.timing import Samples
from tests.helpers.edits import unsealed
from tests.helpers.episodes import as_of_before, episodes_of
from tests.helpers.evaluations import options, quiet, save_untrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("policy"))


def test_interrupt_leaves_a_partial_report(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_timing, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(checkpoint, tmp_path, decoders="ceed"), quiet())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"] is False
    assert report["decoders"]["ceed"]["episodes"] == 2
    assert "total_ms" not in report["decoders"]["ceed"]
    assert "Partial" in (tmp_path / "report.md").read_text()


def lines_of(folder: Path) -> list[str]:
    return (folder / EPISODES).read_text().splitlines()


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
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
        if len(started) == 5:  # the first episode of the second shard
            raise KeyboardInterrupt

    monkeypatch.setattr(EpisodeLog, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(checkpoint, folder, **changes), quiet())
    assert len(lines_of(folder)) == 6
    if killed:  # no final report, and the last line is incomplete
        (folder / "report.json").unlink()
        (folder / EPISODES).write_text((folder / EPISODES).read_text()[:-20])
    with pytest.raises(ConfigError, match=r"interrupted evaluation .* --resume=true"):
        evaluate(options(checkpoint, folder, **changes), quiet())
    again = evaluate(options(checkpoint, folder, resume=True, **changes), quiet())

    assert again == whole
    assert episodes_of(folder) == episodes_of(tmp_path / "whole")
    assert started.count(("ceed", 50_000)) == 1  # finished episodes are reused
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
    with pytest.raises(ConfigError, match=r"its decoders.ar@150ms is \{.*, here it is missing"):
        evaluate(
            options(checkpoint, tmp_path, **{**changes, "delay_ms": [0.0, 250.0]}, resume=True),
            quiet(),
        )


def test_decoders_are_as_late_as_they_are_slow(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    took = [0.11, 0.03]

    def run_timing(run: Any) -> None:
        timed.append(len(run.rows))
        run.samples = {
            row.name: Samples([s], [0.0], [s], [torch.zeros(28)])
            for row, s in zip(run.rows, took, strict=True)
        }
        run.timing = {"chunks": 1}

    monkeypatch.setattr("ceed_vla.sim.evaluate.measure_latency", run_timing)
    monkeypatch.setattr("ceed_vla.sim.evaluation_report.summarise", lambda *_: {})
    monkeypatch.setattr("ceed_vla.sim.evaluation_report.write_plots", lambda *_: [])
    monkeypatch.setattr("ceed_vla.sim.evaluation_report.markdown", lambda *_: "")
    config = options(checkpoint, tmp_path, decoders="ar,ceed", delay="measured", clips=False)
    rows = evaluate(config, quiet())["decoders"]
    assert timed == [2]  # once, before the episodes
    late = {"ar": 0, "ceed": 0, "ar@measured": 2, "ceed@measured": 1}
    assert {name: entry["delay_steps"] for name, entry in rows.items()} == late
    assert list(rows["ceed@measured"]["paired"]) == ["ar@measured"]
    for file in tmp_path.glob("report.*"):  # as after an interrupt
        file.unlink()
    took[:] = [0.21, 0.11]
    again = evaluate(replace(config, resume=True), quiet())["decoders"]
    assert {name: entry["delay_steps"] for name, entry in again.items()} == late
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
    with pytest.raises(
        ConfigError, match=r"first, an evaluation with other seed: its episodes cannot be reused"
    ):
        evaluate(options(checkpoint, tmp_path / "other", **changes, seed=50_010), quiet())
    with pytest.raises(ConfigError, match=r"--reuse: .* has no episodes"):
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


def test_episodes_of_another_checkpoint_are_refused(
    checkpoint: Path, finished: Path, tmp_path: Path
) -> None:
    other = unsealed(shutil.copytree(checkpoint, tmp_path / "other"))
    file = other / "policy_preprocessor.json"
    file.write_text(file.read_text() + " ")
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ConfigError, match="its policy is"):
        evaluate(options(other, folder, decoders="ceed", timing_chunks=0, resume=True), quiet())


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
