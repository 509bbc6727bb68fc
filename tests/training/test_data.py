"""Reading datasets and drawing batches, compared with LeRobot's own reader; then all faults."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ceed_vla.data import frame_cache
from ceed_vla.data.files import read_info, read_rows
from ceed_vla.data.frames import ENVIRONMENT, FrameStore, open_dataset
from ceed_vla.errors import DatasetError, ObservationError
from ceed_vla.training.mixture import (
    Mixture,
    check_compatible,
    check_fits,
    share_target,
    state_statistics,
)

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
CHUNK = 4


def data_file(root: Path) -> Path:
    return next((root / "data").rglob("*.parquet"))


# ---- reading -------------------------------------------------------------------------------------


def test_frames_are_what_lerobot_reads(studio: Any, store: FrameStore) -> None:
    from lerobot.datasets import LeRobotDataset

    deltas = {"action": [step / 10 for step in range(CHUNK)]}
    dataset = LeRobotDataset("local/demo", root=studio.demo, delta_timestamps=deltas)
    for frame in (0, 11, 12, 13, 14, 49):
        expected = dataset[frame]
        batch = store.batch(np.array([frame]), CHUNK)
        assert batch.pop("task") == [expected["task"]]
        for name, value in batch.items():
            assert value.shape == (1, *expected[name].shape)
            torch.testing.assert_close(value[0], expected[name], msg=name)


def test_a_chunk_is_cut_at_the_end_of_its_episode(store: FrameStore) -> None:
    actions, pad = store.chunks(np.array([9, 10, 11, 13]), CHUNK)  # episode 0 has frames 0 to 13
    assert pad.tolist() == [[False] * 4, [False] * 4, [False] * 3 + [True], [False] + [True] * 3]
    assert store.action is not None
    np.testing.assert_array_equal(actions[3].numpy(), np.repeat(store.action[13:14], 4, axis=0))


def test_an_action_free_set_has_no_chunks(studio: Any) -> None:
    grounding = open_dataset(studio.grounding)
    assert grounding.action is None
    assert "action" not in grounding.batch(np.arange(2), CHUNK)
    with pytest.raises(DatasetError, match="holds no actions"):
        grounding.chunks(np.arange(2), CHUNK)


def test_processes_that_start_together_decode_once(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, decode, calls = copy / ".frames", frame_cache._decode_images, []
    shutil.rmtree(cache, ignore_errors=True)
    (cache / ".killed").mkdir(parents=True)
    (cache / "complete.json").touch()

    def slow(*arguments: Any) -> None:
        calls.append(arguments)
        time.sleep(0.3)
        decode(*arguments)

    monkeypatch.setattr(frame_cache, "_decode_images", slow)
    with ThreadPoolExecutor(3) as pool:  # each opens the folder itself, as a process does
        stores = list(pool.map(open_dataset, [copy] * 3))
    assert len(calls) == 1
    assert len({store.images[FRONT][3].tobytes() for store in stores}) == 1
    assert sorted(file.name for file in cache.iterdir() if file.name.startswith(".")) == []
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    shutil.rmtree(cache)
    (cache / ".others").mkdir(parents=True)
    (cache / "complete.json").touch()
    assert open_dataset(copy).images[FRONT][3].tobytes() == stores[0].images[FRONT][3].tobytes()
    assert (cache / ".others").is_dir()  # another process may still be writing it


def test_images_are_decoded_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_dataset(copy)
    monkeypatch.setattr(
        "ceed_vla.data.frame_cache._decode_images", lambda *_: pytest.fail("decoded again")
    )
    again = open_dataset(copy)
    np.testing.assert_array_equal(first.images[FRONT], again.images[FRONT])


def test_images_are_decoded_again_when_the_data_changed(studio: Any, copy: Path) -> None:
    before = open_dataset(copy).images[WRIST][0].copy()
    table = pq.read_table(data_file(copy))
    front = table.column_names.index(FRONT)
    # as many frames
    table = table.set_column(table.column_names.index(WRIST), WRIST, table.column(front))
    pq.write_table(table, data_file(copy))
    after = open_dataset(copy)
    np.testing.assert_array_equal(after.images[WRIST][0], after.images[FRONT][0])
    assert (after.images[WRIST][0] != before).any()


def changed_in_place(file: Path, place: int) -> None:
    """Change a byte of a file, and restore its times."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_images_that_were_changed_in_place_are_decoded_again(copy: Path) -> None:
    first = open_dataset(copy).images[FRONT].copy()
    changed_in_place(copy / ".frames" / f"{FRONT}.npy", -1)
    np.testing.assert_array_equal(open_dataset(copy).images[FRONT], first)


