"""The table and the plot of vla-eval's results: what they read, and what they refuse."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.harness.late import forget_late
from benchmarks.harness.results import (
    OwnRow,
    ResultsConfig,
    live_figure,
    main,
    read_own,
    read_run,
    same_decoder,
)
from ceed_vla.errors import ConfigError

SOUP = "pick up the soup"


def make_run(folder: Path, solved: list[bool], **options: Any) -> None:
    """Write what the recipe leaves behind: a run of one task, whose ticks take 301 ms at most."""
    folder.mkdir(parents=True)
    options = {
        "mode": "sync",
        "checkpoint": "a folder/c",
        "weights": "0123456789ab",
        "decoding": "ceed",
        "episodes": len(solved),
        "tasks": 1,
        "slower": 1,
        "latency_ms": 0,
        "engine": "eager",
        **options,
    }
    (folder / "arguments").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    live = {"holds": 25, "longest_tick_ms": 301.0} if options["mode"] == "live" else {}
    episodes = [
        {"episode_id": index, "metrics": {"success": value, **live}, "steps": 100}
        for index, value in enumerate(solved)
    ]
    episodes[-1]["failure_reason"] = "timeout"
    result = {"tasks": [{"task": SOUP, "episodes": episodes}]}
    (folder / f"{folder.name}_aggregate.json").write_text(json.dumps(result))
    with closing(sqlite3.connect(folder / f"recording-{folder.name}.sqlite")) as database:
        database.execute("CREATE TABLE episode_results (sid, eid, task_name, episode_id)")
        database.execute("CREATE TABLE step_rows (sid, eid, step_id, fields)")
        for index, value in enumerate(solved):
            database.execute(
                "INSERT INTO episode_results VALUES (0, ?, ?, ?)", (index, SOUP, index)
            )
            for step in (1, 0):
                action = json.dumps({"action": [float(value), step]})
                database.execute("INSERT INTO step_rows VALUES (0, ?, ?, ?)", (index, step, action))
        database.commit()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_compares_episodes_with_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, output = tmp_path / "runs", tmp_path / "report"
    make_run(runs / "sync", [True, True, True, False])
    late = {"mode": "live", "latency_ms": 200}
    make_run(runs / "late", [True, False, True, False], slower=5, **late)
    make_run(runs / "prompt", [True, True, True, False], slower=6, **late)
    main(ResultsConfig(runs, output, reference="sync"))
    rows = [cells(line) for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0] == [
        "late",
        "live, ceed, eager, 200 ms, slower by 5",
        "2 of 4 [15, 85]",
        "100",
        "-25.0 [-65.5, +32.0], 4 episodes, 3 with equal actions",
        "",
        # 301 ms are late for ticks of 250 ms, not for those of 300 ms
        "25 % held, 4 late, 1 errors",
    ]
    assert rows[1][4] == "+0.0 [-42.7, +42.7], 4 episodes, 4 with equal actions"
    assert rows[1][6] == "25 % held, 0 late, 1 errors"
    assert rows[2][1:] == ["sync, ceed, eager", "3 of 4 [30, 95]", "100", "", "", "1 errors"]
    assert json.loads((output / "late.json").read_text())["tasks"][0]["task"] == SOUP
    assert (output / "live.png").stat().st_size > 1000


def test_the_table_and_the_plot_have_our_own_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seeds go through the ten tasks first, then through the initial states."""
    runs, own = tmp_path / "runs", tmp_path / "own"
    make_run(runs / "sync", [True, True, False])
    make_run(runs / "ar", [True, False, True], decoding="ar")
    own.mkdir()
    lines = [
        {"decoder": decoder, "seed": 50_000 + 10 * state, "instruction": SOUP, "success": success}
        for decoder, state, success in (
            ("ceed", 0, True),
            ("ceed", 1, False),
            ("teacher_ar", 0, True),
            ("ceed@100ms", 0, False),
        )
    ]
    identity = {
        "env": ["--env.type=ceed_libero"],
        "decoders": {"ceed": {}, "teacher_ar": {}, "ceed@100ms": {"delay": 2}},
    }
    text = "".join(json.dumps(line) + "\n" for line in [{"identity": identity}, *lines])
    (own / "episodes.jsonl").write_text(text + '{"decoder": "ceed", "se')  # an interrupt
    main(ResultsConfig(runs, tmp_path / "report", own=str(own)))
    rows = [cells(line) for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0][5].startswith("+0.0 [")
    assert rows[0][5].endswith("], 1 episodes")
    assert rows[1][5].startswith("+50.0 [")
    assert rows[-1] == ["ceed@100ms", "0 of 1 [0, 79]", rows[-1][2], ""]
    assert rows[-1][2].startswith("-100.0 [")
    ours = {
        "ceed": OwnRow({(SOUP, 0): True}),  # its steps are not known
        "ceed@100ms": OwnRow({(SOUP, 0): False}, delay=2),
        "ceed@measured": OwnRow({(SOUP, 0): True}, [80, 90, 130], delay=4),
        "teacher_ar": OwnRow(),
    }
    axes, time = live_figure([], ours).axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[0, 100], [100, 0], [200, 100]]
    assert time.get_lines()[0].get_ydata()[2] == 90
    assert [math.isnan(steps) for steps in time.get_lines()[0].get_ydata()] == [True, True, False]
    assert axes.get_legend().get_texts()[0].get_text() == (
        "our own evaluation, delayed (1 episodes a point)"
    )
    for folders, why in (
        (str(tmp_path), "has no episodes.jsonl"),
        (f"{own},{own}", "has ceed, as an earlier folder"),
    ):
        with pytest.raises(ConfigError, match=why):
            main(ResultsConfig(runs, tmp_path / "report", own=folders))
    three = "--env.task=libero_object/0,libero_object/3,libero_object/5"

    def write(*flags: str) -> None:
        header = {"identity": {**identity, "env": ["--env.type=ceed_libero", *flags]}}
        text = "".join(json.dumps(line) + "\n" for line in [header, *lines[:2]])
        (own / "episodes.jsonl").write_text(text)

    write("--env.states=sampled")
    with pytest.raises(ConfigError, match="not of LIBERO's official initial states"):
        read_own(str(own))
    write(three)
    assert list(read_own(str(own))) == ["ceed"]  # the others have no episode yet
    found = {state for _, state in read_own(str(own))["ceed"].solved}
    assert found == {50_000 // 3 % 50, 50_010 // 3 % 50}


def test_a_decoder_of_two_policies_is_refused() -> None:
    student, teacher = OwnRow({(SOUP, 0): True}), OwnRow({(SOUP, 0): False})
    own = {"ceed": student, "teacher_ar": teacher}
    assert same_decoder(own, "ar") is teacher
    assert same_decoder(own, "ceed") is student
    assert same_decoder(own, "cap1") is None
    with pytest.raises(ConfigError, match="ar and teacher_ar, of two policies"):
        same_decoder({**own, "ar": student}, "ar")


def test_a_run_without_a_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/arguments").write_text("mode sync\n")
    with pytest.raises(ConfigError, match="no exported run"):
        read_run(tmp_path / "begun")
    with pytest.raises(ConfigError, match="no finished run"):
        main(ResultsConfig(tmp_path, tmp_path / "report"))
    make_run(tmp_path / "part", [True], episodes=2)
    with pytest.raises(ConfigError, match="1 of 2 episodes"):
        read_run(tmp_path / "part")


def test_an_unknown_reference_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/sync", [True])
    with pytest.raises(ConfigError, match="choose one of sync"):
        main(ResultsConfig(tmp_path / "runs", tmp_path / "report", reference="other"))


class Benchmark:
    """What `LiveLIBERO` adds to: an environment whose step takes 30 ms at the second tick."""

    def reset(self, task: Any) -> str:
        self.steps: list[Any] = []
        return "observation"

    def step(self, action: Any) -> None:
        self.steps.append(action)

    def make_obs(self, raw_obs: Any, task: Any) -> dict[str, Any]:
        return {"state": raw_obs}

    def get_step_result(self, step_result: Any) -> dict[str, Any]:
        return {"success": True}


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of `LiveLIBERO`, with a stub of vla-eval, which is not installed here."""
    stub = ModuleType("vla_eval.benchmarks.libero.benchmark")
    stub.LIBEROBenchmark = Benchmark  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "harness")
    import libero_live  # type: ignore[import-not-found]

    yield libero_live
    del sys.modules["libero_live"]


def test_a_live_episode_tells_when_it_held(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = live.LiveLIBERO()
    assert benchmark.get_hold_action(None) == {"actions": [0.0] * 6 + [-1.0]}
    clock = iter([1.0, 1.31, 1.5])
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    assert benchmark.reset({}) == "observation"
    assert benchmark.make_obs("a", {}) == {"state": "a", "held": False}
    hold = benchmark.get_hold_action({"actions": [0.5] * 6 + [1.0]})
    assert hold == {"actions": [0.0] * 6 + [1.0]}
    benchmark.step(hold)
    assert benchmark.make_obs("b", {}) == {"state": "b", "held": True}
    benchmark.step({"actions": [0.5] * 7})
    assert benchmark.make_obs("c", {}) == {"state": "c", "held": False}
    benchmark.step(benchmark.get_hold_action(None))
    assert benchmark.get_step_result(None) == {
        "success": True,
        "holds": 2,
        "longest_tick_ms": 310.0,
    }


def test_late_episodes_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "live"
    folder.mkdir()
    (folder / "arguments").write_text("mode live\nepisodes 2\nslower 10\n")
    with closing(sqlite3.connect(folder / "recording-live.sqlite")) as database:
        database.executescript(
            "CREATE TABLE episode_results (sid, eid, eval_id, metrics, context);"
            "CREATE TABLE step_rows (sid, eid);"
            "CREATE TABLE work_queue (eval_id, item, shard_id, done);"
            "CREATE TABLE eval_shards (eval_id, complete);"
            "INSERT INTO eval_shards VALUES ('e', 1);"
        )
        for item, tick in enumerate((502.0, 530.0, 525.0, 900.0)):
            metrics = json.dumps({"longest_tick_ms": tick})
            context = json.dumps({"task_idx": item // 2, "episode_idx": item % 2})
            values = (f"{item}", metrics, context)
            database.execute("INSERT INTO episode_results VALUES ('s', ?, 'e', ?, ?)", values)
            database.execute("INSERT INTO step_rows VALUES ('s', ?)", (f"{item}",))
            database.execute("INSERT INTO work_queue VALUES ('e', ?, 0, 1)", (item,))
        database.commit()
    assert forget_late(folder) == 2
    assert forget_late(folder) == 0
    with closing(sqlite3.connect(folder / "recording-live.sqlite")) as database:
        kept = [row[0] for row in database.execute("SELECT eid FROM episode_results")]
        assert kept == [row[0] for row in database.execute("SELECT eid FROM step_rows")]
        assert kept == ["0", "2"]
        waiting = database.execute(
            "SELECT item FROM work_queue WHERE done = 0 AND shard_id IS NULL"
        )
        assert [row[0] for row in waiting] == [1, 3]
        assert database.execute("SELECT complete FROM eval_shards").fetchall() == [(0,)]
