"""The tabletop environment: invalid input first, then determinism, language, geometry and
images.
"""

from __future__ import annotations

import subprocess
import sys

import gymnasium
import mujoco
import numpy as np
import pytest
from denavit_hartenberg import forward_kinematics
from gymnasium.utils.env_checker import check_env

from ceed_vla.errors import SimulationError
from ceed_vla.kinematics import rpy_matrix
from ceed_vla.sim import render as rendering
from ceed_vla.sim.environment import Environment
from ceed_vla.sim.tabletop import ENV_ID, arm, layout, tasks
from ceed_vla.sim.tabletop.env import (
    ACTION_NAMES,
    STATE_NAMES,
    WORKSPACE_HIGH,
    WORKSPACE_LOW,
    TabletopEnv,
)
from ceed_vla.sim.tabletop.lerobot_env import PRIVILEGED, CeedTabletopEnv
from ceed_vla.sim.tabletop.scene import FINGER_STROKE, MAX_IMAGE_SIZE, SIM_DT, load_scene


def make(**options) -> TabletopEnv:
    return gymnasium.make(ENV_ID, **{"cameras": (), **options}).unwrapped


@pytest.fixture(scope="module")
def blind() -> TabletopEnv:
    return make()


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"task": "fold_towel"}, "cube_in_bin"),
        ({"split": "test"}, "heldout"),
        ({"cameras": ("side",)}, "wrist"),
        ({"image_size": 4}, "16"),
    ],
)
def test_unknown_settings_are_refused_with_the_valid_ones(options, valid):
    with pytest.raises(SimulationError, match=valid):
        make(**options)


def test_an_unknown_render_mode_is_refused():
    with pytest.raises(SimulationError, match="rgb_array"):
        TabletopEnv(render_mode="human")


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"task": "fold_towel"}, "stack_cubes"),
        ({"color": "pink"}, "yellow"),
        ({"task": "push_cube", "other": "up"}, "left"),
        ({"phrase": 9}, "Unknown phrase 9; choose one of 0, 1, 2, 3"),
        ({"colour": "red"}, "color"),
        ({"task": "stack_cubes", "color": "red", "other": "red"}, "drop an option"),
    ],
)
def test_unknown_reset_options_are_refused_with_the_valid_ones(blind, options, valid):
    with pytest.raises(SimulationError, match=valid):
        blind.reset(seed=0, options=options)


def test_a_heldout_combination_cannot_be_asked_for_in_training(blind):
    heldout = tasks.combinations("cube_in_bin", "heldout")[0]
    options = {"task": "cube_in_bin", "color": heldout.color, "phrase": heldout.phrase}
    with pytest.raises(SimulationError, match="train"):
        blind.reset(seed=0, options=options)
    assert make(split="heldout").reset(seed=0, options=options)[1]["instruction"] == heldout.text


def test_invalid_actions_are_refused_and_large_ones_clipped(blind):
    blind.reset(seed=0)
    for action in (np.full(7, np.nan), np.full(7, np.inf), np.zeros(6)):
        with pytest.raises(SimulationError, match="Action"):
            blind.step(action)
    start = blind.situation().command_position.copy()
    blind.step(np.array([0, 0, 50.0, 0, 0, 0, 1]))
    np.testing.assert_allclose(blind.situation().command_position - start, [0, 0, 0.05], atol=1e-9)


def test_there_is_no_scene_before_the_first_reset():
    with pytest.raises(SimulationError, match="reset"):
        make().step(np.zeros(7))


def test_passes_gymnasiums_checker():
    env = gymnasium.make(ENV_ID, task="cube_on_plate", image_size=32, render_size=32)
    check_env(env.unwrapped, skip_render_check=False)
    assert env.spec.max_episode_steps == 120


def test_same_seed_same_bytes_in_fresh_and_used_environments():
    first, second = (make(cameras=("front", "wrist")) for _ in range(2))
    second.reset(seed=1)
    second.step(np.ones(7))
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 7))

    def trace(env):
        observation, info = env.reset(seed=123)
        parts = [info["instruction"].encode()]
        for action in [*actions, None]:
            parts += [observation["pixels"][name].tobytes() for name in env.cameras]
            parts += [
                observation["agent_pos"].tobytes(),
                env.privileged_state().tobytes(),
                env.data.qpos.tobytes(),
            ]
            if action is not None:
                observation = env.step(action)[0]
        return parts

    assert trace(first) == trace(second)


