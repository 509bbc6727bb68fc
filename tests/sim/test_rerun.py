"""Episodes as recordings for Rerun: entities, Jacobi states, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ceed_vla import load, viz
from ceed_vla.errors import ConfigError
from ceed_vla.outputs import is_own
from ceed_vla.sim.environment import EnvPool, joined
from ceed_vla.sim.evaluate import evaluate
from ceed_vla.sim.rerun_episodes import jacobi_states, log_episode
from ceed_vla.sim.rollout import PolicyRunner, drive
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from tests.helpers.evaluations import options, quiet, save_untrained

pytest.importorskip("rerun", reason="needs the extra viz")
SHOWN = ("front", "wrist", "state", "chunk", "forwards", "latency_ms", "exit")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("policy"))


def test_an_evaluation_writes_the_episode_of_its_clips(checkpoint: Path, tmp_path: Path) -> None:
    from tests.helpers.rerun_files import components_of, entities_of

    file = tmp_path / "episode.rrd"
    changes = {"decoders": "ar,ceed", "timing_chunks": 0, "clips": False, "delay_ms": [0.0, 150.0]}
    for _ in range(2):  # the second run replaces its file
        evaluate(options(checkpoint, tmp_path / "out", **changes, rerun=str(file)), quiet())
    expected = {f"/{decoder}/{name}" for decoder in ("ar", "ceed") for name in SHOWN}
    found = {entity for entity in entities_of(file) if not entity.startswith("/__")}
    assert found == {*expected, "/ceed/jacobi_states"}
    assert {"rerun.components.TensorData", "rerun.components.ImageBuffer"} <= components_of(file)
    assert is_own(file)


def test_the_states_are_those_of_the_decoded_chunk() -> None:
    env = CeedTabletopEnv(task="push_cube", episode_length=12)
    with EnvPool(1, env) as pool:
        runner = PolicyRunner(joined(load("student"), env), "jacobi")
        replans = list(drive(runner, pool, 40_000, "push_cube"))
    assert len(replans) == 3
    for replan in replans:
        states = jacobi_states(runner, replan)
        assert states.shape == (replan.chunk.forwards + 1, len(replan.chunk.tokens))
        assert torch.equal(torch.from_numpy(states[-1]), replan.chunk.tokens)
    assert not np.array_equal(states[0], states[-1])


def test_an_environment_may_have_no_state(tmp_path: Path) -> None:
    from tests.helpers.rerun_files import entities_of

    env = CeedTabletopEnv(task="push_cube", episode_length=4)
    with EnvPool(1, env) as pool:
        runner = PolicyRunner(joined(load("student"), env), "jacobi")
        replans = list(drive(runner, pool, 40_000, "push_cube"))
        pixels = {"pixels": replans[0].observation["pixels"]}
        stateless = replace(replans[0], observation=pixels)
        with viz.RerunLog(tmp_path / "episode.rrd") as log:
            for name, shown in (
                ("ar", stateless),
                ("cap1", replans[0]),
                ("cap1_random", replans[0]),
            ):
                runner.decoding = name
                log_episode(log, name, runner, [shown], 10)
    found = entities_of(tmp_path / "episode.rrd")
    assert "/ar/chunk" in found
    assert "/ar/state" not in found
    assert "/cap1/jacobi_states" in found
    assert "/cap1_random/jacobi_states" not in found  # its guess is not drawn again


def test_files_and_missing_packages_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.rrd").write_text("mine")
    with pytest.raises(ConfigError, match="did not make"):
        viz.check_rerun("rerun", str(tmp_path / "mine.rrd"))
    with pytest.raises(ConfigError, match=r"must end in \.rrd"):
        viz.check_rerun("rerun", str(tmp_path / "episode.mp4"))

    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ConfigError, match=r"--rerun needs rerun, .* `scripts/setup.sh viz`"):
        viz.check_rerun("rerun", str(tmp_path / "episode.rrd"))
