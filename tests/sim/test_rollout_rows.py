"""Which episodes run side by side, and where a decoder that learns begins anew."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest

from ceed_vla.axes.drafts import speculation
from ceed_vla.checkpoints import load
from ceed_vla.decoding import named_config
from ceed_vla.sim.environment import EnvPool, joined
from ceed_vla.sim.evaluation import whole_batches
from ceed_vla.sim.evaluation_config import EvalConfig
from ceed_vla.sim.rollout import Episode, PolicyRunner, rollout
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv

EPISODES = [(40_000, "push_cube"), (40_001, "push_cube"), (40_002, "push_cube")]


def outcomes(decoder: str, size: int) -> list[tuple[int, list[int]]]:
    """Seed and forwards of every episode, with room for `size` environments."""
    env = CeedTabletopEnv(task="push_cube", episode_length=12)
    with EnvPool(size, env) as pool:
        runner = PolicyRunner(joined(load("student"), env), decoder)
        return sorted((e.seed, e.forwards) for e in rollout(runner, pool, EPISODES))


@pytest.mark.parametrize("decoder", ["ngram8_h", "jacobi_h"])
def test_forwards_are_those_of_one_robot(decoder: str) -> None:
    assert outcomes(decoder, 3) == outcomes(decoder, 1)


def test_only_decoders_whose_rows_wait_run_one_at_a_time() -> None:
    runner = PolicyRunner(load("student"), "ar")
    found = {}
    for name in ("ar", "jacobi_h", "ceed", "ngram8_h", "deadline20", "spec1x4", "del"):
        runner.decoding = name
        found[name] = runner.one_row
    alone = ("ngram8_h", "deadline20", "spec1x4", "del")
    assert found == {name: name in alone for name in found}


class Exit:
    """What `del` counts by."""


def test_del_forgets_what_it_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = named_config("del").decoder
    assert decoder.forget is not None
    policy, _, _ = load("student")
    own = Exit()
    monkeypatch.setattr(policy.backbone, "exits", {1: own}, raising=False)
    speculation._COUNTS[own] = [1.0, 2.0]
    decoder.forget(policy.backbone)
    assert own not in speculation._COUNTS


def test_a_decoder_that_learns_begins_anew_with_every_batch() -> None:
    env = CeedTabletopEnv(task="push_cube", episode_length=12)
    forgot: list[object] = []
    decoding = named_config("jacobi_h")
    vars(decoding)["decoder"] = replace(decoding.decoder, forget=forgot.append)
    with EnvPool(2, env) as pool:
        bundle = joined(load("student"), env)
        runner = PolicyRunner(bundle, decoding)
        assert len(list(rollout(runner, pool, EPISODES))) == 3
    assert forgot == [bundle[0].backbone]

    row = SimpleNamespace(name="row", decoding=decoding)
    config = EvalConfig(CheckpointPath("student"), env=env, seed=40_000, episodes=4, batch=2)
    done = [SimpleNamespace(seed=seed) for seed in (40_000, 40_001, 40_002)]
    found = whole_batches(config, [row], {"row": list(done)})  # type: ignore[list-item]
    assert [episode.seed for episode in found["row"]] == [40_000, 40_001]


class Limited(gymnasium.Env[Any, Any]):
    """An environment with a step limit of its own."""

    def __init__(self, limit: int) -> None:
        self._max_episode_steps = limit
        self.task = f"limit {limit}"

    def reset(self, **_: Any) -> Any:
        return {}, {}


def test_every_episode_has_the_limit_of_its_own_task() -> None:
    env = CeedTabletopEnv(task="push_cube", episode_length=12)
    with EnvPool(2, env) as pool:
        several = pool.env(0)
        assert (several.simulations, pool.side_by_side) == (1, 2)
        several._envs = [("short", Limited(3)), ("long", Limited(6))]  # type: ignore[list-item]
        several.config.episode_length = 0
        assert (several.longest, pool.side_by_side, several.distinct) == (6, 1, None)
        limits = [Episode.start(several, seed, "mixed").limit for seed in (40_000, 40_001)]
        assert limits == [3, 6]
        for _, own in several._envs:
            own._init_states = np.zeros((50, 2))  # type: ignore[attr-defined]
        assert several.distinct == 100
        several._envs = []
