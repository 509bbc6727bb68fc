"""What training asks of the simulator: takeover rounds stay within their seeds and never meet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ceed_vla import discovery
from ceed_vla.cli import COMMANDS, config_of
from ceed_vla.cli_flags import parse_flags, take_packages
from ceed_vla.errors import ConfigError, SimulationError
from sim import hooks
from sim.grounding import GroundingConfig
from sim.hooks import ClosedLoopValidation, TakeoverRecorder
from sim.recording.config import RecordConfig
from sim.tabletop.lerobot_env import CeedTabletopEnv


def test_rounds_use_every_seed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def note(commands: Sequence[Sequence[str]]) -> list[str]:
        for command in commands:
            options = dict(part[2:].split("=", 1) for part in command if part.startswith("--"))
            seeds.extend(range(int(options["seed"]), int(options["seed"]) + int(options["episodes"])))
        return []

    monkeypatch.setattr(hooks, "run_all", note)
    recorder = TakeoverRecorder(CeedTabletopEnv(), 5, seed=31_440, rounds=2)
    for index in range(2):
        recorder(tmp_path / "policy", index, tmp_path / "takeover")
    assert seeds == list(range(31_440, 31_450))


@pytest.mark.parametrize(("seed", "rounds"), [(29_999, 1), (39_999, 1), (30_000, 5001)])
def test_rounds_that_leave_their_seeds_are_refused(seed: int, rounds: int) -> None:
    with pytest.raises(ConfigError, match="30000 to 39999"):
        TakeoverRecorder(CeedTabletopEnv(), 2, seed, rounds)
    TakeoverRecorder(CeedTabletopEnv(), 2, seed=39_998, rounds=1)


def test_a_validation_counts_the_episodes_as_they_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "made 3 environments\n",
        '{"decoder": "ar", "success": true, "seed": 40000, "task": "x"}\n',
        '{"decoder": "ar", "success": false}\n',
    ]
    monkeypatch.setattr(hooks, "run_all", lambda commands: iter(lines))
    assert ClosedLoopValidation(CeedTabletopEnv(), 2)(Path("policy")) == (1, 2)
    assert "2/2" in capfd.readouterr().err
    with pytest.raises(SimulationError, match="reported 2 of 4 episodes"):
        ClosedLoopValidation(CeedTabletopEnv(), 4)(Path("policy"))


def test_processes_get_the_environment_and_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_discovered", {"json"})
    seen: list[Sequence[str]] = []
    monkeypatch.setattr(hooks, "run_all", lambda commands: iter(seen.extend(commands) or ()))
    env = CeedTabletopEnv(task="push_cube", cameras=["front"], split="heldout")
    TakeoverRecorder(env, 2, 30_000, 1)(Path("policy"), 0, Path("takeover"))
    for words in seen:
        assert "--discover_packages_path=json" in words
        config = parse_flags(RecordConfig, take_packages(words[4:])[1])
        assert (config.env, config.mode, config.resume) == (env, "takeover", True)


@pytest.mark.slow
def test_a_validation_that_fails_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SimulationError, match="failed with exit status 1"):
        ClosedLoopValidation(CeedTabletopEnv(), 2)(tmp_path)
    assert "error: " in capfd.readouterr().err


def test_the_gate_asks_for_every_object_in_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GroundingConfig] = []

    def grounding(config: GroundingConfig) -> dict[str, Any]:
        asked.append(config)
        errors = {"target_p50_cm": 1.5, "target_p90_cm": 9.0, "goal_p50_cm": 2.0, "chance_cm": 20.0, "frames": 7}
        return {"tasks": {"push": errors, "stack": {**errors, "goal_p50_cm": 3.0}}}

    monkeypatch.setattr(hooks, "grounding", grounding)
    flags = ["--grounding_gate=0.02", "--roots=x", "--env.task=push_cube"]
    gate = parse_flags(config_of(COMMANDS["train"]), flags).arguments()["localisation"]
    assert gate(Path("policy")) == {
        "target in push": 0.015, "goal in push": 0.02, "target in stack": 0.015, "goal in stack": 0.03
    }  # fmt: skip
    assert (asked[0].policy.path, asked[0].env.task, asked[0].seed) == ("policy", "push_cube", 40_000)


def test_no_simulator_means_no_validation_and_no_takeovers() -> None:
    config = parse_flags(config_of(COMMANDS["train"]), ["--env.type=none", "--roots=x"])
    assert config.arguments() == {
        "closed_loop": None, "record_takeover": None, "privileged": None, "localisation": None
    }  # fmt: skip
    assert config.rounds == 0
    config = parse_flags(config_of(COMMANDS["train"]), ["--env.type=none", "--grounding_gate=0.1", "--roots=x"])
    assert config.arguments()["localisation"] is None
    config = parse_flags(config_of(COMMANDS["train"]), ["--validate_episodes=0", "--roots=x"])
    assert config.arguments()["closed_loop"] is None
    config = parse_flags(config_of(COMMANDS["train"]), ["--env.type=pusht", "--roots=x"])
    with pytest.raises(ConfigError, match=r"pusht has no expert, which --rounds 2 \(takeovers\) needs"):
        config.arguments()
