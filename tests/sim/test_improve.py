"""Serial groups from partial histories: the same state again, branches, seeds, a whole command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ceed_vla import load
from ceed_vla.errors import ConfigError, SimulationError
from ceed_vla.sim.environment import EnvPool, joined
from ceed_vla.sim.improve import Groups, _resumed, group_runner
from ceed_vla.sim.rollout import Episode, PolicyRunner, replan
from ceed_vla.sim.tabletop.env import TabletopEnv
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from ceed_vla.starts import Start
from ceed_vla.training.improve.config import ImproveConfig
from ceed_vla.training.improve.run import improve

SEED = 37_000


def test_new_episodes_are_of_training_seeds_and_tasks_take_turns() -> None:
    groups = Groups(CeedTabletopEnv(task="push_cube"))
    assert groups.first(SEED, 1, 2) == [Start(SEED + 1, "push_cube"), Start(SEED + 2, "push_cube")]
    assert [start.seed for start in groups.first(39_998, 1, 3)] == [39_999, 39_998, 39_999]
    assert "--env.task=push_cube" in groups.settings
    for seed in (29_999, 40_000):
        with pytest.raises(ConfigError, match="training seeds are 30000 to 39999"):
            groups.first(seed, 0, 1)


def test_the_environment_must_restore_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TabletopEnv, "snapshot")
    env = CeedTabletopEnv(task="push_cube", episode_length=8)
    with pytest.raises(SimulationError, match=r"lacks snapshot\(\), which improve needs"):
        next(Groups(env, 1)("student", "cap1", 2, [Start(SEED, "push_cube")], 0))


@pytest.mark.slow
def test_a_partial_history_leads_to_the_same_state_and_the_same_episode() -> None:
    env = CeedTabletopEnv(task="push_cube", episode_length=60)
    bundle = joined(load("student"), env)
    with EnvPool(2, env) as pool:
        runner = PolicyRunner(bundle, "cap1")
        episode = Episode.start(pool.env(0), SEED, "push_cube", 60)
        for _ in range(2):
            replan(runner, [episode])
        actions = tuple(tuple(map(float, action)) for action in episode.actions)
        assert episode.previous is not None
        start = Start(SEED, "push_cube", actions, tuple(episode.previous.tolist()))
        again = _resumed(pool, 1, start)
        for name, image in episode.env.observe()["pixels"].items():
            np.testing.assert_array_equal(again.env.observe()["pixels"][name], image)
        np.testing.assert_array_equal(
            again.env.observe()["agent_pos"], episode.env.observe()["agent_pos"]
        )
        while not episode.over:
            replan(runner, [episode])
    # the first state is the one that cap1 executes
    (group,) = group_runner("student", env, "cap1", 3, 0)([start])
    assert group.start == start
    assert 2 <= len(group.states) - 1 <= 3
    if group.solved:
        assert len(group.solved) == len(group.states) - 1
        assert group.solved[0] == episode.result.success
        assert group.steps >= episode.result.steps
    for reached in group.reached:
        assert reached.actions[: len(actions)] == actions
        assert len(reached.actions) > len(actions)
        assert len(reached.previous) == group.states.shape[1]
        (later,) = group_runner("student", env, "cap1", 3, 0)([reached])
        assert later.states[0].tolist() != group.states[0].tolist()


@pytest.mark.slow
def test_from_the_shipped_student_to_an_improved_one(tmp_path: Path) -> None:
    env = CeedTabletopEnv(task="push_cube", episode_length=40)
    config = ImproveConfig("student", str(tmp_path / "out"), "cap1", iterations=2, groups=6, rank=4)
    assert improve(config, Groups(env, 1)).is_relative_to(tmp_path / "out")
    records = json.loads((tmp_path / "out" / "improve.json").read_text())["iterations"]
    assert [record["groups"] for record in records] == [6, 6]
    assert records[0]["control_steps"] > 100
    improved, before = (
        load(path)[0].config for path in (tmp_path / "out" / "checkpoints" / "final", "student")
    )
    assert improved.decode_with == before.decode_with
    assert before.decodings  # thresholds, which were measured on the other weights
    assert not improved.decodings
