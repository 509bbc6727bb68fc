"""The environments as LeRobot's tools see them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import (
    NEW_ROLLOUT_OPTION,
    close_envs,
    env_to_policy_features,
    preprocess_observation,
)

from ceed_vla.errors import ConfigError
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from ceed_vla.sim.tabletop.tasks import TASKS


def reset(env: Any, seeds: list[int]) -> Any:
    return env.reset(seed=seeds, options={NEW_ROLLOUT_OPTION: True})[0]


def test_type_is_registered() -> None:
    assert EnvConfig.get_choice_class("ceed_tabletop") is CeedTabletopEnv
    assert make_env_config("ceed_tabletop", task="push_cube").type == "ceed_tabletop"


def test_features_match_the_policy_names() -> None:
    features = env_to_policy_features(CeedTabletopEnv())
    assert {name: feature.shape for name, feature in features.items()} == {
        "action": (7,),
        "observation.state": (14,),
        "observation.images.front": (3, 96, 96),
        "observation.images.wrist": (3, 96, 96),
    }


def test_all_makes_one_suite_per_family() -> None:
    suites = make_env(CeedTabletopEnv(task="all"), n_envs=1)
    assert list(suites) == list(TASKS)
    for family, envs in suites.items():
        reset(envs[0], [1000])
        assert envs[0].call("family") == (family,)
    close_envs(suites)


def test_what_lerobot_eval_reads() -> None:
    suites = make_env(CeedTabletopEnv(task="push_cube", episode_length=3), n_envs=2)
    env = suites["push_cube"][0]
    first = reset(env, [1000, 1001])
    batch = preprocess_observation(first)
    assert batch["observation.images.front"].shape == (2, 3, 96, 96)
    assert batch["observation.state"].shape == (2, 14)
    assert all("cube" in text for text in env.call("task_description"))
    assert env.call("_max_episode_steps")[0] == 3
    assert env.unwrapped.metadata["render_fps"] == 10
    assert env.call("render")[0].dtype == np.uint8
    for step in range(3):
        _, _, terminated, truncated, info = env.step(np.zeros((2, 7), dtype=np.float32))
        assert info["is_success"].tolist() == [False, False]
        assert (terminated | truncated).tolist() == [step == 2] * 2
    again = reset(env, [1000, 1001])
    np.testing.assert_array_equal(first["pixels"]["wrist"], again["pixels"]["wrist"])
    close_envs(suites)


def test_success_is_reported_and_the_episode_freezes() -> None:
    suites = make_env(CeedTabletopEnv(task="push_cube"), n_envs=1)
    env = suites["push_cube"][0]
    reset(env, [3])
    inner = env.envs[0].unwrapped
    for _ in range(120):
        _, _, terminated, _, info = env.step(
            np.asarray(inner.expert_action(), dtype=np.float32)[None]
        )
        if terminated[0]:
            break
    assert info["is_success"].tolist() == [True]
    observation, _, _, _, _ = env.step(np.zeros((1, 7), dtype=np.float32))
    later, _, _, _, _ = env.step(np.ones((1, 7), dtype=np.float32))
    np.testing.assert_array_equal(observation["agent_pos"], later["agent_pos"])
    close_envs(suites)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "juggle"}, "cube_in_bin"),
        ({"split": "test"}, "train, heldout, all"),
        ({"task": 5}, "task is 5"),
        ({"fps": 20}, r"fps is 20; it must be a whole number in \[10, 10\]"),
        ({"episode_length": -1}, "episode_length is -1"),
        ({"image_size": 10**6}, "image_size is 1000000"),
        ({"cameras": ["front", "top"]}, "choose some of front, wrist"),
        ({"cameras": []}, "choose some of front, wrist"),
        ({"task": ","}, "'all'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CeedTabletopEnv(**options)
