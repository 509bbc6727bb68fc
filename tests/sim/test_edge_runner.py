"""Episodes on an export are those of torch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="exports need the extra export")

from ceed_vla import load
from ceed_vla.edge import EdgePolicy
from ceed_vla.errors import ConfigError
from ceed_vla.export.cached import cached_export
from ceed_vla.sim.edge_runner import EdgeRunner, arrays_of
from ceed_vla.sim.engines import drives, open_engines, resolved
from ceed_vla.sim.environment import EnvPool, joined, observation_batch
from ceed_vla.sim.evaluate import EvalConfig, evaluate
from ceed_vla.sim.rollout import PolicyRunner, rollout
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv

ENV = CeedTabletopEnv(task="mixed", episode_length=24)


@pytest.fixture(scope="module")
def export() -> EdgePolicy:
    return EdgePolicy(cached_export("student"), threads=1)


@pytest.mark.parametrize("delay", [0, 2])
def test_episodes_are_torchs(export: EdgePolicy, delay: int) -> None:
    bundle = joined(load("student"), ENV)
    with EnvPool(2, ENV) as pool:
        episodes = [(40_000, "mixed"), (40_001, "mixed")]
        theirs = list(rollout(PolicyRunner(bundle, "ceed", None, 4, delay), pool, episodes))
        mine = list(rollout(EdgeRunner(export, bundle, "ceed", 4, delay), pool, episodes))
    for one, other in zip(mine, theirs, strict=True):
        assert one.forwards == other.forwards
        assert one.exit_reasons == other.exit_reasons
        assert one.block_layers == other.block_layers
        assert one.motion == other.motion
        assert one.steps == other.steps


def test_observations_have_lerobots_names() -> None:
    with EnvPool(1, ENV) as pool:
        env = pool.env(0)
        env.reset(40_000)
        raw = env.observe()
    batch = observation_batch([raw], ["go"])
    arrays = arrays_of(raw)
    assert arrays.keys() == batch.keys() - {"task"}
    for name, value in arrays.items():
        theirs = batch[name][0].numpy()
        if value.ndim == 3:
            np.testing.assert_array_equal(value, (theirs.transpose(1, 2, 0) * 255).round())
        else:
            np.testing.assert_allclose(value, theirs, rtol=1e-6)
    one = arrays_of({"pixels": np.zeros((2, 2, 3)), "environment_state": [1.0]})
    assert sorted(one) == ["observation.environment_state", "observation.image"]


def config(folder: Path, **options: Any) -> EvalConfig:
    return EvalConfig(
        policy=CheckpointPath("student"),
        episodes=2,
        seed=40_000,
        timing_chunks=2,
        clips=False,
        threads=1,
        env=ENV,
        output_dir=str(folder),
        **options,
    )


@pytest.mark.slow
def test_an_evaluation_runs_on_the_export_what_the_export_runs(tmp_path: Path) -> None:
    decoders = "ceed,jacobi_random"
    reports = {
        engine: evaluate(config(tmp_path / engine, engine=engine, decoders=decoders))
        for engine in ("edge", "auto", "eager")
    }
    used = {"ceed": "edge", "jacobi_random": "eager", "ar": "edge"}
    assert reports["edge"]["timing"]["engines"] == used
    assert reports["auto"]["timing"]["engines"] == used
    assert set(reports["edge"]["timing"]["parts"]) == {"policy edge"}
    for name in ("ceed", "jacobi_random"):
        rows = [report["decoders"][name] for report in reports.values()]
        assert len({row["forwards_mean"] for row in rows}) == 1
    # Episodes of another engine are not continued.
    with pytest.raises(ConfigError):
        evaluate(config(tmp_path / "edge", engine="eager", decoders=decoders, resume=True))


def test_what_has_no_export_is_an_error_or_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = {"policy": load("student")}
    paths = {"policy": "student"}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"needs onnxruntime, which is not installed: .*export"):
        open_engines("edge", bundles, paths, ENV)
    options = SimpleNamespace(policy=CheckpointPath("student"), env=ENV, device=None)
    assert resolved("auto", options) == "eager"
    assert not drives(open_engines("eager", bundles, paths, ENV))
    assert list(open_engines("fastest", bundles, paths, ENV)) == ["eager", "compiled"]