def test_a_restored_state_goes_on_byte_for_byte():
    env, other = TabletopEnv("push_cube"), TabletopEnv("push_cube")
    env.reset(seed=3)
    other.reset(seed=4)
    random = np.random.default_rng(0)
    drive = [env.disturbance(random) for _ in range(12)]
    for action in drive[:5]:
        env.advance(action)
    snapshot = env.snapshot()

    def rest(where: TabletopEnv) -> list[bytes]:
        seen = []
        for action in drive[5:]:
            where.advance(action)
            found = where.observe()
            seen += [
                found["agent_pos"].tobytes(),
                *(image.tobytes() for image in found["pixels"].values()),
            ]
        return [
            *seen,
            where.np_random.random(3).tobytes(),
            where.instruction.encode(),
            where.data.qpos.tobytes(),
        ]

    first = rest(env)
    for where in (env, other, other):
        where.restore(snapshot)
        assert rest(where) == first


def test_a_negative_seed_is_refused(blind):
    with pytest.raises(SimulationError, match="seed is -3; it must be at least 0"):
        blind.reset(seed=-3)


def test_seeds_give_different_scenes(blind):
    states = {blind.reset(seed=seed)[0]["agent_pos"].tobytes() for seed in range(5)}
    assert len(states) == 5


def test_splits_are_disjoint_and_cover_everything():
    for family in tasks.TASKS:
        train, heldout, every = (
            tasks.combinations(family, split) for split in ("train", "heldout", "all")
        )
        assert not {c.text for c in train} & {c.text for c in heldout}
        assert {c.text for c in train} | {c.text for c in heldout} == {c.text for c in every}
        assert len({c.text for c in every}) == len(every)
        assert 0.2 <= len(heldout) / len(every) <= 0.3
        for name in (
            "color",
            "other",
            "phrase",
        ):  # all parts occur in training, but not together
            assert {getattr(c, name) for c in train} == {getattr(c, name) for c in every}


def test_training_never_draws_a_heldout_instruction(blind):
    rng = np.random.default_rng(0)
    heldout = {c.text for family in tasks.TASKS for c in tasks.combinations(family, "heldout")}
    drawn = {layout.draw_command(rng, "mixed", "train", tasks.COLORS, {}).text for _ in range(3000)}
    assert not drawn & heldout
    blind.reset(seed=5)
    for _ in range(200):
        blind.retarget(rng)
        assert blind.instruction not in heldout
        assert blind.command.color in blind.colors


def test_instructions_are_short_and_plain():
    assert all(len(phrases) >= 4 for phrases in tasks.PHRASES.values())
    texts = [c.text for family in tasks.TASKS for c in tasks.combinations(family, "all")]
    assert max(len(text.split()) for text in texts) <= 10
    words = {word for text in texts for word in text.split()}
    assert all(word.isalpha() and word.islower() for word in words)
    assert len(words) <= 40


@pytest.mark.parametrize("family", tasks.TASKS)
def test_scenes_can_be_solved(family):
    rng = np.random.default_rng(1)
    for _ in range(100):
        command = layout.draw_command(rng, family, "all", tasks.COLORS, {})
        scene = layout.draw_layout(rng, command)
        assert scene.present[command.target]
        assert family != "stack_cubes" or scene.present[command.base]
        places = scene.cubes[list(scene.present)]
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(len(places))
        assert gaps.min() >= layout.CUBE_SPACING
        assert abs(scene.bin[1] - scene.plate[1]) >= layout.FAR_SPACING


def test_the_model_has_the_sizes_that_python_knows():
    model = load_scene().model
    walls = model.geom_bodyid == model.body("bin").id
    floor, *sides = zip(model.geom_pos[walls], model.geom_size[walls], strict=True)
    outer = tasks.BIN_INNER_HALF + tasks.BIN_WALL
    np.testing.assert_allclose(floor[1], [outer, outer, tasks.BIN_WALL / 2])
    for position, size in sides:
        thin = int(np.argmin(size))
        assert abs(position[thin]) - size[thin] == pytest.approx(tasks.BIN_INNER_HALF)
        assert position[2] + size[2] == pytest.approx(tasks.BIN_HEIGHT)
    (plate,) = np.flatnonzero(model.geom_bodyid == model.body("plate").id)
    np.testing.assert_allclose(
        model.geom_size[plate][:2], [tasks.PLATE_RADIUS, tasks.PLATE_HEIGHT / 2]
    )
    for color in tasks.COLORS:
        np.testing.assert_allclose(model.geom(f"cube_{color}").size, tasks.CUBE_HALF)
    for side, sign in (("left", 1), ("right", -1)):
        zone = model.geom(f"zone_{side}")
        ends = np.array([zone.pos - zone.size, zone.pos + zone.size])[:, :2] * [1, sign]
        np.testing.assert_allclose(
            np.sort(ends, axis=0).T, [tasks.ZONE_X, (tasks.ZONE_INNER, tasks.ZONE_OUTER)]
        )
    np.testing.assert_array_equal(model.jnt_range[:7].T, [arm.JOINT_LOW, arm.JOINT_HIGH])
    np.testing.assert_array_equal(model.jnt_range[7:9], [(0, FINGER_STROKE)] * 2)
    assert model.opt.timestep == SIM_DT
    assert model.vis.global_.offwidth == model.vis.global_.offheight == MAX_IMAGE_SIZE


