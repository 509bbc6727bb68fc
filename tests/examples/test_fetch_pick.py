"""The environment of docs/tutorials/first-policy.md: its expert solves it, and idling does not.

The state does not contain the block.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCENES = range(40_000, 40_100)
STEPS = 50


@pytest.fixture(scope="module")
def env() -> Iterator[Any]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import fetch_pick
    finally:
        sys.path.remove(str(EXAMPLES))
    made = fetch_pick.FetchPick(image_size=48)
    yield made
    made.close()


def solved(env: Any, seed: int, act: Any) -> bool:
    env.reset(seed=seed)
    for _ in range(STEPS):
        if env.is_success():
            return True
        env.advance(act())
    return bool(env.is_success())


def test_the_expert_solves_every_scene(env: Any) -> None:
    count = sum(solved(env, seed, env.expert_action) for seed in SCENES)
    print(f"the expert solves {count} of {len(SCENES)} scenes")
    assert count == len(SCENES)


@pytest.mark.parametrize("action", [(0, 0, 0, 1), (0, 0, -1, 1), (0, 0, 0, -1)])
@pytest.mark.slow
def test_a_constant_action_solves_less_than_a_fifth(env: Any, action: tuple[float, ...]) -> None:
    constant = np.array(action, np.float32)
    count = sum(solved(env, seed, lambda: constant) for seed in SCENES)
    print(f"{action} solves {count} of {len(SCENES)} scenes")
    assert count < len(SCENES) / 5


def test_block_and_mark_are_in_the_images_and_not_in_the_state(env: Any) -> None:
    env.reset(seed=SCENES[0])
    before = env.observe()
    env.retarget(np.random.default_rng(1))
    after = env.observe()
    np.testing.assert_array_equal(before["agent_pos"], after["agent_pos"])
    for view in ("front", "side"):
        assert (before["pixels"][view] != after["pixels"][view]).any()
    moved = env.fetch._utils.get_joint_qpos(env.fetch.model, env.fetch.data, "object0:joint").copy()
    moved[:2] += 0.05
    env.fetch._utils.set_joint_qpos(env.fetch.model, env.fetch.data, "object0:joint", moved)
    env.fetch._mujoco.mj_forward(env.fetch.model, env.fetch.data)
    env.seen = env.fetch._get_obs()
    shifted = env.observe()
    np.testing.assert_array_equal(after["agent_pos"], shifted["agent_pos"])
    assert all(
        (after["pixels"][view] != shifted["pixels"][view]).any() for view in ("front", "side")
    )


def test_the_same_seed_is_the_same_scene(env: Any) -> None:
    first, _ = env.reset(seed=7)
    again, _ = env.reset(seed=7)
    np.testing.assert_array_equal(first["agent_pos"], again["agent_pos"])
    np.testing.assert_array_equal(first["pixels"]["front"], again["pixels"]["front"])
