"""`ceed-vla inspect` on data with many faults: all are reported, and the command removes them."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets import LeRobotDataset, dataset_writer
from lerobot.datasets.compute_stats import compute_episode_stats
from lerobot.scripts import lerobot_edit_dataset

from ceed_vla.cli.entry import main
from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import DatasetError
from ceed_vla.training.inspection import InspectConfig, survey, verdict
from ceed_vla.training.inspection_tasks import similar_tasks
from ceed_vla.training.inspection_values import rows_of
from ceed_vla.wording import counted, numbered

FEATURES: dict[str, Any] = {
    "observation.image": {
        "dtype": "image",
        "shape": (8, 10, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "still", "y"]},
    "observation.depth": {"dtype": "float32", "shape": (4, 5), "names": ["height", "width"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["move", "rare"]},
}
LENGTHS = (120, 40, 1, 40, 40, 5)
TASKS = (
    "pick up the red cube",
    "pick up the blue cube",
    "Pick up the red  cube.",
    "pick up the red cubes",
)
NAN, INFINITE = (1, 3), 4  # episodes


def write(root: Path, features: dict[str, Any] = FEATURES) -> Path:
    """Write six episodes, one of them of a single frame, without broken values."""
    dataset = LeRobotDataset.create(f"local/{root.name}", 10, features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_writer, "compute_episode_stats", _stats_in_shape)
        for episode, length in enumerate(LENGTHS):
            for step in range(length):
                rare = {7: 1.0, 8: 0.005}.get(step, 0.0) if episode == 0 else 0.0
                values = {
                    "observation.image": np.full((8, 10, 3), step, np.uint8),
                    "observation.state": np.array([random.normal(), 0.5, step], np.float32),
                    "observation.depth": random.random((4, 5), np.float32),
                    "action": np.array([random.normal(), rare], np.float32),
                }
                frame = {name: value for name, value in values.items() if name in features}
                dataset.add_frame({**frame, "task": TASKS[episode % len(TASKS)]})
            dataset.save_episode()
    dataset.finalize()
    return root


def _stats_in_shape(*arguments: Any) -> Any:
    """LeRobot's statistics without 2-D features.

    For one frame these have another shape, on which LeRobot fails.
    """
    stats = compute_episode_stats(*arguments)
    found = stats.get("observation.depth", {})
    found.update(
        {name: np.full(5, value.mean()) for name, value in found.items() if name != "count"}
    )
    return stats


def spoil(root: Path) -> Path:
    """Put NaN into the actions of two episodes and infinity into the state of a third."""
    file = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(file)
    episode = np.array(table["episode_index"])
    for name, episodes, value in (
        ("action", NAN, np.nan),
        ("observation.state", (INFINITE,), np.inf),
    ):
        rows = table[name].to_pylist()
        for number in episodes:
            rows[int(np.flatnonzero(episode == number)[3])][0] = value
        place = table.schema.get_field_index(name)
        table = table.set_column(
            place, table.schema.field(place), pa.array(rows, table.schema.field(place).type)
        )
    pq.write_table(table, file)
    return root


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of `write`; tests must not write into it."""
    return write(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def faulty(sound: Path, tmp_path: Path) -> Path:
    return spoil(shutil.copytree(sound, tmp_path / "my set"))


def edit(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run commands of LeRobot's tool, joined by ``&&``, in this process, as imports are slow."""
    monkeypatch.setattr(lerobot_edit_dataset, "init_logging", lambda: None)
    for part in command.split(" && "):
        monkeypatch.setattr(sys, "argv", shlex.split(part))
        lerobot_edit_dataset.main()


def flat(text: str) -> str:
    return " ".join(text.split())


def test_everything_is_reported_in_one_run_and_the_command_repairs_it(
    faulty: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--minutes", "0", "--output", str(tmp_path / "picture.png")]
    assert main(["inspect", str(faulty), *options]) == 1
    printed = capsys.readouterr()
    said = flat(printed.out)
    for words in (
        "6 episodes, 246 frames at 10 Hz",
        "Verdict: cannot be trained on: 1 fault",
        "3 episodes of 6 hold values that are not finite",
        "action is NaN in 2 frames of episodes 1 and 3",
        "observation.state is infinite in 1 frame of episode 4",
        "2 (1 frame) and 5 (5 frames)",
        "Remove those episodes, into a new folder (without observation.depth, which",
        "add episode 2 to the episode_indices",
        "Ignored by training: observation.depth float32 (4, 5)",
        "'pick up the red cube' and 'Pick up the red cube.'",
        "'pick up the red cube' and 'pick up the red cubes'",
        "observation.state, dimension 'still', is constant (0.5)",
        "action, dimension 'rare', is near-constant",
        "It is sparse",
        "rare: near zero in 90%",
    ):
        assert words in said
    assert "blue" not in said[said.index("pairs of instructions") :].split(" A policy ")[0]
    assert flat(printed.err).endswith(
        f"{faulty} cannot be trained on: 1 fault; the verdict lists the remedies."
    )

    with pytest.raises(DatasetError, match=r"episodes 1 and 3.*episode_indices") as refused:
        open_dataset(faulty)
    command = re.search(r"lerobot-edit-dataset .*", printed.out)
    assert command is not None
    assert command[0] in str(refused.value)
    edit(command[0], monkeypatch)
    clean = tmp_path / "my set-clean"
    assert main(["inspect", str(clean), *options]) == 0
    said = flat(capsys.readouterr().out)
    assert "3 episodes, 126 frames" in said
    assert "Verdict: ready, " in said
    assert "remove it: lerobot-edit-dataset --repo_id local/my-set-clean" in said
    open_dataset(clean)


def test_the_report_holds_all_findings(faulty: Path, tmp_path: Path) -> None:
    report = survey(InspectConfig(str(faulty), str(tmp_path / "picture.png"), minutes=0))
    assert [(b["feature"], b["kind"], b["episodes"]) for b in report["broken"]] == [
        ("observation.state", "infinite", {4: 1}),
        ("action", "NaN", {1: 1, 3: 1}),
    ]
    assert report["short_episodes"] == {2: 1, 5: 5}
    assert report["ignored"] == ["observation.depth float32 (4, 5)"]
    assert len(report["similar_tasks"]) == 2
    assert (len(report["faults"]), len(report["warnings"])) == (1, 5)
    assert open_dataset(faulty, decode=False, strict=False).ignored == report["ignored"]


@pytest.mark.parametrize("lacking", ["observation.image", "observation.state", "action"])
def test_what_is_missing_is_a_fault(tmp_path: Path, lacking: str) -> None:
    features = {name: feature for name, feature in FEATURES.items() if name != lacking}
    root = write(tmp_path / "set", features)
    report = survey(InspectConfig(str(root), str(tmp_path / "picture.png")))
    assert {"observation.image": "camera"}.get(lacking, lacking) in report["faults"][0]


def test_how_many_steps_fit_into_the_time(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Estimate(SimpleNamespace):
        def __str__(self) -> str:
            return "5 minutes on this machine: about 90 steps"

    def estimate(stores: Any, policy: Any, minutes: float) -> Estimate:
        calls.append((len(stores), policy.chunk_size, minutes))
        return Estimate(enough=False, advice="give it an hour")

    monkeypatch.setitem(
        sys.modules, "ceed_vla.training.estimate", SimpleNamespace(estimate=estimate)
    )
    report = survey(InspectConfig(str(sound), str(tmp_path / "picture.png"), minutes=5))
    assert calls == [(1, 8, 5)]
    assert report["budget"] == "5 minutes on this machine: about 90 steps."
    assert "Time or data are scarce for 5 minutes: give it an hour." in report["warnings"]


def test_actions_that_would_be_clipped_are_a_fault(sound: Path, tmp_path: Path) -> None:
    config = InspectConfig(str(sound), str(tmp_path / "picture.png"), minutes=0)
    config.policy.action_tokens.action_range = "fixed"
    config.policy.action_tokens.action_low = [-0.1, 0.0]
    config.policy.action_tokens.action_high = [0.1, 1.0]
    report = survey(config)
    assert "of dimension 0 lie far outside" in report["faults"][0]
    assert report["choices"]


def test_similar_tasks() -> None:
    assert similar_tasks(["Push it!", "push  it", "push"]) == [("Push it!", "push  it")]
    assert similar_tasks(["grasp the handle of a drawer", "grasp handle of the drawer"])
    assert similar_tasks(
        ["grasp the colored handle of the drawer", "grasp the coloured handle of the drawer"]
    )
    assert similar_tasks(["put the red cube into the bin", "put the red cube onto the bin"]) == []
    assert similar_tasks(["put the red cube into the bin", "put the blue cube into the bin"]) == []
    assert similar_tasks(["put cube 1 into the large bin", "put cube 2 into the large bin"]) == []


def test_which_dimensions_hardly_change() -> None:
    random = np.random.default_rng(0)
    wide, glitch = random.normal(size=1000), random.normal(size=1000)
    rare, offset = np.zeros(1000), 400 + 0.01 * wide
    glitch[0], rare[:5] = 1000, 1
    rows = rows_of(
        np.stack([wide, glitch, rare, offset, np.ones(1000)], 1).astype(np.float32), None
    )
    found = [row.unchanging for row in rows]
    assert found[0] == ""
    assert "is near-constant" in found[1]
    assert "99.5 % of its values lie within 1% of its range from the median 0" in found[2]
    assert "of its largest value" in found[3]
    assert found[4] == "is constant (1)"


def test_verdicts_and_their_grammar() -> None:
    assert verdict([], []) == ["Verdict: ready for training."]
    assert verdict([], ["a"])[0] == "Verdict: ready, with 1 warning"
    assert verdict(["a", "b"], ["c"]) == [
        "Verdict: cannot be trained on: 2 faults",
        "  1. a",
        "  2. b",
        "Also 1 warning:",
        "  - c",
    ]
    assert (counted(1, "episode"), counted(1200, "frame")) == ("1 episode", "1,200 frames")
    assert numbered("episode", [3]) == "episode 3"
    assert (
        numbered("episode", list(range(12)))
        == "episodes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (12 in all)"
    )
