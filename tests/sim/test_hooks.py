"""The simulator's part of training: takeover rounds stay within their seeds and never overlap."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ceed_vla.checkpoints import resolve_checkpoint
from ceed_vla.cli.commands import COMMANDS, config_of
from ceed_vla.cli.flags import parse_flags
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.sim import hooks
from ceed_vla.sim.grounding import GroundingConfig
from ceed_vla.sim.hooks import ClosedLoopValidation, TakeoverRecorder
from ceed_vla.sim.recording.config import RecordConfig
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv


def test_rounds_use_every_seed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RecordConfig] = []
    frames = [0, 7]
    monkeypatch.setattr(
        hooks, "record", lambda config: seen.append(config) or SimpleNamespace(frames=frames.pop())
    )
    env = CeedTabletopEnv(task="push_cube", cameras=["front"], split="heldout")
    recorder = TakeoverRecorder(env, 5, seed=31_440, rounds=2, instruction="push it")
    roots = [recorder(tmp_path / "policy", index, tmp_path / "takeover") for index in range(2)]
    # if all are solved there is nothing to learn
    assert roots == [
        [tmp_path / "takeover" / "round_0"],
        [],
    ]
    seeds = [c.first_seed + i for c in seen for i in range(c.episodes)]
    assert seeds == list(range(31_440, 31_450))
    assert all(
        (c.env, c.mode, c.resume, c.instruction) == (env, "takeover", True, "push it") for c in seen
    )


@pytest.mark.parametrize(("seed", "rounds"), [(29_999, 1), (39_999, 1), (30_000, 5001)])
def test_rounds_that_leave_their_seeds_are_refused(seed: int, rounds: int) -> None:
    with pytest.raises(ConfigError, match="30000 to 39999"):
        TakeoverRecorder(CeedTabletopEnv(), 2, seed, rounds)
    TakeoverRecorder(CeedTabletopEnv(), 2, seed=39_998, rounds=1)


def test_an_environment_for_evaluation_is_refused_before_training() -> None:
    env = CeedTabletopEnv()
    env.evaluation_only = True  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"Recording takeovers \(--rounds\) with --env.type="):
        TakeoverRecorder(env, 2, seed=39_000, rounds=1)


def test_a_policy_of_another_robot_is_refused_before_it_is_trained() -> None:
    policy = CeedVLAConfig.read(resolve_checkpoint("student"))
    ClosedLoopValidation(CeedTabletopEnv()).check(policy)
    with pytest.raises(ConfigError, match="wrist"):
        ClosedLoopValidation(CeedTabletopEnv(cameras=["front"])).check(policy)


@pytest.mark.slow
def test_a_validation_is_shared_and_says_why_it_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    env = CeedTabletopEnv(episode_length=8)
    assert ClosedLoopValidation(env, 3, "cap1")(Path("student"))[1] == 3
    assert "3/3" in capfd.readouterr().err
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ClosedLoopValidation(env, 2)(tmp_path)


def test_the_gate_checks_every_object_in_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GroundingConfig] = []

    def grounding(config: GroundingConfig) -> dict[str, Any]:
        asked.append(config)
        errors = {
            "target_p50_cm": 1.5,
            "target_p90_cm": 9.0,
            "goal_p50_cm": 2.0,
            "chance_cm": 20.0,
            "frames": 7,
        }
        return {"tasks": {"push": errors, "stack": {**errors, "goal_p50_cm": 3.0}}}

    monkeypatch.setattr(hooks, "grounding", grounding)
    flags = ["--grounding_gate=0.02", "--roots=x", "--env.task=push_cube"]
    gate = parse_flags(config_of(COMMANDS["train"]), flags).arguments()["localisation"]
    assert gate(Path("policy")) == {
        "target in push": 0.015,
        "goal in push": 0.02,
        "target in stack": 0.015,
        "goal in stack": 0.03,
    }
    assert (asked[0].policy.path, asked[0].env.task, asked[0].seed) == (
        "policy",
        "push_cube",
        40_000,
    )


def test_no_simulator_means_no_validation_and_no_takeovers() -> None:
    config = parse_flags(config_of(COMMANDS["train"]), ["--env.type=none", "--roots=x"])
    assert config.arguments() == {
        "closed_loop": None,
        "record_takeover": None,
        "privileged": None,
        "localisation": None,
    }
    assert config.rounds == 0
    config = parse_flags(
        config_of(COMMANDS["train"]), ["--env.type=none", "--grounding_gate=0.1", "--roots=x"]
    )
    assert config.arguments()["localisation"] is None
    config = parse_flags(config_of(COMMANDS["train"]), ["--validate_episodes=0", "--roots=x"])
    assert config.arguments()["closed_loop"] is None
    config = parse_flags(config_of(COMMANDS["train"]), ["--env.type=pusht", "--roots=x"])
    with pytest.raises(
        ConfigError, match=r"pusht has no expert, which --rounds 2 \(takeovers\) needs"
    ):
        config.arguments()
