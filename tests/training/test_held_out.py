"""Held-out episodes: which they are, that no step reads them, and measurements on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import DatasetError
from ceed_vla.training.distill import DistillConfig, TrajectoriesConfig, distill
from ceed_vla.training.held_out import held_out_frames
from ceed_vla.training.mixture import Mixture
from ceed_vla.training.open_loop import OpenLoopConfig, OpenLoopError, open_loop, verdict
from ceed_vla.training.teacher import train

LENGTHS = (5, 4, 6, 5, 5, 4, 6, 5, 5, 4, 6, 5)


@pytest.fixture(scope="module")
def dozen(write_dataset: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of twelve episodes, one of them held out."""
    path: Path = write_dataset(tmp_path_factory.mktemp("dozen") / "demos", LENGTHS, seed=3)
    return path


@pytest.mark.parametrize(
    ("episodes", "share", "count"),
    [
        (1, 0.04, 0),
        (9, 0.5, 0),
        (10, 0.04, 1),
        (10, 0.5, 5),
        (100, 0.04, 4),
        (100, 0.0, 0),
        (5000, 0.04, 50),
    ],
)
def test_so_many_whole_episodes_are_held_out(episodes: int, share: float, count: int) -> None:
    episode = np.repeat(np.arange(episodes), 3)
    store: Any = SimpleNamespace(episode=episode)
    held = held_out_frames(store, share)
    assert held.sum() == 3 * count
    assert np.isin(episode, episode[held]).sum() == held.sum()  # whole episodes
    assert (held == held_out_frames(store, share)).all()


def test_no_batch_has_a_frame_of_a_held_out_episode(dozen: Path) -> None:
    store = open_dataset(dozen)
    held = held_out_frames(store)
    assert held.any()
    mixture = Mixture([store], None, 0, 4, held_out=[0.04])
    camera = "observation.images.front"
    looks = np.asarray(store.images[camera][np.arange(len(store))][:, 0, :8]).reshape(
        len(store), -1
    )
    drawn = np.concatenate(
        [mixture.draw(64, step)[camera][:, :, 0, :8].permute(0, 2, 1) for step in range(20)]
    )
    # (drawn, N)
    same = ((255 * drawn.reshape(len(drawn), -1))[:, None].round() == looks[None]).all(-1)
    assert same.any(1).all()
    assert not same[:, held].any()
    assert same[:, ~held].any(0).all()


def test_the_summary_says_what_was_learnt_and_what_comes_next(
    dozen: Path, studio: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], read_log: Any
) -> None:
    settings = {"roots": str(dozen), "steps": 4, "grounding_steps": 2, "batch_size": 4}
    teacher = train(studio.train_config(tmp_path / "teacher", **settings))
    printed = capsys.readouterr().out
    assert "6 of 6 steps in 0." in printed
    assert "2 steps of them on grounding frames" in printed
    held = int(held_out_frames(open_dataset(dozen)).sum())
    assert f"on {held} frames of 1 held-out episode," in printed
    assert "27 token by token" in printed
    assert (
        f"ceed-vla open-loop --policy.path {teacher} --roots {dozen} --held_out 0.04 --gate 0.5"
        in printed
    )
    (accuracy,) = read_log(tmp_path / "teacher", "held_out_token_accuracy").values()
    assert 0 <= accuracy < 1

    config = DistillConfig(
        output_dir=str(tmp_path / "student"),
        teacher_path=str(teacher),
        roots=str(dozen),
        steps=2,
        batch_size=4,
        trajectories=TrajectoriesConfig(online=True),
        eval_every=0,
        mixed_precision="no",
    )
    student = distill(config)
    printed = capsys.readouterr().out
    assert "2 of 2 steps" in printed
    assert f"On {held} frames of held-out episodes:" in printed
    assert "with early exit" in printed
    assert f"ceed-vla open-loop --policy.path {student}" in printed


def test_few_episodes_are_all_trained_on_and_that_is_said(
    studio: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(studio.train_config(tmp_path / "run", steps=1, grounding_steps=0))
    assert "No episode was held out: fewer than ten" in capsys.readouterr().out


def test_the_gate_fails_a_policy_that_has_learnt_nothing(
    dozen: Path, studio: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OpenLoopConfig(
        str(studio.teacher), str(dozen), str(tmp_path / "report"), "", held_out=0.04
    )
    report = open_loop(config)
    held = open_dataset(dozen).episode[held_out_frames(open_dataset(dozen))]
    assert sum(data["chunks"] for data in report["data"]) == -(-len(held) // 2)
    assert report["ratio"] == pytest.approx(
        report["rows"]["ar"]["error"] / report["rows"]["mean action"]["error"], abs=1e-3
    )
    assert "Verdict: " in capsys.readouterr().out
    config.gate = min(1.0, report["ratio"] / 2)
    with pytest.raises(OpenLoopError, match="does not pass --gate"):
        open_loop(config)
    assert (tmp_path / "report" / "open_loop.json").is_file()
    open_loop(
        OpenLoopConfig(str(studio.teacher), str(studio.demo), str(tmp_path / "own"), "", gate=0.9)
    )
    assert "has not learnt" in verdict(0.6, 0.5)
    assert "follows the demonstrations" in verdict(0.4, 0.5)
    assert "none" in verdict(None, 0.5)


def test_no_held_out_episode_to_look_at(studio: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no episode was held out"):
        open_loop(
            OpenLoopConfig(str(studio.teacher), str(studio.demo), str(tmp_path), held_out=0.04)
        )
