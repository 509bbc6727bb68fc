"""Lock-step rollouts and takeover recordings, with scripted policies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError
from ceed_vla.sim.environment import EnvPool
from ceed_vla.sim.record import record
from ceed_vla.sim.recording.config import RecordConfig
from ceed_vla.sim.rollout import (
    Episode,
    EpisodeResult,
    PolicyRunner,
    motion_of,
    replan,
    rollout,
    stack_previous,
)
from ceed_vla.sim.success import wilson_interval
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from tests.helpers.episodes import run_seeds
from tests.helpers.tabletop import tabletop_config

CHUNK, DIMS = 8, 7
COMMAND = slice(-6, None)  # of the state: commanded position, yaw and gripper


class FakePolicy:
    """A policy with the interface of `CeedVLAPolicy.decode`; it stores its calls.

    Args:
        act: From state (14,) to action (7,), repeated over the chunk; None = zero actions.
        malformed: Calls, from 1 on, whose tokens do not decode to a chunk.
    """

    def __init__(
        self, act: Callable[[np.ndarray], np.ndarray] | None = None, malformed: Collection[int] = ()
    ) -> None:
        self.config = tabletop_config(n_action_steps=4, chunk_size=CHUNK, decoding=DecodingConfig())
        self.act = act
        self.calls: list[SimpleNamespace] = []
        self.actions = torch.empty(0, CHUNK, DIMS)
        self.tokenizer = SimpleNamespace(
            readable=lambda tokens: ~torch.isin(tokens[:, 0], torch.tensor(list(malformed))),
            decode=lambda tokens: self.actions[: len(tokens)],
        )

    def decode(
        self,
        batch: dict[str, Any],
        decoding: Any,
        previous: Any = None,
        generator: Any = None,
        shift_steps: int | None = None,
        executed_steps: int | None = None,
        frozen_steps: int = 0,
        read: bool = True,
    ) -> Any:
        states = batch["observation.state"]
        rows = len(states)
        self.calls.append(
            SimpleNamespace(
                batch=batch, decoding=decoding, previous=previous, frozen_steps=frozen_steps
            )
        )
        actions = torch.zeros(rows, CHUNK, DIMS)
        if self.act is not None:
            actions += torch.from_numpy(np.stack([self.act(state) for state in states.numpy()]))[
                :, None
            ]
        self.actions = actions
        return SimpleNamespace(
            tokens=torch.full((rows, CHUNK * DIMS), len(self.calls)),
            forwards=3,
            iterations=torch.arange(rows) + 1,
            exit_reason=["converged"] * rows,
            layer_forwards=None,
            prefix_layers=None,
            seconds={"prefill": 0.1, "decode": 0.2},
        )


def push(length: int = 120) -> CeedTabletopEnv:
    return CeedTabletopEnv(task="push_cube", episode_length=length)


def mixed(length: int) -> CeedTabletopEnv:
    return CeedTabletopEnv(task="mixed", episode_length=length)


def reach(state: np.ndarray) -> np.ndarray:
    """A policy that moves up and left by the measured position, so that it differs by scene."""
    return np.array([0, 0.5 * np.sign(0.2 - state[1]), 0.3, 0, 0, 0, 1], dtype=np.float32)


def test_counts_of_failing_episodes() -> None:
    policy = FakePolicy()
    results = run_seeds(policy, range(40_000, 40_003), mixed(10), decoding="jacobi", batch=2)
    assert [r.seed for r in results] == [40_000, 40_001, 40_002]
    assert not any(r.success for r in results)
    assert [r.steps for r in results] == [10, 10, 10]
    # 4 + 4 + 2 steps; the row's own iterations
    assert [r.forwards for r in results] == [
        [1] * 3,
        [2] * 3,
        [1] * 3,
    ]
    assert results[0].exit_reasons == ["converged"] * 3
    assert results[0].seconds[0] == {"prefill": 0.1, "decode": 0.2, "rows": 2}
    assert all(r.instruction and r.task for r in results)
    assert [len(call.batch["task"]) for call in policy.calls] == [2] * 3 + [1] * 3
    assert policy.calls[0].batch["observation.images.front"].shape == (2, 3, 96, 96)
    assert policy.calls[0].decoding == "jacobi"


def test_previous_is_reset_with_the_episode() -> None:
    policy = FakePolicy()
    results = run_seeds(policy, [1, 2, 3], push(16), batch=2, executed_steps=8)
    assert [r.task for r in results] == ["push_cube"] * 3
    assert policy.calls[0].previous is None
    assert policy.calls[1].previous.tolist() == [[1] * 56] * 2
    assert policy.calls[2].previous is None  # the third episode, alone


def test_stack_previous_marks_missing_rows() -> None:
    stacked = stack_previous([None, torch.tensor([4, 5])])
    assert stacked is not None
    assert stacked.tolist() == [[-1, -1], [4, 5]]
    assert stack_previous([None, None]) is None


def test_episodes_do_not_depend_on_their_neighbours() -> None:
    def trace(batch: int) -> dict[int, list[list[float]]]:
        policy = FakePolicy(reach)
        results = run_seeds(policy, [7, 8], mixed(12), batch=batch)
        states = [call.batch["observation.state"].tolist() for call in policy.calls]
        flat = [call[slot] for slot in range(batch) for call in states]
        assert len(flat) == sum(math.ceil(r.steps / 4) for r in results)
        return {index: flat[3 * index : 3 * index + 3] for index in range(2)}

    assert trace(1) == trace(2)


def test_success_ends_an_episode_early() -> None:
    with EnvPool(1, push()) as pool:
        env = pool.env(0)

        class Expert(FakePolicy):
            def decode(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
                result = super().decode(batch, *args, **kwargs)
                self.actions[:, 0] = torch.from_numpy(env.expert_action())
                return result

        runner = PolicyRunner((Expert(), None, None), executed_steps=1)
        (result,) = rollout(runner, pool, [(11, "push_cube")])
    assert result.success
    assert result.steps == len(result.forwards) < 120


def test_a_malformed_chunk_holds_the_arm_and_the_episode_goes_on() -> None:
    policy = FakePolicy(reach, malformed={2})
    (result,) = run_seeds(policy, [7], mixed(16))
    assert result.exit_reasons == ["converged", "malformed", "converged", "converged"]
    assert result.steps == 16
    commands = np.concatenate([call.batch["observation.state"] for call in policy.calls])[
        :, COMMAND
    ]
    assert not np.allclose(commands[0], commands[1])
    # position, yaw and gripper as they were
    np.testing.assert_array_equal(commands[1], commands[2])
    assert not np.allclose(commands[2], commands[3])
    assert [call.previous is None for call in policy.calls] == [True, False, True, False]


def test_a_postprocessor_gets_the_rows_of_malformed_chunks_too() -> None:
    policy = FakePolicy(malformed={1})
    policy.actions = torch.ones(3, CHUNK, DIMS)
    states = torch.arange(3.0)[:, None, None]  # as relative actions are completed
    runner = PolicyRunner((policy, None, lambda actions: actions + states), "jacobi")
    tokens = torch.tensor([[2], [1], [3]]).expand(3, CHUNK * DIMS)
    first, second, third = runner._actions(tokens)
    assert second is None
    assert first is not None
    assert third is not None
    assert (first[0, 0], third[0, 0]) == (1.0, 3.0)


def test_families_take_turns() -> None:
    tasks = ["stack_cubes", "cube_in_bin"]
    env = CeedTabletopEnv(task=",".join(tasks), episode_length=4)
    assert [r.task for r in run_seeds(FakePolicy(), [5, 6, 7], env)] == [*tasks, tasks[0]]


def test_a_policy_of_other_features_is_refused() -> None:
    policy = FakePolicy()
    policy.config.input_features["observation.images.top"] = policy.config.image_features[
        "observation.images.front"
    ]
    with pytest.raises(
        ConfigError, match=r"reads or writes observation\.images\.top .*observation\.images\.wrist"
    ):
        run_seeds(policy, [5], push())


class Noted:
    """An environment that only stores its actions; None is holding."""

    def __init__(self) -> None:
        self.config, self.success, self.finished = SimpleNamespace(fps=10), False, False
        self.actions: list[Any] = []

    def observe(self) -> dict[str, Any]:
        return {"pixels": np.zeros((4, 4, 3), np.uint8), "agent_pos": np.zeros(14, np.float32)}

    def hold_action(self) -> np.ndarray:
        return np.array([-1.0])

    def advance(self, action: np.ndarray) -> bool:
        self.actions.append(int(action[0]))
        return False


class Counting(FakePolicy):
    """A policy whose chunk c has the actions and tokens 10 c, 10 c + 1, ..."""

    def __init__(self, size: int | None = 1) -> None:
        super().__init__()
        self.config.delta_dims = None
        self.tokenizer = SimpleNamespace(
            tokens_per_step=size,
            readable=lambda tokens: torch.ones(len(tokens), dtype=torch.bool),
            decode=lambda tokens: tokens[..., None].float(),
        )

    def decode(self, batch: dict[str, Any], *args: Any, **options: Any) -> Any:
        result = super().decode(batch, *args, **options)
        result.tokens = (10 * len(self.calls) + torch.arange(CHUNK)).expand(len(result.tokens), -1)
        return result


@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        (0, [10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]),
        (1, [-1, 10, 11, 12, 13, 21, 22, 23, 24, 31, 32, 33]),
        (3, [-1, -1, -1, 10, 11, 12, 13, 23, 24, 25, 26, 33]),
        (6, [-1, -1, -1, -1, -1, -1, 10, 11, 12, 13, 14, 15]),
        # a chunk ends before the next is ready
        (
            7,
            [*[-1] * 7, *range(10, 17), 27, *[-1] * 6, 31, 32],
        ),
    ],
)
def test_the_chunk_before_goes_on_while_the_next_is_decoded(
    delay: int, expected: list[int]
) -> None:
    for size in (1, None):
        policy, env = Counting(size), Noted()
        episode = Episode(env, EpisodeResult(0), len(expected))  # type: ignore[arg-type]
        runner = PolicyRunner((policy, None, None), executed_steps=4, delay=delay)
        while not episode.over:
            replan(runner, [episode])
        assert env.actions == expected
        first, second = policy.calls[:2]
        assert first.frozen_steps == 0
        assert second.frozen_steps == (delay if size else 0)
        if size and delay:
            begin = 4 - min(delay, 4)
            assert second.previous[0, :delay].tolist() == list(range(10, 18))[begin:][:delay]


def test_the_guess_continues_behind_what_was_executed() -> None:
    policy, env = Counting(), Noted()
    episode = Episode(env, EpisodeResult(0), 14)  # type: ignore[arg-type]
    runner = PolicyRunner((policy, None, None), executed_steps=4, delay=3)
    while not episode.over:
        replan(runner, [episode])
    # Three holds and a step, then 11, 12, 13 are frozen: the guess begins with them.
    assert policy.calls[1].previous[0].tolist() == [11, 12, 13, 14, 15, 16, 17, 17]
    assert policy.calls[2].previous[0].tolist() == [24, 25, 26, 27, 27, 27, 27, 27]
    assert [call.frozen_steps for call in policy.calls[:3]] == [0, 3, 3]


def test_rows_with_other_frozen_steps_are_decoded_apart() -> None:
    policy = Counting()
    runner = PolicyRunner((policy, None, None), executed_steps=4, delay=2)
    chunks = runner.decode([Noted().observe()] * 3, ["a", "b", "c"], [None] * 3, [2, 0, 2])
    assert len(chunks) == 3
    asked = {tuple(call.batch["task"]): call.frozen_steps for call in policy.calls}
    assert asked == {("b",): 0, ("a", "c"): 2}


def test_motion() -> None:
    actions = np.array([[0.0, 1], [1, 1], [3, 1], [6, 1], [6, 1]])
    motion = motion_of(actions, (), fps=10)
    assert motion == pytest.approx({"action_rate": 1.5, "path": 6.0, "jerk": 1000 * (0 + 4) / 2})
    assert motion_of(actions, (0,), 10) == pytest.approx(
        {"action_rate": 1.5, "path": 16.0, "jerk": 1000 * (1 + 1 + 3) / 3}
    )
    assert motion_of(actions[:1], (), 10) == {"action_rate": 0.0, "path": 0.0, "jerk": 0.0}


def test_interval_of_a_success_rate() -> None:
    low, high = wilson_interval(87, 100)
    assert (round(low, 3), round(high, 3)) == (0.790, 0.922)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 20)[0] == 0.0
    assert wilson_interval(20, 20)[1] == pytest.approx(1.0)


def test_takeover_stores_only_finished_corrections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "takeover"
    options = {"env": push(), "episodes": 3, "batch": 2, "max_chunks": 3}
    config = RecordConfig(
        root=root,
        mode="takeover",
        policy_path="student",
        decoding="cap2",
        progress=False,
        **options,
    )
    policy = FakePolicy(reach)
    monkeypatch.setattr("ceed_vla.sim.record.load", lambda path: (policy, None, None))
    summary = record(config)
    assert {call.decoding for call in policy.calls} == {"cap2"}
    assert summary.attempts == sum(summary.outcomes.values()) == 3
    recorded = summary.outcomes.get("push_cube/recorded", 0)
    assert recorded > 0
    assert summary.episodes == recorded
    progress = json.loads((root / "recording.json").read_text())["progress"]
    assert set(progress["episode_seeds"]) <= {30_000, 30_001, 30_002}
    table = pq.read_table(next(root.glob("data/*/*.parquet"))).to_pydict()
    assert len(table["action"]) == summary.frames
    lengths = np.bincount(table["episode_index"])
    assert lengths.max() <= config.takeover_steps
    # The first stored frame is where the policy left the arm, not the pose after reset.
    with EnvPool(1, push()) as pool:
        pool.env(0).reset(progress["episode_seeds"][0], "push_cube")
        start = pool.env(0).observe()["agent_pos"]
    assert not np.allclose(table["observation.state"][0], start, atol=1e-3)
