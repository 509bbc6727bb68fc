"""The table of vla-eval's results: what it reads, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness.results import ResultsConfig, main, read_run
from ceed_vla.errors import ConfigError

LOG = (
    "Episode done: {steps} steps 31.0s | stale=40% | control=3.0/3.3Hz | env.step mean=90.0ms "
    "max={slowest}ms\n"
)


def make_run(folder: Path, arguments: str, solved: list[bool], slowest: float = 120.0) -> None:
    """Write what the recipe leaves behind: a run of one task."""
    folder.mkdir(parents=True)
    (folder / "arguments").write_text(arguments + "\n")
    episodes = [
        {"episode_id": index, "metrics": {"success": value}, "steps": 100 + index}
        for index, value in enumerate(solved)
    ]
    episodes[-1]["failure_reason"] = "timeout"
    result = {"tasks": [{"task": "pick up the soup", "episodes": episodes}]}
    (folder / f"{folder.name}_aggregate.json").write_text(json.dumps(result))
    log = "".join(LOG.format(steps=100, slowest=slowest) for _ in solved)
    (folder / "shard0.log").write_text(log)


def test_table_compares_episodes_with_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, output = tmp_path / "runs", tmp_path / "report"
    make_run(runs / "sync", "sync c ceed 4 1 0 eager", [True, True, True, False])
    make_run(runs / "late", "live c ceed 4 6 200 eager", [True, False, True, False], slowest=301)
    main(ResultsConfig(runs, output, reference="sync"))
    table = capsys.readouterr().out.splitlines()
    how = "live, ceed, eager, 200 ms, slower by 6"
    assert table[2].startswith(f"| late | {how} | 2 of 4 [15, 85] | -25.0 [")
    assert table[2].endswith("| 101 | 40 %; 4 | 1 |")  # every episode has a late step: 301 > 300
    assert table[3] == "| sync | sync, ceed, eager | 3 of 4 [30, 95] |  | 101 |  | 1 |"
    assert json.loads((output / "late.json").read_text())["tasks"][0]["task"] == "pick up the soup"
    assert (output / "live.png").stat().st_size > 1000


def test_a_run_without_a_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/arguments").write_text("sync c ceed 4 1 0 eager\n")
    with pytest.raises(ConfigError, match="no exported run"):
        read_run(tmp_path / "begun")
    with pytest.raises(ConfigError, match="no finished run"):
        main(ResultsConfig(tmp_path, tmp_path / "report"))


def test_an_unknown_reference_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/sync", "sync c ceed 4 1 0 eager", [True])
    with pytest.raises(ConfigError, match="choose one of sync"):
        main(ResultsConfig(tmp_path / "runs", tmp_path / "report", reference="other"))
