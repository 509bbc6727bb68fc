"""The episode file: changes are detected, and files of earlier versions can be resumed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ceed_vla.errors import ConfigError
from ceed_vla.sim.episode_log import EPISODES, _difference
from ceed_vla.sim.evaluate import evaluate
from tests.helpers.episodes import as_of_before, episodes_of, short_evaluation


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


def lines_of(folder: Path) -> list[str]:
    return (folder / EPISODES).read_text().splitlines()


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete evaluation."""
    folder = tmp_path_factory.mktemp("finished")
    evaluate(short_evaluation(tiny_checkpoint, folder), quiet())
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [lines[0], lines[1][:-5], lines[2]], "line 2, or a line before it, was"),
        (
            lambda lines: [lines[0], lines[1][: len(lines[1]) // 2], lines[2]],
            "line 2 is not an episode",
        ),
        (
            lambda lines: [lines[0], lines[1].replace("false", "true", 1), lines[2]],
            "line 2, or a line",
        ),
        (
            lambda lines: [lines[0], lines[1].replace('"steps": 8', '"steps": 7'), lines[2]],
            "line 2, or",
        ),
        (lambda lines: [lines[0], lines[2]], "line 2, or a line before it, was changed"),
        (lambda lines: [lines[0], lines[2], lines[1]], "line 2, or a line before it"),
        (
            lambda lines: [lines[0], re.sub(r', "check.*"', "", lines[1])],
            "line 2, or a line before it",
        ),
        (
            lambda lines: [lines[0].replace("ceed-vla ", "ceed-vla 9"), *lines[1:]],
            "line 2, or a line",
        ),
        (
            lambda lines: [lines[0].replace('"chained": true, ', ""), *lines[1:]],
            "line 2 is not an episode",
        ),
        (
            lambda lines: [lines[0], lines[1], lines[1]],
            "line 3 is not an episode of this evaluation, or is a duplicate",
        ),
        (
            lambda lines: [lines[0], lines[1].replace('"success": false', '"success": "yes"')],
            "line 2",
        ),
        (lambda lines: [lines[0], lines[1].replace('"steps": 8', '"steps": 9')], "line 2"),
        (lambda lines: [lines[0], lines[1].replace('"seed": 5', '"seed": 4')], "line 2"),
        (
            lambda lines: [lines[0], lines[1].replace('"forwards": [', '"forwards": [-1, ')],
            "line 2",
        ),
        (
            lambda lines: [lines[0], lines[1].replace('"decoder": "ceed"', '"decoder": "ar"')],
            "line 2",
        ),
        (lambda lines: [lines[0], "5", lines[2]], "line 2"),
        (lambda lines: [lines[0], "[" * 10_000, lines[2]], "line 2"),
        (lambda lines: lines[1:], "'episodes.jsonl' that ceed-vla did not make"),
        (lambda lines: ["made by ceed-vla 1", *lines[1:]], "does not identify its evaluation"),
        (
            lambda lines: [lines[0].replace('"seed": 50000', '"seed": 50001'), *lines[1:]],
            "its seed is 50001, here",
        ),
        (
            lambda lines: [lines[0].replace('"batch": 20', '"batch": 7'), *lines[1:]],
            "its batch is 7",
        ),
        (
            lambda lines: [re.sub('"mujoco": "[^"]*"', '"mujoco": "2"', lines[0]), *lines[1:]],
            "was written with mujoco 2 instead of",
        ),
        (
            lambda lines: [re.sub('"versions": {[^}]*}', '"versions": 3', lines[0]), *lines[1:]],
            "was written by unknown software",
        ),
    ],
)
def test_damaged_episodes_are_refused(
    tiny_checkpoint: Path,
    finished: Path,
    tmp_path: Path,
    change: Callable[[list[str]], list[str]],
    words: str,
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / EPISODES).write_text("\n".join(change(lines_of(finished))) + "\n")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    config = short_evaluation(tiny_checkpoint, tmp_path / "run", resume=True)
    with pytest.raises(ConfigError) as error:
        evaluate(config, quiet())
    assert words in str(error.value)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_episodes_without_checksums_are_resumed(
    tiny_checkpoint: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    as_of_before(folder)
    before = episodes_of(folder)[:-1]
    (folder / EPISODES).write_text("\n".join([*lines_of(folder)[:-1], ""]))
    config = short_evaluation(tiny_checkpoint, folder, resume=True)
    report = evaluate(config, quiet())
    assert report["decoders"] == json.loads((finished / "report.json").read_text())["decoders"]
    assert "was written by an earlier version: its lines have no checksums" in caplog.text
    assert lines_of(folder) == lines_of(finished)  # with checksums from now on
    assert before == episodes_of(folder)[:-1]
    caplog.clear()
    evaluate(config, quiet())
    assert "checksums" not in caplog.text


def test_the_difference_of_two_evaluations_is_named() -> None:
    ours = {"ar": {"delay": 1, "window": None}}
    found = _difference("decoders", {"ar": {"delay": 2, "window": None}}, ours)
    assert found == "its decoders.ar.delay is 2, here it is 1"
    found = _difference("decoders", {"ar": {"delay": 1}}, ours)  # of an older version
    assert found == "its decoders.ar.window is missing, here it is None"
