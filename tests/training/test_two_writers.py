"""Two processes of one run or collection: the second is refused, the first ends as if alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ceed_vla.cli.entry import main
from ceed_vla.errors import ConfigError
from ceed_vla.locks import lock_file
from ceed_vla.training.axes.learned import ReinforceConfig, reinforce
from ceed_vla.training.distill import distill
from ceed_vla.training.teacher import train
from ceed_vla.training.trajectories import collect, read_trajectories
from tests.helpers.holders import go_on, holder, stopped_writer


@pytest.mark.slow
def test_runs(studio: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = studio.train_config(folder, grounding_steps=0, steps=3, save_every=1)
    train(options)
    resumed = replace(options, steps=6, resume=True)
    with stopped_writer(folder, train, resumed) as first:
        who = f"another process is writing there: process {first.pid} on"
        for second in (resumed, replace(resumed, resume=False)):
            with pytest.raises(ConfigError, match=who):
                train(second)
        assert go_on(first) == 0
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    with stopped_writer(folder, train, replace(resumed, steps=9)) as first:
        first.kill()
        first.join()
        assert lock_file(folder).exists()
        train(replace(resumed, steps=9))
    assert not lock_file(folder).exists()


def test_every_command_of_training_is_refused(
    studio: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    beside = [f"--policy_path={studio.teacher}", f"--roots={studio.demo}", f"--output_dir={folder}"]
    with holder(folder) as first:
        who = f"another process is writing there: process {first.pid} on"
        for function, options in (
            (train, studio.train_config(folder)),
            (distill, studio.distill_config(folder)),
            (collect, studio.collect_config(folder)),
        ):
            with pytest.raises(ConfigError, match=who):
                function(options)  # type: ignore[operator]
        with pytest.raises(ConfigError, match=who):
            reinforce(ReinforceConfig(str(studio.teacher), str(folder)), None)
        for words in (["exits", "--layers=[1]"], ["context"], ["open-loop"]):
            assert main([*words, *beside]) == 1
            assert who in capsys.readouterr().err
        assert (
            main(["convert", f"--path={tmp_path}", "--from=openvla", f"--output_dir={folder}"]) == 1
        )
        assert who in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.slow
def test_processes_collect_their_own_shards_side_by_side(studio: Any, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    options = [studio.collect_config(folder, num_shards=2, shard_index=index) for index in range(2)]
    with stopped_writer(folder, collect, options[0], part="0-of-2") as first:
        with pytest.raises(ConfigError, match=f"process {first.pid} on"):
            collect(options[0])
        collect(options[1])
        assert go_on(first) == 0
    assert len(read_trajectories(folder).frame) == 63
