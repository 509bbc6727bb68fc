"""A budget of minutes: its division, messages, enforcement and resumption."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.training import run as run_module
from ceed_vla.training import teacher as teacher_module
from ceed_vla.training.budget import BATCH, FEWEST, SMALL_BATCH, Speeds, divide
from ceed_vla.training.estimate import estimate
from ceed_vla.training.teacher import TeacherRun, train

SECONDS = 0.6  # in every step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Time that advances by `SECONDS` in every step, for any batch."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    optimize = run_module.Run.optimize

    def optimized(self: Any, *arguments: Any) -> None:
        optimize(self, *arguments)
        now[0] += SECONDS

    monkeypatch.setattr(run_module.Run, "optimize", optimized)
    monkeypatch.setattr(teacher_module, "probe", lambda kinds: dict.fromkeys(kinds, SECONDS))
    return now


def schedule(minutes: float, **changes: Any) -> Any:
    settings: dict[str, Any] = {"grounded": True, "frames": 6400, "episodes": 200}
    return divide(minutes, Speeds(1.0, 0.5), **{**settings, **changes})


def test_a_fifth_goes_to_grounding_and_a_tenth_to_each_round() -> None:
    found = schedule(20)
    assert (found.grounding_steps, found.steps, found.batch_size) == (240, (1200 - 240) * 2, BATCH)
    assert schedule(20, grounded=False).steps == 2400
    assert schedule(20, rounds=1).steps == (1200 - 240 - 120) * 2
    assert schedule(20, grounding_steps=60).steps == (1200 - 60) * 2
    assert schedule(20, steps=100).steps == 100
    assert "20 minutes" in str(found)
    assert "1,920 steps of 32 frames" in str(found)
    assert "seen about 9.6 times" in str(found)
    assert found.enough
    assert not found.advice
    assert "was learnt" in found.expectation


def test_rounds_that_leave_no_time_are_refused() -> None:
    assert schedule(60, rounds=7).steps > 1
    for rounds, grounded, most in ((8, True, 7), (10, False, 9), (12, True, 7)):
        with pytest.raises(ConfigError, match=f"rounds is {rounds}; .* at most {most} leave time"):
            schedule(60, rounds=rounds, grounded=grounded)


def test_few_steps_are_taken_with_half_the_batch() -> None:
    found = schedule(5, grounded=False)
    assert found.batch_size == BATCH
    assert found.steps == FEWEST
    found = schedule(4, grounded=False)
    assert (found.batch_size, found.steps) == (SMALL_BATCH, 960)
    assert not found.enough
    assert "about 8 minutes" in found.advice
    assert "rarely been enough" in found.expectation
    assert schedule(4, grounded=False, batch_size=BATCH).steps == 480
    found = schedule(4)  # a grounding step of half the frames takes half the time
    assert (found.batch_size, found.grounding_steps, found.steps) == (SMALL_BATCH, 96, 768)
    assert "more --steps" in schedule(60, steps=100).advice
    assert "record 100 episodes" in schedule(60, episodes=20).advice


@pytest.mark.slow
def test_a_run_ends_with_its_minutes_and_lowers_its_rate(
    studio: Any, tmp_path: Path, read_log: Any, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """0.4 minutes are 40 steps: 8 on grounding frames, 32 on actions.

    Stopped at step 12, a resumed run has the same budget for the remaining steps.
    """
    rates: list[float] = []
    step = run_module.Run.optimize

    def spy(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        rates.append(self.optimizers[0].param_groups[0]["lr"] / self.peak_lrs[0])
        if self.step == 12 and not self.settings.resume:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {
        "steps": None,
        "grounding_steps": None,
        "batch_size": None,
        "max_minutes": 0.4,
    }
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(run_module.Run, "optimize", spy)
        with pytest.raises(KeyboardInterrupt):
            train(studio.train_config(tmp_path / "run", **settings))
        assert (
            "0.4 minutes on this machine: 16 grounding steps, about 64 steps of 16 frames"
            in caplog.text
        )
        assert "rarely been enough" in caplog.text
        final = train(studio.train_config(tmp_path / "run", resume=True, **settings))
    progress = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert progress["sizes"]["batch_size"] == SMALL_BATCH
    assert progress["step"] == max(read_log(tmp_path / "run"))
    assert 40 <= progress["step"] <= 72
    assert (final / "model.safetensors").is_file()
    assert max(rates) > 0.9
    assert rates[-1] < 0.1 < rates[12]  # down to the end


def test_a_resumed_run_with_steps_given_goes_on_to_its_end(
    studio: Any, tmp_path: Path, clock: Any
) -> None:
    """Stopped at a step beyond --steps, which does not limit the steps on grounding frames."""
    settings: dict[str, Any] = {
        "steps": 20,
        "grounding_steps": None,
        "max_minutes": 1.0,
        "save_every": 1,
    }
    step = run_module.Run.optimize

    def stop(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        if self.step == 25:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.Run, "optimize", stop)
        with pytest.raises(KeyboardInterrupt):
            train(studio.train_config(tmp_path / "run", **settings))
    before = json.loads((tmp_path / "run" / "progress.json").read_text())
    train(studio.train_config(tmp_path / "run", resume=True, **settings))
    after = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert before["sizes"]["first"] == after["sizes"]["first"] > 0
    assert after["step"] == after["sizes"]["first"] + 20


def test_grounding_never_takes_more_steps_than_were_planned(
    studio: Any, tmp_path: Path, clock: Any
) -> None:
    run = TeacherRun(
        studio.train_config(tmp_path / "run", steps=None, grounding_steps=None, max_minutes=1.0)
    )
    planned = run.first
    assert planned > 0
    run.steps_in_budget(60.0, {"grounding": 1e-3})
    assert run.first == planned
    run.steps_in_budget(59.0, {"grounding": 10.0})
    assert run.first < planned


def test_a_shorter_budget_goes_on_after_a_takeover_round(
    studio: Any, tmp_path: Path, clock: Any, write_dataset: Any
) -> None:
    def record(policy: Path, index: int, folder: Path, minutes: float) -> list[Path]:
        return [write_dataset(folder / f"round_{index}", (5, 6), seed=20)]

    settings: dict[str, Any] = {
        "steps": None,
        "grounding_steps": 2,
        "max_minutes": 0.2,
        "rounds": 1,
    }
    train(studio.train_config(tmp_path / "run", **settings), record_takeover=record)
    run = TeacherRun(
        studio.train_config(tmp_path / "run", **{**settings, "rounds": 0}, resume=True)
    )
    run.run()
    assert len(run.takeovers) == 1


@pytest.mark.slow
def test_a_takeover_round_is_told_its_minutes(
    studio: Any, tmp_path: Path, clock: Any, write_dataset: Any
) -> None:
    told: list[float] = []

    def record(policy: Path, index: int, folder: Path, minutes: float) -> list[Path]:
        told.append(minutes)
        return [write_dataset(folder / f"round_{index}", (5, 6), seed=20)]

    settings = {"steps": None, "grounding_steps": 2, "max_minutes": 0.4, "rounds": 1}
    train(studio.train_config(tmp_path / "run", **settings), record_takeover=record)
    assert told == [pytest.approx(0.04)]


def test_a_budget_below_a_third_of_the_steps_is_said_at_once(
    studio: Any, tmp_path: Path, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        TeacherRun(
            studio.train_config(tmp_path / "run", steps=1000, grounding_steps=0, max_minutes=0.4)
        )
    assert "--max_minutes 0.4 allows about 40 of --steps 1000" in caplog.text


def test_damaged_sizes_are_not_resumed(studio: Any, tmp_path: Path, clock: Any) -> None:
    settings = {"steps": 10, "grounding_steps": 0, "max_minutes": 0.4}
    train(studio.train_config(tmp_path / "run", **settings))
    progress = tmp_path / "run" / "progress.json"
    for damaged in (
        None,
        {"first": -1, "batch_size": 8, "speeds": [1, 1]},
        {"first": 0, "batch_size": "8"},
    ):
        progress.write_text(json.dumps({**json.loads(progress.read_text()), "sizes": damaged}))
        with pytest.raises(CheckpointError, match="its sizes are"):
            train(studio.train_config(tmp_path / "run", resume=True, **settings))


def test_the_estimate_of_inspect_is_that_of_a_run(studio: Any) -> None:
    from ceed_vla.data.frames import open_dataset

    config = studio.train_config(Path("unused")).policy
    store = open_dataset(studio.demo, decode=False)
    found = estimate([store], config, minutes=5.0)
    assert found.minutes == 5.0
    assert found.grounding_steps == 0
    assert found.steps > 1
    assert found.frames == len(store)
    assert not store.images["observation.images.front"].any()
