"""Meta-World, bit-equal to LeRobot's simulation: observations, experts and recordings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

pytest.importorskip("metaworld", reason="Meta-World is not installed (extra metaworld)")

from lerobot.envs.configs import MetaworldEnv as LeRobotConfig
from lerobot.envs.metaworld import MetaworldEnv as LeRobotEnv

from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import ConfigError, SimulationError
from ceed_vla.sim.environment import Environment, EnvPool, flags
from ceed_vla.sim.grounding import GroundingConfig
from ceed_vla.sim.metaworld.env import CAMERA, MetaworldTasks
from ceed_vla.sim.metaworld.lerobot_env import CeedMetaworldEnv
from ceed_vla.sim.metaworld.tasks import ALL_TASKS, INSTRUCTIONS, TASKS
from ceed_vla.sim.record import record
from ceed_vla.sim.recording.config import RecordConfig
from ceed_vla.sim.render import render, tune
from tests.helpers.episodes import run_seeds

pytestmark = pytest.mark.filterwarnings(
    "ignore:Constant"
)  # Meta-World's experts exceed the action range


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_simulation_is_lerobots(task: str) -> None:
    ours, theirs = MetaworldTasks([task]), LeRobotEnv(task, obs_type="pixels_agent_pos")
    theirs._format_raw_obs = lambda raw: {"agent_pos": raw[:4]}  # type: ignore[method-assign]  # unrendered
    for seed in (40_000, 40_001):
        seen, _ = ours.reset(seed=seed)
        np.testing.assert_array_equal(seen["agent_pos"], theirs.reset(seed=seed)[0]["agent_pos"])
        world: Any = theirs._env
        for _ in range(150):
            action = ours.expert_action()
            ours.advance(action)
            raw, _, _, _, info = world.step(action)
            np.testing.assert_array_equal(ours._values, raw)
            np.testing.assert_array_equal(ours._world.data.qpos, world.data.qpos)
            assert ours.is_success() == bool(info["success"])
            if ours.is_success():
                break
    ours.close()
    theirs.close()


def test_keys_shapes_and_instructions_are_lerobots() -> None:
    ours, theirs = CeedMetaworldEnv(image_size=64), LeRobotConfig()
    assert ours.features_map == theirs.features_map
    assert set(ours.features) == set(theirs.features)
    assert ours.features["pixels/top"].shape == (64, 64, 3)
    assert (ours.fps, ours.episode_length, ours.obs_type) == (
        theirs.fps,
        theirs.episode_length,
        theirs.obs_type,
    )
    assert len(ALL_TASKS) == 50
    assert ours.tasks() == list(TASKS)
    env = Environment(ours)
    env.reset(3, "drawer-open-v3")
    assert (env.task, env.instruction) == ("drawer-open-v3", INSTRUCTIONS["drawer-open-v3"])
    seen = env.observe()
    assert seen["pixels"].shape == (64, 64, 3)
    assert seen["pixels"].std() > 20
    env.reset(3, "drawer-open-v3")
    np.testing.assert_array_equal(env.observe()["pixels"], seen["pixels"])
    env.reset(4, "drawer-open-v3")
    assert (env.observe()["pixels"] != seen["pixels"]).any()
    env.close()


def test_the_picture_is_lerobots_but_for_shadows() -> None:
    ours, theirs = (
        MetaworldTasks(["push-v3"], image_size=480),
        LeRobotEnv("push-v3", obs_type="pixels_agent_pos"),
    )
    a, b = (
        ours.reset(seed=1)[0]["pixels"].astype(float),
        theirs.reset(seed=1)[0]["pixels"].astype(float),
    )
    small = [image.reshape(24, 20, 24, 20, 3).mean((1, 3)) for image in (a, b)]
    assert np.abs(small[0] - small[1]).mean() < 12
    assert np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] > 0.95
    ours.close()
    theirs.close()


def test_the_first_image_shows_the_goal_of_its_own_episode() -> None:
    env, fresh = MetaworldTasks(["reach-v3"]), MetaworldTasks(["reach-v3"])
    env.reset(seed=1)
    seen = env.reset(seed=2)[0]["pixels"]
    np.testing.assert_array_equal(env._world.data.site("goal").xpos, env._world._target_pos)
    np.testing.assert_array_equal(seen, fresh.reset(seed=2)[0]["pixels"])
    env.close()
    fresh.close()


def test_pixels_are_means_and_meshes_lose_invisible_faces() -> None:
    env = MetaworldTasks(["reach-v3"])
    seen = env.reset(seed=1)[0]["pixels"]
    world = env._world
    large = render("reach-v3", world.model, world.data, CAMERA, 192)[::-1, ::-1]
    mean = large.reshape(96, 2, 96, 2, 3).mean((1, 3))
    assert np.abs(seen - mean).max() <= 0.5
    fine: Any = mujoco.MjModel.from_xml_path(world.model_name)
    assert world.model.mesh_facenum.sum() < 0.5 * fine.mesh_facenum.sum()
    np.testing.assert_array_equal(world.model.mesh_vert, fine.mesh_vert)
    fine.cam_pos[:] = world.model.cam_pos
    fine.site_pos[:] = world.model.site_pos
    tune(fine)
    full = render("fine", fine, world.data, CAMERA, 192)[::-1, ::-1]
    assert np.abs(full.astype(float) - large).mean() < 0.5
    env.close()


def test_an_episode_ends_with_success_and_holding_stands_still() -> None:
    with EnvPool(1, CeedMetaworldEnv()) as pool:
        env = pool.env(0)
        env.reset(40_000, "reach-v3")
        before = env.inner.privileged_state()
        for _ in range(3):
            env.advance(env.hold_action())
        np.testing.assert_allclose(env.inner.privileged_state(), before, atol=0.01)
        while not env.success:
            env.advance(env.expert_action())
        assert np.linalg.norm(env.inner.privileged_state()[3:]) < 0.06
        env.rearrange("scatter", np.random.default_rng(0))
        assert np.linalg.norm(env.inner.privileged_state()[3:] - before[3:]) > 0.02
        assert pool.max_episode_steps == 400


def test_demonstrations_and_grounding_scenes_are_recorded(tmp_path: Path) -> None:
    env = CeedMetaworldEnv(task="reach-v3,button-press-topdown-v3")
    common: dict[str, Any] = {"env": env, "progress": False}
    record(RecordConfig(root=tmp_path / "clean", episodes=2, **common))
    store = open_dataset(tmp_path / "clean")
    assert store.fps == 80
    assert sorted(store.tasks) == sorted(INSTRUCTIONS[task] for task in env.tasks())
    assert store.labels["action"] == ["dx", "dy", "dz", "gripper"]
    assert list(store.images) == ["observation.image"]
    record(
        RecordConfig(
            root=tmp_path / "ground", episodes=4, mode="grounding", poses_per_scene=1, **common
        )
    )
    scenes = open_dataset(tmp_path / "ground")
    assert (len(scenes), scenes.action) == (4, None)
    assert np.ptp(scenes.state[:, :3], axis=0).max() > 0.05


def test_a_policy_drives_it() -> None:
    from tests.sim.test_environment import Adder

    policy: Any = Adder()
    policy.config.input_features = {}
    policy.config.action_feature.shape = (4,)
    policy.tokenizer.decode = lambda tokens: torch.zeros(len(tokens), 4, 4)
    results = run_seeds(
        policy, [1, 2], CeedMetaworldEnv(task="reach-v3,push-v3", episode_length=6), batch=2
    )
    assert [(r.task, r.steps, r.success) for r in results] == [
        ("reach-v3", 6, False),
        ("push-v3", 6, False),
    ]


def test_lerobots_tools_get_one_suite_a_task() -> None:
    made = CeedMetaworldEnv(task="reach-v3,push-v3").create_envs(n_envs=1)
    assert {task: list(envs) for task, envs in made.items()} == {"reach-v3": [0], "push-v3": [0]}
    seen, info = made["push-v3"][0].reset(seed=[5])
    assert seen["pixels"].shape == (1, 96, 96, 3)
    _, _, _, _, info = made["push-v3"][0].step(np.zeros((1, 4), np.float32))
    assert info["is_success"].tolist() == [False]
    for envs in made.values():
        envs[0].close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "push-v2"}, "'push-v2'; choose 'mt10', 'mixed', 'all' or some of assembly-v3"),
        ({"task": " , "}, "nothing"),
        ({"image_size": 8}, "image_size is 8"),
        ({"episode_length": 501}, "episode_length is 501"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        CeedMetaworldEnv(**options)
    assert message in str(error.value)


def test_what_the_environment_refuses() -> None:
    with pytest.raises(SimulationError, match="Unknown task 'nope'"):
        MetaworldTasks(["nope"])
    with pytest.raises(SimulationError, match="Image size 8 px"):
        MetaworldTasks(image_size=8)
    with pytest.raises(SimulationError, match="Unknown task 'push-v3'; choose one of reach-v3"):
        MetaworldTasks(["reach-v3"]).reset(options={"task": "push-v3"})


def test_without_meta_world_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(
        ConfigError, match=r"env\.type=ceed_metaworld needs metaworld, .* metaworld"
    ):
        CeedMetaworldEnv()


@pytest.mark.slow
def test_the_type_is_known_without_importing_meta_world() -> None:
    code = "import ceed_vla.sim.environment, sys; assert 'metaworld' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    for first in (
        "ceed_vla.sim.metaworld.tasks",
        "ceed_vla.sim.metaworld.lerobot_env",
    ):  # in either order of imports
        subprocess.run([sys.executable, "-c", f"import {first}"], check=True)
    code = "import gymnasium, ceed_vla.sim.metaworld; gymnasium.make('ceed_vla/Metaworld-v3')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert flags(GroundingConfig(env=CeedMetaworldEnv(task="reach-v3")).env) == [
        "--env.type=ceed_metaworld",
        "--env.task=reach-v3",
    ]