def test_data_that_were_changed_in_place_are_decoded_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_dataset(copy)
    info = read_info(copy)
    rows = read_rows(info, [])
    changed_in_place(data_file(copy), 1000)
    decoded = []
    monkeypatch.setattr(frame_cache, "_decode_images", lambda *_: decoded.append(copy))
    frame_cache.read_images(info, rows)
    assert decoded == [copy]


def test_a_copied_data_set_is_hashed_once_and_not_decoded(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_dataset(copy).images[FRONT][:]
    monkeypatch.setattr(frame_cache, "_decode_images", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr(frame_cache, "_UNSETTLED_NS", 0)  # no further change
    again = shutil.copytree(copy, tmp_path / "again")
    np.testing.assert_array_equal(open_dataset(again).images[FRONT], first)
    monkeypatch.setattr(frame_cache, "_described", lambda *_: pytest.fail("hashed again"))
    np.testing.assert_array_equal(open_dataset(again).images[FRONT], first)


def test_video_features_are_read(video: Path) -> None:
    from lerobot.datasets import LeRobotDataset

    images = open_dataset(video).images[FRONT]
    assert np.abs(images.reshape(8, -1).mean(1) - 30 * np.arange(8)).max() < 5
    dataset = LeRobotDataset("local/video", root=video)
    for frame in (0, 3, 4, 7):
        expected = (dataset[frame][FRONT].permute(1, 2, 0) * 255).round().byte().numpy()
        np.testing.assert_array_equal(images[frame], expected)


# ---- datasets that do not go together -----------------------------------------------------------


def changed(store: FrameStore, **fields: Any) -> FrameStore:
    return FrameStore(**{**vars(store), "root": Path("other"), **fields})


OTHERS: dict[str, tuple[Callable[[FrameStore], FrameStore], str]] = {
    "camera": (
        lambda s: changed(s, images={FRONT: s.images[FRONT], "top": s.images[WRIST]}),
        "wrist: missing",
    ),
    "image size": (
        lambda s: changed(s, images={k: v[:, ::2, ::2] for k, v in s.images.items()}),
        r"\(48, 48, 3\)",
    ),
    "state": (lambda s: changed(s, state=s.state[:, :6]), r"observation.state: \(6,\) and \(14,\)"),
    "action": (lambda s: changed(s, action=s.action[:, :6]), r"action: \(6,\)"),  # type: ignore[index]
    "no action": (lambda s: changed(s, action=None), "action: missing"),
    "fps": (lambda s: changed(s, fps=20.0), r"fps: 20\.0 and 10\.0"),
    "order": (lambda s: changed(s, labels={"action": list("bacdefg")}), "names of action"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_mixed_features_are_refused(store: FrameStore, kind: str) -> None:
    make, message = OTHERS[kind]
    store = FrameStore(**{**vars(store), "labels": {"action": list("abcdefg")}})
    with pytest.raises(DatasetError, match=message):
        check_compatible([store, make(store)])
    check_compatible([store, changed(store, labels={})])
    check_compatible([store, changed(store)])


@pytest.mark.parametrize("kind", ["camera", "state", "action"])
def test_data_that_the_policy_cannot_read_are_refused(
    studio: Any, store: FrameStore, kind: str
) -> None:
    import ceed_vla

    policy, pre, _ = ceed_vla.load(studio.teacher)
    config = policy.config
    check_fits(store, config, pre)
    check_fits(OTHERS["image size"][0](store), config, pre)  # the policy resizes
    check_fits(OTHERS["no action"][0](store), config, pre)  # grounding frames
    with pytest.raises(ObservationError, match="more than 12"):
        check_fits(
            changed(
                store, tasks=["one two three four five six seven eight nine ten eleven twelve 13"]
            ),
            config,
            pre,
        )
    config.action_names, config.control_rate = list("abcdefg"), 10.0
    for other, message in (
        ({"labels": {"action": list("gfedcba")}}, r"its action names are \['g', .* Use data"),
        ({"labels": {}, "fps": 5.0}, "its frames a second are 5.0, and the policy's 10.0"),
    ):
        with pytest.raises(DatasetError, match=message):
            check_fits(changed(store, **other), config, pre)
    check_fits(changed(store, labels={}), config, pre)  # data that do not say
    config.action_names = []  # a policy that does not
    check_fits(store, config, pre)
    config.input_features["observation.images.empty_camera_0"] = config.input_features[FRONT]
    check_fits(store, config, pre)  # LeRobot's pi0-FAST adds this camera; datasets lack it
    with pytest.raises(DatasetError, match="does not fit the policy"):
        check_fits(OTHERS[kind][0](store), config, pre)


# ---- drawing -------------------------------------------------------------------------------------


def tagged(store: FrameStore, tag: float) -> FrameStore:
    """A store whose states name store and frame."""
    state = store.state.copy()
    state[:, 0], state[:, 1] = tag, np.arange(len(store))
    return changed(store, state=state)


def drawn(mixture: Mixture, **arguments: int) -> list[tuple[float, float]]:
    batch = mixture.draw(**arguments)
    assert len(batch["task"]) == len(batch["action"]) == len(batch["observation.state"])
    return [tuple(row[:2].tolist()) for row in batch["observation.state"]]


def test_the_same_step_gives_the_same_frames(store: FrameStore) -> None:
    stores = [tagged(store, 1), tagged(store, 2)]
    one, two = (Mixture(stores, None, seed, CHUNK) for seed in (0, 0))
    assert drawn(one, size=8, step=3) == drawn(two, size=8, step=3)
    assert drawn(one, size=8, step=4) != drawn(one, size=8, step=3)
    assert drawn(Mixture(stores, None, 1, CHUNK), size=8, step=3) != drawn(one, size=8, step=3)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_draw(store: FrameStore, world: int) -> None:
    mixture = Mixture([tagged(store, 1), tagged(store, 2), tagged(store, 3)], [1, 5, 2], 0, CHUNK)
    whole = drawn(mixture, size=12, step=5)
    parts = [drawn(mixture, size=12, step=5, rank=rank, world=world) for rank in range(world)]
    assert sorted(frame for part in parts for frame in part) == sorted(whole)
    assert {len(part) for part in parts} == {12 // world}


def test_weights_are_shares_of_the_batch(store: FrameStore) -> None:
    mixture = Mixture([tagged(store, 1), tagged(store, 2)], [3, 1], 0, CHUNK)
    tags = [tag for step in range(20) for tag, _ in drawn(mixture, size=20, step=step)]
    assert tags.count(1) / len(tags) == pytest.approx(0.75, abs=0.06)


def test_statistics(studio: Any, store: FrameStore) -> None:
    other = open_dataset(studio.other)
    assert store.action is not None
    assert other.action is not None
    stats = state_statistics([store, other, open_dataset(studio.grounding)])
    actions = np.concatenate([store.action, other.action])
    np.testing.assert_allclose(
        stats["action"]["q01"], np.quantile(actions, 0.01, axis=0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(stats["action"]["max"], actions.max(0))
    states = np.concatenate([store.state, other.state, open_dataset(studio.grounding).state])
    np.testing.assert_allclose(stats["observation.state"]["mean"], states.mean(0), atol=1e-5)
    np.testing.assert_allclose(
        stats["observation.state"]["std"], states.std(0).clip(1e-3), atol=1e-5
    )


def test_a_recording_without_privileged_state_has_a_target_of_nan(studio: Any) -> None:
    told, recorded = open_dataset(studio.demo), open_dataset(studio.demo)
    target = told.environment_state
    assert target is not None
    recorded.environment_state = None
    with pytest.raises(DatasetError, match=r"differ in observation\.environment_state"):
        check_compatible([told, recorded])
    for _ in range(2):
        share_target([told, recorded])
        check_compatible([told, recorded])
        np.testing.assert_array_equal(told.environment_state, target)
        assert recorded.environment_state.shape == target.shape
        assert np.isnan(recorded.environment_state).all()
    other = replace(told, labels={**told.labels, ENVIRONMENT: ["other"] * target.shape[1]})
    told.labels[ENVIRONMENT] = ["term"] * target.shape[1]
    with pytest.raises(DatasetError, match=r"differ in the names of observation\.environment"):
        check_compatible([recorded, told, other])
    told.environment_state = None
    share_target([told, recorded])
    assert recorded.environment_state is None
