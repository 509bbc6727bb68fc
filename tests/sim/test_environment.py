"""Environments with LeRobot's interface only; errors name the members that are missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig, LiberoEnv

from ceed_vla.checkpoints import load
from ceed_vla.decoding import named_config
from ceed_vla.errors import ConfigError, SimulationError
from ceed_vla.sim.env_tasks import check_expert
from ceed_vla.sim.environment import Environment, EnvPool, flags, joined, register_installed
from ceed_vla.sim.evaluate import EvalConfig, prepared
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from tests.helpers.episodes import run_seeds


class Plain(gymnasium.Env[dict[str, Any], Any]):
    """Solved once the actions add up to 3; one camera without a name."""

    def __init__(self, task: str = "add", silent: bool = False, max_steps: int = 8) -> None:
        self.task, self.silent = task, silent
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        images, state = spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.Box(-9, 9, (1,), np.float32)
        self.observation_space = spaces.Dict({"pixels": images, "agent_pos": state})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.sum = np.zeros(1, np.float32)
        return self._observation(), {}

    def _observation(self) -> dict[str, Any]:
        return {
            "pixels": np.full((8, 8, 3), 10 * int(self.sum[0]), np.uint8),
            "agent_pos": self.sum.copy(),
        }

    def step(self, action: Any) -> Any:
        self.sum = self.sum + action
        solved = bool(self.sum[0] >= 3)
        return (
            self._observation(),
            0.0,
            solved,
            False,
            {} if self.silent else {"is_success": solved},
        )


gymnasium.register("sim_tests/plain", Plain, max_episode_steps=8)


@EnvConfig.register_subclass("sim_tests_plain")
@dataclass
class PlainConfig(EnvConfig):
    task: str | None = "plain"
    silent: bool = False
    episode_length: int | None = None
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (1,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (1,)),
            "pixels": PolicyFeature(FeatureType.VISUAL, (8, 8, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "pixels": "observation.image",
        }
    )

    @property
    def package_name(self) -> str:
        return "sim_tests"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"silent": self.silent}


class Adder:
    """A policy whose chunk adds 0.5 in each of four steps; it stores its batches."""

    def __init__(self, camera: str = "observation.image") -> None:
        inputs = {
            camera: SimpleNamespace(shape=(3, 8, 8)),
            "observation.state": SimpleNamespace(shape=(1,)),
        }
        self.config = SimpleNamespace(
            n_action_steps=4,
            delta_dims=None,
            input_features=inputs,
            action_feature=SimpleNamespace(shape=(1,)),
            named=named_config,
        )
        self.tokenizer = SimpleNamespace(
            readable=lambda tokens: torch.ones(len(tokens), dtype=torch.bool),
            decode=lambda tokens: torch.full((len(tokens), 4, 1), 0.5),
        )
        self.batches: list[dict[str, Any]] = []

    def decode(self, batch: dict[str, Any], **_: Any) -> Any:
        self.batches.append(batch)
        rows = len(batch["task"])
        return SimpleNamespace(
            tokens=torch.zeros(rows, 4, dtype=torch.long),
            iterations=torch.ones(rows, dtype=torch.long),
            exit_reason=["complete"] * rows,
            layer_forwards=None,
            prefix_layers=None,
            seconds={},
        )


def test_a_plain_environment_is_evaluated() -> None:
    policy = Adder()
    results = run_seeds(policy, [1, 2, 3], PlainConfig(), batch=2)
    assert [(r.seed, r.success, r.steps, r.forwards) for r in results] == [
        (s, True, 6, [1, 1]) for s in (1, 2, 3)
    ]
    assert {r.task for r in results} == {"plain"}
    assert {r.instruction for r in results} == {"add"}
    batch = policy.batches[1]
    assert batch["observation.image"].shape == (2, 3, 8, 8)
    assert batch["observation.image"].max().item() == pytest.approx(20 / 255)
    assert batch["observation.state"].tolist() == [[2.0], [2.0]]


def test_a_chunk_with_a_deadline_shares_no_batch() -> None:
    for decoding, rows in (("cap1", 2), ("deadline5_cap2", 1)):
        policy = Adder()
        results = run_seeds(policy, [1, 2, 3], PlainConfig(), batch=2, decoding=decoding)
        assert [(r.seed, r.success) for r in results] == [(seed, True) for seed in (1, 2, 3)]
        assert max(len(batch["task"]) for batch in policy.batches) == rows


def test_latency_needs_to_know_how_to_hold_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ceed_vla.sim.evaluate.load_bundles",
        lambda config: {"policy": (load("student")[0], None, None)},
    )
    folder = str(tmp_path / "out")
    config = EvalConfig(
        CheckpointPath("student"), env=PlainConfig(), delay_ms=[100.0], output_dir=folder
    )
    message = r"lacks hold_action\(\), which --delay_ms needs"
    with EnvPool(1, config.env) as pool, pytest.raises(SimulationError, match=message):
        prepared(config, pool, lambda _: {})


def test_a_deadline_needs_the_machine_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ceed_vla.sim.evaluate.load_bundles",
        lambda config: {"policy": (load("student")[0], None, None)},
    )
    config = EvalConfig(
        CheckpointPath("student"), env=PlainConfig(), output_dir=str(tmp_path / "out"), workers=2
    )
    config.decoders = "deadline8"
    with (
        EnvPool(1, config.env) as pool,
        pytest.raises(ConfigError, match=r"deadline8 has .* --workers 1"),
    ):
        prepared(config, pool, lambda _: {})


def test_the_tasks_of_a_suite_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_envs(self: EnvConfig, n_envs: int, use_async_envs: bool = False) -> Any:
        return {"suite": {i: gymnasium.vector.SyncVectorEnv([Plain] * n_envs) for i in range(2)}}

    monkeypatch.setattr(PlainConfig, "create_envs", create_envs)
    results = run_seeds(Adder(), [4, 5, 6], PlainConfig(episode_length=5))
    assert [(r.task, r.steps) for r in results] == [("suite/0", 5), ("suite/1", 5), ("suite/0", 5)]


def test_missing_members_are_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"sim_tests_plain has no expert, which record needs.*PlainConfig lacks act",
    ):
        check_expert(PlainConfig(), "record")
    with pytest.raises(
        ConfigError,
        match=r"reads or writes observation\.image\.top \(3, 8, 8\), --env.type=sim_tests",
    ):
        joined((Adder("observation.image.top"), None, None), PlainConfig())
    with pytest.raises(SimulationError, match=r"returns no info\['is_success'\]"):
        run_seeds(Adder(), [1], PlainConfig(silent=True))
    with pytest.raises(
        SimulationError, match=r"lacks privileged_state\(\) and scatter\(\), which grounding needs"
    ):
        Environment(PlainConfig()).needs("grounding", "privileged_state", "scatter")
    with pytest.raises(
        SimulationError,
        match=(
            r"--env.type=sim_tests_plain cannot be created .ModuleNotFoundError: No module named "
            r"'sim_tests'"
        ),
    ):
        Environment(PlainConfig(task="none"))


def test_a_plain_environment_holds_still_and_is_disturbed_within_its_actions() -> None:
    # overrides its own
    assert EnvPool(1, PlainConfig(), "reach it").env(0).instruction == "reach it"
    env = Environment(PlainConfig())
    assert env.max_episode_steps == 8
    assert env.hold_action().tolist() == [0.0]
    assert abs(env.disturbance(np.random.default_rng(0))[0]) <= 1


def test_an_environments_flags_say_what_differs() -> None:
    assert flags(CeedTabletopEnv()) == ["--env.type=ceed_tabletop"]
    env = CeedTabletopEnv(task="push_cube", cameras=["front"], image_size=64)
    words = ["--env.task=push_cube", "--env.image_size=64", '--env.cameras=["front"]']
    assert flags(env) == ["--env.type=ceed_tabletop", *words]


def test_installed_packages_register_their_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in (("lerobot_env_good", "seen = True"), ("lerobot-env-bad", "1 / 0")):
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(text)
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    register_installed()
    assert sys.modules["lerobot_env_good"].seen
    assert "lerobot_env_bad cannot be imported: ZeroDivisionError" in caplog.text


def test_an_environment_whose_package_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SimulationError, match=r"--env.type=libero cannot be created \("):
        Environment(LiberoEnv())


def test_the_task_is_what_was_asked_for_where_the_environment_says_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PlainConfig, "tasks", lambda self: ["red", "blue"], raising=False)
    monkeypatch.setattr(PlainConfig, "create_envs", None)
    monkeypatch.setattr(
        EnvConfig, "create_envs", lambda *_, **__: {"suite": {0: SimpleNamespace(envs=[Plain()])}}
    )
    env = Environment(PlainConfig(task="all"))
    env.reset(1, "blue")
    assert env.task == "blue"


def test_unbounded_actions_need_a_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    env = Environment(PlainConfig())
    env._env.unwrapped.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    monkeypatch.setattr(
        type(env._env), "action_space", env._env.unwrapped.action_space, raising=False
    )
    with pytest.raises(
        SimulationError,
        match=r"lacks disturbance\(\), which mode perturb with unbounded actions",
    ):
        env.disturbance(np.random.default_rng(0))


def test_one_family_is_the_environments_own() -> None:
    assert CeedTabletopEnv(task="push_cube").gym_kwargs["task"] == "push_cube"
    assert CeedTabletopEnv(task="all").gym_kwargs["task"] == "mixed"


# ---- what an environment returns, and how it fails -----------------------------------------------


class Odd(Plain):
    """Returns `solved` as the success flag, or fails in `failing`."""

    solved: Any = True
    failing = ""

    def reset(self, **options: Any) -> Any:
        if self.failing == "reset":
            raise KeyError("scene")
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        if self.failing == "step":
            raise ZeroDivisionError("no contact")
        return (*super().step(action)[:4], {"is_success": self.solved})


class Quick(Odd):
    """Steps without rendering."""

    def observe(self) -> Any:
        return self._observation()

    def advance(self, action: Any) -> None:
        self.sum = self.sum + action

    def is_success(self) -> Any:
        return self.solved


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Environment]:
    """Makes an environment of a class, with attributes set."""

    def make(kind: type[Odd] = Odd, **values: Any) -> Environment:
        def create_envs(self: EnvConfig, n_envs: int, use_async_envs: bool = False) -> Any:
            return {"suite": {0: gymnasium.vector.SyncVectorEnv([kind] * n_envs)}}

        monkeypatch.setattr(PlainConfig, "create_envs", create_envs)
        for name, value in values.items():
            monkeypatch.setattr(kind, name, value)
        return Environment(PlainConfig(episode_length=5))

    return make


@pytest.mark.parametrize(
    "solved",
    [
        "yes",
        "no",
        "",
        float("nan"),
        1.0,
        0.0,
        1,
        0,
        None,
        [True],
        np.array([True]),
        np.float32(0),
        np.int64(1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", [Odd, Quick])
def test_only_a_boolean_says_that_an_episode_is_solved(
    odd: Callable[..., Environment], kind: type[Odd], solved: Any
) -> None:
    env = odd(kind, solved=solved)
    env.reset(1)
    name = r"info\['is_success'\]" if kind is Odd else r"is_success\(\)"
    message = (
        rf"--env.type=sim_tests_plain: {name} is .*\({type(solved).__name__}\); it must be a "
        r"boolean"
    )
    with pytest.raises(SimulationError, match=message):
        env.advance(np.ones(1, np.float32))
    assert env.success is False


@pytest.mark.parametrize("kind", [Odd, Quick])
@pytest.mark.parametrize("solved", [True, False, np.True_, np.False_])
def test_booleans_of_python_and_numpy_do(
    odd: Callable[..., Environment], kind: type[Odd], solved: Any
) -> None:
    env = odd(kind, solved=solved)
    env.reset(1)
    assert env.advance(np.ones(1, np.float32)) is bool(solved)


def test_an_environment_that_fails_is_named(odd: Callable[..., Environment]) -> None:
    with pytest.raises(
        SimulationError,
        match=r"--env.type=sim_tests_plain fails in reset to seed 3 .KeyError: 'scene'",
    ):
        odd(failing="reset").reset(3)
    env = odd(failing="step")
    env.reset(3)
    with pytest.raises(
        SimulationError, match=r"fails in step\(action\) .ZeroDivisionError: no contact"
    ):
        env.advance(np.ones(1, np.float32))


@pytest.mark.parametrize("made", [{}, {"suite": {}}])
def test_a_package_without_environments_is_named(
    monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    monkeypatch.setattr(PlainConfig, "create_envs", lambda *_, **__: made)
    with pytest.raises(SimulationError, match=r"--env\.type=sim_tests_plain has no env"):
        Environment(PlainConfig())


@pytest.mark.parametrize("made", [None, [], {"suite": None}, {"suite": {0: None}}])
def test_what_a_package_makes_wrongly_is_named(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    monkeypatch.setattr(PlainConfig, "create_envs", lambda *_, **__: made)
    with pytest.raises(SimulationError, match=r"--env\.type=sim_tests_plain cannot be created"):
        Environment(PlainConfig())


def test_lerobots_own_environments_say_booleans() -> None:
    """Those that are installed; docs/how-to/add-an-environment.md says what is taken."""
    env = Environment(EnvConfig.get_choice_class("pusht")())
    env.reset(0)
    assert env.advance(np.asarray(env._env.action_space.sample(), np.float32)) is False
