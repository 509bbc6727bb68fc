"""A recording that is refused, or fails before anything is stored, leaves no folder behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ceed_vla.errors import CheckpointError, ConfigError, SimulationError
from ceed_vla.sim.record import record
from ceed_vla.sim.tabletop.env import TabletopEnv


def rows(root: Path) -> list[dict[str, Any]]:
    return [
        row
        for path in sorted(root.glob("data/*/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


@pytest.mark.parametrize(
    ("options", "lacking", "error", "message"),
    [
        (
            {"mode": "grounding"},
            "scatter",
            SimulationError,
            r"lacks scatter\(\), which mode grounding needs",
        ),
        (
            {"mode": "grounding"},
            "retarget",
            SimulationError,
            r"lacks retarget\(\), which --poses_per_scene",
        ),
        (
            {"mode": "takeover", "policy_path": Path("student"), "executed_steps": 99},
            "",
            ConfigError,
            "steps is 99",
        ),
        ({"mode": "takeover", "policy_path": Path("nowhere")}, "", CheckpointError, "nowhere"),
        (
            {"mode": "takeover", "policy_path": Path("student"), "env": {"cameras": ["front"]}},
            "",
            ConfigError,
            "reads or writes observation.images.wrist",
        ),
    ],
)
def test_a_refused_recording_makes_no_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Any,
    options: dict[str, Any],
    lacking: str,
    error: type[Exception],
    message: str,
) -> None:
    def made(*_: Any, **__: Any) -> None:
        raise AssertionError("The folder is made before the recording is refused.")

    monkeypatch.setattr("ceed_vla.sim.record.DatasetWriter", made)
    if lacking:
        monkeypatch.delattr(TabletopEnv, lacking)
    with pytest.raises(error, match=message):
        record(config(tmp_path / "sets/new", **options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("error", [SimulationError("the arm broke"), KeyboardInterrupt()])
def test_a_new_folder_goes_where_the_first_attempt_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Any,
    existed: bool,
    error: BaseException,
) -> None:
    def broken(*_: Any) -> None:
        assert (root / "meta/info.json").is_file()
        raise error

    root = tmp_path / "sets/new"
    if existed:
        root.mkdir(parents=True)
    monkeypatch.setattr("ceed_vla.sim.record.expert_attempt", broken)
    with pytest.raises(type(error)):
        record(config(root))
    assert list(tmp_path.rglob("*")) == ([root.parent, root] if existed else [])


def test_a_folder_that_holds_something_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any
) -> None:
    root = tmp_path / "set"

    def noted(*_: Any) -> None:
        (root / "notes.txt").write_text("somebody's")
        raise SimulationError("the arm broke")

    with monkeypatch.context() as patch:
        patch.setattr("ceed_vla.sim.record.expert_attempt", noted)
        with pytest.raises(SimulationError, match="the arm broke"):
            record(config(root))
    assert (root / "notes.txt").read_text() == "somebody's"
    (root / "notes.txt").unlink()
    assert record(config(root, episodes=1, resume=True)).attempts == 1

    def broken(*_: Any) -> None:
        raise SimulationError("the arm broke")

    before = rows(root)
    monkeypatch.setattr("ceed_vla.sim.record.expert_attempt", broken)
    with pytest.raises(SimulationError, match="the arm broke"):
        record(config(root, episodes=2, resume=True))
    assert rows(root) == before
