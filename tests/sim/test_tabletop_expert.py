"""The scripted expert solves every family from any state, without hidden memory or stalling."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from ceed_vla.sim.tabletop import ENV_ID, MAX_EPISODE_STEPS
from ceed_vla.sim.tabletop.env import TabletopEnv
from ceed_vla.sim.tabletop.tasks import TASKS

MAX_STEPS = MAX_EPISODE_STEPS


def make(task: str) -> TabletopEnv:
    return gymnasium.make(ENV_ID, task=task, split="all", cameras=()).unwrapped


def finish(env: TabletopEnv, sigma: float = 0.0, seed: int = 0) -> tuple[bool, int, int]:
    """Run the expert; return success, steps, and the longest run of nearly zero motion."""
    rng = np.random.default_rng(seed)
    still = longest = 0
    for step in range(MAX_STEPS):
        action = env.expert_action()
        still = still + 1 if np.abs(action[:6]).max() < 0.04 else 0
        longest = max(longest, still)
        action[:6] += rng.normal(0.0, sigma, 6)
        env.advance(action)
        if env.is_success():
            return True, step + 1, longest
    return False, MAX_STEPS, longest


@pytest.mark.parametrize("task", TASKS)
def test_solves_its_family_without_stalling(task):
    env = make(task)
    for seed in (11, 12, 13):
        env.reset(seed=seed)
        success, steps, longest = finish(env)
        assert success, seed
        assert steps <= 45
        assert longest <= 3


@pytest.mark.parametrize("task", TASKS)
def test_recovers_from_action_noise(task):
    env = make(task)
    env.reset(seed=14)
    assert finish(env, sigma=0.2)[0]


@pytest.mark.parametrize("task", TASKS)
def test_starts_from_any_arm_pose_with_closed_fingers(task):
    env = make(task)
    for seed in (15, 16):
        env.reset(seed=seed)
        env.scatter(np.random.default_rng(seed))
        env.gripper_open = False
        env.data.qpos[7:9] = env.data.ctrl[7:9] = 0.0
        assert finish(env)[0], seed


def test_takes_over_after_a_wild_drive():
    env = make("cube_in_bin")
    env.reset(seed=17)
    rng = np.random.default_rng(17)
    drift = np.zeros(7)
    for _ in range(25):
        drift = 0.8 * drift + rng.normal(0.0, 0.4, 7)
        env.advance(np.clip(drift, -1, 1) * [1, 1, 1, 0.3, 0.3, 0.6, 1])
    assert finish(env)[0]


def test_action_is_a_function_of_the_state():
    env = make("stack_cubes")
    env.reset(seed=18)
    for _ in range(5):
        action = env.expert_action()
        assert action.shape == (7,)
        assert action.dtype == np.float32
        assert np.abs(action).max() <= 1.0
        np.testing.assert_array_equal(action, env.expert_action())
        env.advance(action)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("sigma", "least"), [(0.0, 98), (0.2, 95)])
def test_success_rate_over_100_seeds(task, sigma, least):
    env = make(task)
    wins = 0
    for seed in range(20000, 20100):
        env.reset(seed=seed)
        wins += finish(env, sigma, seed)[0]
    assert wins >= least
