"""Two processes with one output folder: the second is refused, and the first finishes intact.

After a killed process, the next one may use the folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ceed_vla.checkpoints import load, save
from ceed_vla.errors import ConfigError
from ceed_vla.locks import lock_file
from ceed_vla.sim.calibrate import CalibrateConfig, calibrate
from ceed_vla.sim.episode_log import EPISODES
from ceed_vla.sim.evaluate import evaluate
from ceed_vla.sim.record import record
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from ceed_vla.sim.tune import TuneConfig, tune
from tests.helpers.episodes import short_evaluation
from tests.helpers.holders import go_on, stopped_writer


def calibrate_config(checkpoint: Path, folder: Path, **changes: Any) -> CalibrateConfig:
    env = CeedTabletopEnv(task="push_cube", episode_length=8)
    config = CalibrateConfig(
        CheckpointPath(str(checkpoint)), env=env, output_dir=str(folder), threads=1
    )
    return replace(config, **{"decoders": "cap1", "episodes": 3, "batch": 1, **changes})


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


def refused(first: Any, function: Callable[..., Any], *arguments: Any) -> None:
    """Assert that `function` is refused because of the process `first`, which is named."""
    message = rf"another process is writing there: process {first.pid} on .* since .*\. Wait until"
    with pytest.raises(ConfigError, match=message):
        function(*arguments)


@pytest.mark.slow
def test_recordings(config: Any, tmp_path: Path) -> None:
    from ceed_vla.data.frames import open_dataset

    options = config(tmp_path / "set", episodes=3, commit_frames=1, resume=True)
    with stopped_writer(options.root, record, options) as first:
        refused(first, record, options)
        assert go_on(first) == 0
    frames = len(open_dataset(options.root))
    assert json.loads((options.root / "meta" / "info.json").read_text())["total_frames"] == frames
    longer = replace(options, episodes=6)
    with stopped_writer(longer.root, record, longer) as first:
        first.kill()
        first.join()
        assert lock_file(longer.root).exists()
        summary = record(longer)
    assert (summary.attempts, summary.frames) == (6, len(open_dataset(longer.root)))
    assert not lock_file(longer.root).exists()


@pytest.mark.slow
def test_evaluations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = short_evaluation(
        tiny_checkpoint, tmp_path / "run", decoders="ar,ceed", episodes=3, batch=1, resume=True
    )
    with stopped_writer(tmp_path / "run", evaluate, options, None) as first:
        refused(first, evaluate, options, quiet())
        assert go_on(first) == 0
    lines = (tmp_path / "run" / EPISODES).read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    assert json.loads((tmp_path / "run" / "report.json").read_text())["complete"] is True
    assert evaluate(options, quiet())["decoders"]["ar"]["episodes"] == 3
    assert not lock_file(tmp_path / "run").exists()


@pytest.mark.slow
def test_calibrations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = calibrate_config(tiny_checkpoint, tmp_path / "run")
    with stopped_writer(tmp_path / "run", calibrate, options) as first:
        refused(first, calibrate, options)
        assert go_on(first) == 0
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["decoders"].keys() == {"cap1"}


# ---- what calibrate and tune write ---------------------------------------------------------------


def test_a_link_to_the_policy_or_to_a_users_folder_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    policy = shutil.copytree(tiny_checkpoint, tmp_path / "policy")
    before = {file.name: file.read_bytes() for file in policy.iterdir()}
    searched = TuneConfig(CheckpointPath(str(policy)), output_dir=str(tmp_path / "out"), save=True)
    measured = calibrate_config(policy, tmp_path / "out", decoders="")
    for target in (policy, tmp_path / "user"):
        target.mkdir(exist_ok=True)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "checkpoint").symlink_to(target)
        for function, options in ((calibrate, measured), (tune, searched)):
            with pytest.raises(
                ConfigError, match=f"holds checkpoint, a link to {re.escape(str(target))}"
            ):
                function(options)  # type: ignore[operator]
        (tmp_path / "out" / "checkpoint").unlink()
    assert before == {file.name: file.read_bytes() for file in policy.iterdir()}
    assert list((tmp_path / "user").iterdir()) == []


def test_the_policy_itself_and_a_users_weights_are_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    policy = shutil.copytree(tiny_checkpoint, tmp_path / "out" / "checkpoint")
    for own in (policy, tiny_checkpoint):
        message = "an input" if own == policy else "'checkpoint' that ceed-vla did not make"
        with pytest.raises(ConfigError, match=message):
            calibrate(calibrate_config(own, tmp_path / "out", decoders=""))
        with pytest.raises(ConfigError, match=message):
            tune(TuneConfig(CheckpointPath(str(own)), output_dir=str(tmp_path / "out"), save=True))
    assert {file.name for file in policy.iterdir()} == {
        file.name for file in tiny_checkpoint.iterdir()
    }


@pytest.mark.slow
def test_a_calibration_replaces_its_own_checkpoint_and_no_other(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    options = calibrate_config(
        tiny_checkpoint, folder, decoders="", signals=["agree"], epsilons=[0.5], episodes=1
    )
    report = calibrate(options)
    written = folder / "checkpoint" / "model.safetensors"
    assert "checkpoint/model.safetensors" in report["written"]
    calibrate(options)
    earlier = {name: value for name, value in report.items() if name != "written"}
    # of an earlier version, or of a killed run
    (folder / "calibration.json").write_text(json.dumps(earlier))
    calibrate(options)
    load(folder / "checkpoint")
    written.write_bytes(b"a user's own")
    with pytest.raises(ConfigError, match=r"model\.safetensors' that ceed-vla did not make"):
        calibrate(options)
    assert written.read_bytes() == b"a user's own"


# ---- takeovers -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_takeovers_are_of_one_policy(
    config: Any, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = shutil.copytree(tiny_checkpoint, tmp_path / "policy")
    options = config(
        tmp_path / "set",
        episodes=1,
        mode="takeover",
        batch=1,
        policy_path=policy,
        max_chunks=1,
        resume=True,
    )
    record(options)
    progress = options.root / "recording.json"
    record(replace(options, episodes=2))
    torch.manual_seed(1)
    other, pre, post = load(policy)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    save(policy, other, pre, post)
    before = progress.read_bytes()
    with pytest.raises(ConfigError, match="its weights or settings have changed"):
        record(replace(options, episodes=3))
    assert progress.read_bytes() == before
    stored = json.loads(before)
    del stored["progress"]["config"]["policy"]  # as earlier versions wrote it
    progress.write_text(json.dumps(stored))
    assert record(replace(options, episodes=3)).attempts == 3
    assert "does not record the policy weights of its first run" in caplog.text


def test_a_round_of_other_weights_is_recorded_anew(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import ceed_vla.sim.hooks
    from ceed_vla.checkpoint_files import fingerprint

    roots: list[Path] = []

    class Nothing:
        frames = 1

    def note(options: Any) -> Any:
        roots.append(options.root)
        return Nothing()

    monkeypatch.setattr(ceed_vla.sim.hooks, "record", note)
    monkeypatch.setattr(
        ceed_vla.sim.hooks, "recorded_policy", {tmp_path / "round_0": "another"}.get
    )
    recorder = ceed_vla.sim.hooks.TakeoverRecorder(CeedTabletopEnv(task="push_cube"), 1, 30_000, 2)
    recorder(tiny_checkpoint, 0, tmp_path)
    recorder(tiny_checkpoint, 1, tmp_path)
    assert roots == [
        tmp_path / f"round_0_{fingerprint(str(tiny_checkpoint))}",
        tmp_path / "round_1",
    ]
