"""`ceed-vla inspect`: its report about data made for the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ceed_vla.data.writer import DatasetWriter
from ceed_vla.errors import CeedVLAError, DatasetError
from ceed_vla.training.inspection import InspectConfig, inspect

NAMES = {"observation.state": ["x", "y"], "action": ["dx", "grip", "rare", "wide", "same"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of 20 frames; the second stands still for 12 of its 19 steps."""
    folder = tmp_path_factory.mktemp("data") / "set"
    features: dict[str, Any] = {
        name: {"dtype": "float32", "shape": (len(n),), "names": n} for name, n in NAMES.items()
    }
    features["observation.image"] = {
        "dtype": "image",
        "shape": (8, 10, 3),
        "names": ["height", "width", "channels"],
    }
    writer = DatasetWriter(folder, repo_id="local/set", fps=5, features=features, robot_type="none")
    rng = np.random.default_rng(0)
    for episode in range(3):
        frames = []
        for step in range(20):
            at = max(0, step - 12) if episode == 1 else step
            action = [rng.normal(), step % 2, step == 19, np.clip(rng.normal(), -0.5, 0.5), 3.0]
            frames.append(
                {
                    "observation.state": np.array([at, -at], np.float32),
                    "action": np.array(action, np.float32),
                    "observation.image": np.full((8, 10, 3), 10 * step, np.uint8),
                    "task": f"task {episode % 2}",
                }
            )
        writer.add_episode(frames)
    writer.commit({})
    return folder


def test_what_a_data_set_holds(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = inspect(InspectConfig(str(root), str(tmp_path / "shown.png"), minutes=0))
    assert (report["episodes"], report["frames"], report["fps"], report["instructions"]) == (
        3,
        60,
        5,
        2,
    )
    assert report["episode_frames"] == [20, 20, 20]
    assert report["cameras"] == {"observation.image": [8, 10, 3]}
    assert report["idle_episodes"] == [1]
    actions = {row["name"]: row for row in report["dimensions"]["action"]}
    assert list(actions) == NAMES["action"]
    assert actions["grip"]["distinct"] == 2
    assert actions["rare"]["near_zero"] == pytest.approx(0.95)
    assert actions["wide"]["at_ends"] > 0.5
    assert actions["same"]["distinct"] == 1
    assert report["dimensions"]["observation.state"][0]["max"] == 19
    lines = "\n".join(report["choices"])
    for words in (
        "grip, rare: two values",
        "dx: increments",
        "rare: near zero in 90%",
        "wide: at an end",
        "same: never change",
        "state 2; 5 Hz",
    ):
        assert words in lines
    said = capsys.readouterr().out
    assert "3 episodes, 60 frames at 5 Hz (20 to 20 an episode, median 20 = 4.0 s)" in " ".join(
        said.split()
    )
    assert "At rest in more than half of the frames: episode 1." in said
    with Image.open(tmp_path / "shown.png") as picture:
        assert min(picture.size) > 300


def test_what_cannot_be_inspected(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--roots is missing"):
        inspect(InspectConfig())
    with pytest.raises(CeedVLAError, match="nowhere"):
        inspect(InspectConfig(str(tmp_path / "nowhere")))
    (tmp_path / "mine.png").write_bytes(b"a picture of mine")
    with pytest.raises(CeedVLAError, match=r"mine\.png"):
        inspect(InspectConfig(str(root), str(tmp_path / "mine.png")))
    assert (tmp_path / "mine.png").read_bytes() == b"a picture of mine"
