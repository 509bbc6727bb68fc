"""`ceed-vla grounding`: errors by distance, and refused options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot.envs.configs import PushtEnv

from ceed_vla.cli.entry import main
from ceed_vla.errors import ConfigError, ObservationError, SimulationError
from ceed_vla.outputs import is_own
from ceed_vla.sim.grounding import GroundingConfig, error_rows, grounding
from ceed_vla.sim.settings import CheckpointPath


def test_errors_are_listed_by_distance() -> None:
    truth = np.zeros((4, 8), np.float32)
    truth[:, 0] = (0.05, 0.12, 0.12, 0.3)
    found = truth.copy()
    found[1, 1] += 0.02  # 2 cm beside the cube
    found[3, 5] += 0.05  # 5 cm before the goal
    rows = error_rows(found, truth, [0.1, 0.2], {"target": (0, 3), "goal": (5, 8)})
    assert [row["frames"] for row in rows] == [1, 2, 1, 4]
    assert [row["target_p50_cm"] for row in rows] == pytest.approx([0, 1, 0, 0], abs=0.01)
    assert rows[2]["goal_p50_cm"] == pytest.approx(5, abs=0.01)
    assert rows[0]["distance_m"] == [0.0, 0.1]
    assert rows[-1]["distance_m"] == [0.0, None]


def test_the_shipped_teacher_sees_the_named_cube(tmp_path: Path) -> None:
    output = tmp_path / "grounding.json"
    assert main(["grounding", "--policy.path=teacher", "--scenes=40", f"--output={output}"]) == 0
    assert is_own(output)
    row = json.loads(output.read_text())["rows"][-1]
    assert row["frames"] == 40
    assert row["target_p50_cm"] < 0.4 * row["chance_cm"]


def test_scattered_scenes_must_be_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ceed_vla.sim.tabletop.env.TabletopEnv.observe")
    with pytest.raises(SimulationError, match="observe"):
        grounding(GroundingConfig(CheckpointPath("teacher"), scenes=1))


def test_a_policy_is_told_the_words_that_are_given() -> None:
    with pytest.raises(ObservationError, match="nonsense"):
        grounding(GroundingConfig(CheckpointPath("teacher"), scenes=1, instruction="nonsense"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"policy": CheckpointPath()}, "--policy.path is missing"),
        ({"scenes": 0}, r"--scenes is 0; it must be a whole number in \[1, 100000\]"),
        ({"edges": [0.2, 0.1]}, "increasing distances"),
        ({"edges": [0.1, 0.1]}, "increasing distances"),
        ({"edges": [-0.1]}, "--edges is"),
        ({"edges": [float("nan")]}, "--edges is"),
        ({"env": PushtEnv()}, "lacks `privileged`"),
        ({"device": "tpu"}, "The device is 'tpu'"),
        ({"output": " "}, "--output is empty"),
        ({"output": "."}, "which is a folder"),
        ({"output": "x.txt"}, r"must end in \.json"),
        ({"output": "theirs.json"}, "a file that ceed-vla did not make"),
    ],
)
def test_refusals(
    config: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("theirs.json").write_text("{}")
    with pytest.raises(ConfigError, match=words):
        grounding(GroundingConfig(**{"policy": CheckpointPath("teacher"), **config}))
    assert Path("theirs.json").read_text() == "{}"
