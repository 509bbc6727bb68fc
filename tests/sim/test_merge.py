"""Shards of an evaluation, and their merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ceed_vla.cli.entry import main
from ceed_vla.errors import ConfigError
from ceed_vla.sim.evaluate import evaluate
from ceed_vla.sim.merge import MergeConfig, merge
from tests.helpers.episodes import episodes_of
from tests.helpers.evaluations import options, quiet, save_untrained

SHARDS = 3
CHANGES: dict[str, Any] = {
    "decoders": "ar,jacobi_random,ceed",
    "delay_ms": [0.0, 150.0],
    "episodes": 7,
    "batch": 2,
    "timing_chunks": 0,
    "clips": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def shards(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of all shards."""
    root = tmp_path_factory.mktemp("shards")
    for index in range(SHARDS):
        part = {"shard_index": index, "num_shards": SHARDS}
        report = evaluate(options(checkpoint, root / str(index), **CHANGES, **part), quiet())
        assert report["decoders"]["ceed"]["episodes"] == (3 if index == 0 else 2)
    return [root / str(index) for index in range(SHARDS)]


def merged(folders: list[Path], output: Path) -> dict[str, Any]:
    return merge(MergeConfig([str(folder) for folder in folders], str(output)))


def test_the_report_is_that_of_a_run_in_one_go(
    checkpoint: Path, shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluate(options(checkpoint, tmp_path / "whole", **CHANGES), quiet())
    words = [str(folder) for folder in reversed(shards)]
    assert main(["merge", *words, "--output_dir", str(tmp_path / "merged")]) == 0
    assert "Written: " in capsys.readouterr().out
    report = json.loads((tmp_path / "merged/report.json").read_text())
    assert report.pop("command").startswith("ceed-vla merge ")
    assert whole.pop("command") == ""
    assert report == whole
    assert episodes_of(tmp_path / "merged") == episodes_of(tmp_path / "whole")
    # the merged folder is an evaluation: it can be resumed, here with nothing left to do
    config = options(checkpoint, tmp_path / "merged", **CHANGES, resume=True)
    assert evaluate(config, quiet()) == {**whole, "command": ""}


def test_times_are_those_of_the_shard_that_measured_them(
    shards: list[Path], tmp_path: Path
) -> None:
    timed = tmp_path / "timed"
    shutil.copytree(shards[1], timed)
    report = json.loads((timed / "report.json").read_text())
    report["timing"] = {"chunks": 3, "episodes": 1, "driver": "ceed"}
    report["decoders"]["ceed"]["equal_to_ar"] = 0.5
    (timed / "report.json").write_text(json.dumps(report))
    found = merged([shards[0], timed, shards[2]], tmp_path / "merged")
    assert found["timing"] == report["timing"]
    assert found["decoders"]["ceed"]["equal_to_ar"] == 0.5
    assert found["decoders"]["ceed"]["episodes"] == 7


def test_what_cannot_be_merged_is_refused(
    checkpoint: Path, shards: list[Path], tmp_path: Path
) -> None:
    def refused(folders: list[Path], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            merged(folders, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def changed(name: str, **values: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(shards[1], folder)
        report = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps({**report, **values}))
        return folder

    refused(shards[:1], "Of 3 shards, shards 1 and 2 are missing; run")
    refused([*shards, shards[1]], "are the same shard, 1; name each shard once")
    refused([shards[0], changed("partial", complete=False)], "shard 1 of 3, is not complete")
    versions = changed("versions", versions={"mujoco": "2.0"})
    refused([shards[0], versions, shards[2]], "different evaluations: their versions is")
    other = tmp_path / "other"
    part = {"shard_index": 1, "num_shards": SHARDS, "seed": 50_100}
    evaluate(options(checkpoint, other, **CHANGES, **part), quiet())
    refused([shards[0], other, shards[2]], "different evaluations: their seed is 50000 and 50100")
    whole = tmp_path / "whole"
    evaluate(options(checkpoint, whole, **{**CHANGES, "episodes": 1}), quiet())
    refused([whole], "is an evaluation without shards")
    refused([tmp_path / "none"], r"has no episodes\.jsonl")
    damaged = changed("damaged", seeds=None)
    refused([shards[0], damaged, shards[2]], "holds a damaged report")
    refused([shards[0], changed("less", decoders={}), shards[2]], "a report of other decoders")
    with pytest.raises(ConfigError, match="which is a shard; name another folder"):
        merged(shards, shards[0])
    with pytest.raises(ConfigError, match="--folders is empty"):
        MergeConfig()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"shard_index": 2, "num_shards": 2}, r"must be in \[0, 1\]"),
        ({"shard_index": 0, "num_shards": 5}, "can have at most 4 shards"),
    ],
)
def test_parts_that_cannot_be(
    checkpoint: Path, tmp_path: Path, part: dict[str, int], message: str
) -> None:
    changes = {**CHANGES, "decoders": "ar"}
    with pytest.raises(ConfigError, match=message):
        evaluate(options(checkpoint, tmp_path / "out", **changes, **part), quiet())
    assert not (tmp_path / "out").exists()
