"""Failures are not imitated, and of a dataset with interventions only those are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ceed_vla
from ceed_vla.data.frames import FrameStore, open_dataset
from ceed_vla.data.usable import usable_frames
from ceed_vla.data.writer import DatasetWriter
from ceed_vla.errors import DatasetError
from ceed_vla.training.distill_data import StoredData
from ceed_vla.training.inspection import InspectConfig, inspect
from ceed_vla.training.inspection_findings import without_episodes
from ceed_vla.training.mixture import Mixture, shared_weights
from ceed_vla.training.open_loop import in_run

FLAG = {"dtype": "bool", "shape": (1,), "names": None}
FEATURES = {
    "observation.images.front": {
        "dtype": "image",
        "shape": (8, 8, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
    "intervention": FLAG,
    "next.success": FLAG,
}


def recording(root: Path, *episodes: tuple[str, bool]) -> FrameStore:
    """A dataset; of each episode a letter per frame, "p" for a person, and whether it succeeds."""
    writer = DatasetWriter(root, repo_id="local/x", fps=10, features=FEATURES, robot_type="arm")
    place = 0
    for who, success in episodes:
        frames: list[dict[str, Any]] = []
        for index, letter in enumerate(who):
            frames.append(
                {
                    "observation.images.front": np.full((8, 8, 3), place, np.uint8),
                    "observation.state": np.array([place, 0.1 * place], np.float32),
                    "action": np.array([place, -place], np.float32),
                    "intervention": np.array([letter == "p"]),
                    "next.success": np.array([success and index == len(who) - 1]),
                    "task": "wipe the table",
                }
            )
            place += 1
        writer.add_episode(frames)
    writer.commit({})
    return open_dataset(root)


def test_frames_and_ends_of_runs() -> None:
    episode = np.array([0] * 6 + [1] * 4)
    person = np.array([0, 1, 1, 0, 1, 1, 1, 0, 0, 1], dtype=bool)
    found = usable_frames(episode, person, np.zeros(10, dtype=bool))
    assert found.interventions
    assert found.failures == 2
    np.testing.assert_array_equal(found.frames, person)
    assert found.end[person].tolist() == [3, 3, 6, 6, 7, 10]
    success = np.array([0] * 5 + [1] + [0] * 4, dtype=bool)
    found = usable_frames(episode, None, success)
    assert found.frames.tolist() == [True] * 6 + [False] * 4
    assert found.end.tolist() == [6] * 6 + [10] * 4
    assert str(found) == "6 of 10 frames are imitated: 1 episode failed"
    assert str(usable_frames(episode, None, None)) == ""


def test_chunks_end_where_the_person_gives_back(tmp_path: Path) -> None:
    store = recording(tmp_path / "data", ("..ppp...pp", True), ("pp........", False))
    assert store.corrected
    action, pad = store.chunks(np.array([3, 9, 10]), 4)
    assert action[:, :, 0].tolist() == [[3, 4, 4, 4], [9, 9, 9, 9], [10, 11, 11, 11]]
    assert pad.tolist() == [
        [False, False, True, True],
        [False, True, True, True],
        [False, False, True, True],
    ]


def drawn(mixture: Mixture) -> np.ndarray:
    batches = [mixture.draw(64, step) for step in range(20)]
    return np.concatenate([batch["action"][:, 0, 0].numpy() for batch in batches])


def test_batches_have_the_frames_to_imitate_in_their_shares(tmp_path: Path) -> None:
    demonstrations = recording(tmp_path / "demos", ("." * 30, True), ("." * 30, False))
    corrections = recording(tmp_path / "corrections", ("." * 50 + "pp", True))
    stores = [demonstrations, corrections]
    assert shared_weights(stores, 0.25) == pytest.approx([30, 10])
    assert shared_weights(stores, 0.0) == [30, 2]
    assert shared_weights([demonstrations], 0.25) == [30]
    assert shared_weights([corrections], 0.25) == [2]
    seen = drawn(Mixture(stores, shared_weights(stores, 0.25), 0, 4))
    values, counts = np.unique(seen, return_counts=True)
    assert values.tolist() == [*range(30), 50, 51]
    assert counts[-2:].sum() / counts.sum() == pytest.approx(0.25, abs=0.04)


def test_a_recording_of_failures_is_an_error(tmp_path: Path) -> None:
    store = recording(tmp_path / "data", ("." * 20, False), ("." * 20, False))
    with pytest.raises(DatasetError, match=r"next\.success is false in all its 2 episodes"):
        Mixture([store], None, 0, 4)


def test_a_flag_that_nobody_sets_is_ignored() -> None:
    found = usable_frames(np.zeros(5, dtype=np.int64), None, np.zeros(5, dtype=bool))
    assert found.frames.all()
    assert str(found) == ""


def test_held_out_interventions_are_not_drawn(tmp_path: Path) -> None:
    demonstrations = recording(tmp_path / "demos", ("." * 30, True))
    corrections = recording(tmp_path / "corrections", *[("." * 9 + "p", True)] * 12)
    stores = [demonstrations, corrections]
    mixture = Mixture(stores, shared_weights(stores, 0.5), 0, 4, [0.0, 0.5])
    assert len(mixture.rows[1]) == 6
    assert len(drawn(mixture)) == 20 * 64


def test_inspect_says_what_is_imitated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording(tmp_path / "data", ("." * 20, False), ("." * 20, True))
    inspect(InspectConfig(str(tmp_path / "data"), str(tmp_path / "shown.png"), minutes=0))
    shown = capsys.readouterr().out
    assert "20 of 40 frames are imitated: 1 episode failed." in shown
    assert "Ignored by training" not in shown


def test_inspect_refuses_what_training_refuses(tmp_path: Path) -> None:
    recording(tmp_path / "data", ("." * 20, False), ("." * 20, False))
    with pytest.raises(DatasetError, match="cannot be trained on: 1 fault"):
        inspect(InspectConfig(str(tmp_path / "data"), str(tmp_path / "shown.png"), minutes=5))


def test_chunks_to_compare_begin_where_a_person_takes_over(tmp_path: Path) -> None:
    store = recording(tmp_path / "data", ("..ppppp..p", True), ("pp.......p", False))
    begins = np.flatnonzero((in_run(store, store.shown) % 4 == 0) & store.shown)
    assert begins.tolist() == [2, 6, 9, 10, 19]


def test_episodes_left_out_leave_the_others_as_they_are(tmp_path: Path) -> None:
    store = recording(tmp_path / "data", ("..pp", True), ("....", True), (".pp.", True))
    rest = without_episodes(store, [0])
    assert rest.shown.tolist() == [False] * 5 + [True, True, False]
    assert rest.usable is not None
    assert rest.usable.end[rest.shown].tolist() == [7, 7]
    assert rest.episode_end[rest.shown].tolist() == [7, 7]  # where chunks are cut


def test_of_a_recording_with_interventions_only_these_are_learnt(
    studio: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(root: str, **options: Any) -> FrameStore:
        store = open_dataset(root, **options)
        if root == str(studio.other):
            store.usable = usable_frames(store.episode, np.arange(len(store)) % 10 >= 5, None)
        return store

    monkeypatch.setattr("ceed_vla.training.distill_data.open_dataset", opened)
    places = (str(studio.trajectories), f"{studio.demo},{studio.other}", str(studio.teacher))
    policy, pre, _ = ceed_vla.load(studio.teacher)
    data = StoredData(
        *places, policy, pre, eval_frames=16, intervention_weight=0.4, corrections_only=True
    )
    for rows in (data.rows, data.held_out):
        person = data.frame[rows[data.root[rows] == 1]] % 10 >= 5
        assert len(person)
        assert person.all()
    drawn = data.draw(4000, np.random.default_rng(0), 0)
    assert np.mean(data.root[drawn] == 1) == pytest.approx(0.4, abs=0.03)