def test_kinematics_of_the_model_match_the_denavit_hartenberg_table():
    scene = load_scene()
    solver = arm.SceneArm(scene.model, scene.tcp_site)
    rng = np.random.default_rng(0)
    for q in [arm.HOME, *rng.uniform(arm.JOINT_LOW, arm.JOINT_HIGH, (5, 7))]:
        for got, want in zip(solver.pose(q), forward_kinematics(q), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(forward_kinematics(arm.HOME)[1], np.eye(3), atol=1e-9)


def test_inverse_kinematics_reaches_the_workspace():
    scene = load_scene()
    solver = arm.SceneArm(scene.model, scene.tcp_site)
    rng = np.random.default_rng(2)
    for position in rng.uniform([0.30, -0.28, 0.02], [0.68, 0.28, 0.35], (30, 3)):
        matrix = rpy_matrix(np.array([0.0, 0.0, rng.uniform(-0.6, 0.6)]))
        q = solver.solve(arm.HOME, position, matrix)
        reached, turned = forward_kinematics(q)
        assert np.abs(reached - position).max() < 1e-3
        assert np.abs(turned - matrix).max() < 5e-3


def test_a_full_action_moves_and_turns_by_the_documented_step(blind):
    blind.reset(seed=3)
    before, yaw = blind.situation().tcp, blind.situation().tcp_yaw
    blind.advance(np.array([0, 1, 0, 0, 0, 1, 1.0]))
    for _ in range(3):
        blind.advance(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    np.testing.assert_allclose(blind.situation().tcp - before, [0, 0.05, 0], atol=2e-3)
    assert blind.situation().tcp_yaw - yaw == pytest.approx(0.25, abs=0.01)


def test_a_wild_drive_stays_finite_and_in_the_workspace(blind):
    blind.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(12):
        action = np.sign(rng.normal(size=7))
        for _ in range(5):
            blind.advance(action)
        now = blind.situation()
        assert np.all(np.isfinite(blind.data.qpos))
        assert np.all(now.command_position > WORKSPACE_LOW - 0.05)
        assert np.all(now.command_position < WORKSPACE_HIGH + 0.05)
    for _ in range(15):
        blind.advance(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    now = blind.situation()
    assert np.abs(now.command_position - now.tcp).max() < 0.01


def test_names_match_the_vectors(blind):
    observation, info = blind.reset(seed=0, options={"task": "stack_cubes"})
    assert observation["agent_pos"].shape == (len(STATE_NAMES),) == (14,)
    assert blind.action_space.shape == (len(ACTION_NAMES),)
    assert set(info) == {"is_success", "task", "instruction"}
    state = dict(zip(PRIVILEGED.names, blind.privileged_state(), strict=True))
    now = blind.situation()
    command = blind.command
    target, base = now.cubes[command.target], now.cubes[command.base]
    assert state["target_dx"] == pytest.approx(target[0] - now.tcp[0], abs=1e-6)
    assert state["goal_dz"] == pytest.approx(base[2] + 0.045 - now.tcp[2], abs=1e-6)
    assert state[f"{command.color}_y"] == pytest.approx(target[1], abs=1e-6)
    for color in set(tasks.COLORS) - set(blind.colors):
        assert all(state[f"{color}_{part}"] == 0 for part in ("x", "y", "z", "yaw"))


def test_scattering_keeps_the_objects_and_moves_the_arm(blind):
    blind.reset(seed=0)
    rng = np.random.default_rng(0)
    cubes, tips = blind.situation().cubes, []
    for _ in range(20):
        blind.scatter(rng)
        now = blind.situation()
        tips.append(now.tcp)
        np.testing.assert_array_equal(now.cubes, cubes)
        assert np.abs(now.tcp - now.command_position).max() < 0.06
    assert np.std(tips, axis=0).min() > 0.04


def test_another_instruction_is_of_the_chosen_families():
    config = CeedTabletopEnv(task="push_cube,stack_cubes")
    suites = config.create_envs(n_envs=1)
    env = Environment(config).inner
    env.reset(seed=0, options={"task": "push_cube"})
    rng = np.random.default_rng(0)
    families = set()
    for _ in range(40):
        env.retarget(rng)
        families.add(env.command.family)
    assert families == {"push_cube", "stack_cubes"} == set(suites)


@pytest.mark.parametrize("family", ["cube_in_bin", "cube_on_plate", "stack_cubes"])
def test_success_needs_a_released_cube(family):
    env = make(task=family)
    env.reset(seed=7)
    address = env.scene.cube_qpos[env.command.target]
    env.data.qpos[address : address + 3] = tasks.goal_position(env.command, env.situation())
    mujoco.mj_forward(env.scene.model, env.data)
    assert env.is_success()
    env.gripper_open = False
    assert not env.is_success()
    env.gripper_open = True
    env.data.qpos[address + 2] += 0.03
    mujoco.mj_forward(env.scene.model, env.data)
    assert not env.is_success()


def test_pushing_succeeds_only_in_the_named_zone():
    env = make(task="push_cube")
    env.reset(seed=7, options={"other": "left"})
    address = env.scene.cube_qpos[env.command.target]
    for y, expected in ((0.15, False), (0.225, True), (0.30, False), (-0.225, False)):
        env.data.qpos[address : address + 3] = [0.45, y, tasks.CUBE_HALF]
        mujoco.mj_forward(env.scene.model, env.data)
        assert env.is_success() is expected


def test_every_cube_spans_eight_pixels_wherever_it_can_stand():
    env = make()
    env.reset(seed=0)
    model, data = env.scene.model, env.data
    renderer = mujoco.Renderer(model, 96, 96)
    renderer.enable_segmentation_rendering()
    for address in env.scene.cube_qpos[1:]:
        data.qpos[address] = 3.0
    data.mocap_pos[:, 0] = 3.0  # the bin hides the foot of a cube right behind it
    address, geom = env.scene.cube_qpos[0], model.geom("cube_red").id
    for x in layout.NEAR_X:
        for y in (-tasks.ZONE_CENTRE, layout.NEAR_Y[0], 0.0, layout.NEAR_Y[1], tasks.ZONE_CENTRE):
            data.qpos[address : address + 7] = [x, y, tasks.CUBE_HALF, 1, 0, 0, 0]
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, "front")
            pixels = np.argwhere(renderer.render()[..., 0] == geom)
            assert (np.ptp(pixels, axis=0) + 1).min() >= 8, (x, y)
    renderer.close()


def test_front_camera_sees_bin_plate_and_zones():
    env = make()
    model = env.scene.model
    renderer = mujoco.Renderer(model, 96, 96)
    renderer.enable_segmentation_rendering()
    edge = layout.FAR_Y[1]
    for bin_y in (-edge, edge):
        env.reset(seed=0)
        env.data.mocap_pos[env.scene.bin_mocap] = [layout.FAR_X[1], bin_y, 0]
        env.data.mocap_pos[env.scene.plate_mocap] = [layout.FAR_X[1], -bin_y, 0]
        mujoco.mj_forward(model, env.data)
        renderer.update_scene(env.data, "front")
        geoms = renderer.render()[..., 0]
        seen = {model.body(model.geom_bodyid[g]).name for g in np.unique(geoms) if g >= 0}
        assert {"bin", "plate"} <= seen
        for name in ("zone_left", "zone_right"):
            assert (geoms == model.geom(name).id).sum() > 100
        border = np.concatenate([geoms[:, 0], geoms[:, -1], geoms[-1]])
        bodies = model.geom_bodyid[border]
        assert model.body("bin").id not in bodies
        assert model.body("plate").id not in bodies
    renderer.close()


def test_missing_gl_names_packages_and_the_setting(monkeypatch):
    def fail(*_):
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr(rendering.mujoco, "Renderer", fail)
    env = make(cameras=("front",), image_size=17)
    with pytest.raises(SimulationError, match=r"libegl1.*MUJOCO_GL=egl"):
        env.reset(seed=0)


def test_import_is_light():
    code = "import ceed_vla.sim, ceed_vla.sim.tabletop.env, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
