"""An environment with an expert in one file outside the package: record, train, evaluate."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from ceed_vla.cli.entry import main

OWN_ENV = Path(__file__).resolve().parents[2] / "examples" / "own_environment.py"
SIZES = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 32, "stem_channels": "[8, 8, 8, 8]"}


@pytest.mark.slow
@pytest.mark.usefixtures("own_precision")
@pytest.mark.timeout(900)
def test_an_environment_of_ones_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "own_env.py").write_bytes(OWN_ENV.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    own = ["--env.type=point_reach", "--discover_packages_path=own_env"]

    assert (
        main(["record", "--root=demos", "--episodes=12", "--mode=perturb", "--env.task=all", *own])
        == 0
    )
    assert main(["record", "--root=scenes", "--episodes=20", "--mode=grounding", *own]) == 0
    told = capfd.readouterr().out
    assert "blue/recorded 6, red/recorded 6" in told
    assert "20 frames" not in told  # two poses a scene
    features = json.loads(Path("demos/meta/info.json").read_text())["features"]
    assert features["observation.environment_state"]["names"] == ["goal_dx", "goal_dy"]
    assert features["action"]["names"] == ["dx", "dy"]

    sizes = [f"--policy.backbone.{name}={value}" for name, value in SIZES.items()]
    words = [
        "train",
        "--roots=demos",
        "--grounding_roots=scenes",
        "--output_dir=run",
        "--steps=4",
        "--grounding_steps=2",
        "--batch_size=8",
        "--grounding_batch=4",
        "--rounds=1",
        "--takeover_episodes=2",
        "--validate_episodes=1",
        "--policy.chunk_size=4",
        "--policy.n_action_steps=2",
        *sizes,
        *own,
    ]
    assert main(words) == 0
    from_data = (
        r"observation\.images\.top \(32, 32\); state 2; 10 Hz; .*auxiliary target 2 values, 2 of "
        r"them"
    )
    assert re.search(from_data, caplog.text)
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    # before the takeovers, and at the end
    assert sum("validation_success" in line for line in log) == 2
    assert list(Path("run/takeover").glob("round_0/meta/info.json"))

    policy = "--policy.path=run/checkpoints/final/pretrained_model"
    few = ["--executed_steps=2", "--env.split=heldout", "--env.episode_length=6", policy, *own]
    assert main(["eval", "--episodes=2", "--timing_chunks=2", "--env.task=all", *few]) == 0
    report = json.loads(Path("outputs/eval/report.json").read_text())
    assert (report["env"], report["split"], report["max_episode_steps"]) == (
        "point_reach",
        "heldout",
        6,
    )
    assert set(report["decoders"]["ar"]["per_task"]) == {"red", "blue"}
    assert Path("outputs/eval/clip_ar.mp4").is_file()
    assert main(["show", "--chunk=1", *few]) == 0
    assert main(["grounding", "--scenes=10", "--output=grounding.json", policy, *own]) == 0
    assert json.loads(Path("grounding.json").read_text())["rows"][-1]["frames"] == 10
