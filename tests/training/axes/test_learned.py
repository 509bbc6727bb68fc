"""Learning when to exit: the closed form, a planted optimum, weights of strata, a simulated run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from episodes import in_order

from ceed_vla import load
from ceed_vla.axes.learned.rule import FEATURES, Group
from ceed_vla.errors import ConfigError, DatasetError, SimulationError
from ceed_vla.sim.axes.learned import SerialGroups, group_runner
from ceed_vla.sim.environment import EnvPool, joined
from ceed_vla.sim.rollout import PolicyRunner, rollout
from ceed_vla.sim.tabletop.env import TabletopEnv
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from ceed_vla.training.axes.learned import (
    START,
    ReinforceConfig,
    Strata,
    described,
    drawn,
    learn,
    line_of,
    read_groups,
    reinforce,
    scout,
    tabulated,
)


def planted(count: int) -> list[Group]:
    """States that are wrong if many tokens moved, at any confidence; the second is always right."""
    random = np.random.default_rng(0)
    groups = []
    for seed in range(count):
        seen = np.column_stack([random.normal(0, 2, (2, 2)), random.random((2, 1)), [[1.0], [0.0]]])
        wrong = seen[0, 2] > 0.5
        groups.append(Group(seed, seen, [not wrong, True]))
    return groups


def all_alike(count: int) -> Strata:
    episodes = {"differ": [], "alike": [(seed, "t", 9) for seed in range(count)]}
    return Strata(episodes, dict.fromkeys(range(count), "alike"), {"alike": 1.0})


def test_chances_are_those_of_leaving_in_turn() -> None:
    config, strata = ReinforceConfig(), all_alike(2)
    strata.solved = {"alike": 1.0}
    groups = [Group(0, np.zeros((3, 4)), [True] * 3), Group(1, np.zeros((1, 4)), [None])]
    table = tabulated(config, groups, strata)
    chances = table.chances(torch.tensor([0.0, 0, 0, 0, np.log(3)], dtype=torch.float64))
    np.testing.assert_allclose(chances, [[0.75, 0.1875, 0.0625], [1, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(table.advantage.sum(1), 0, atol=1e-12)
    assert table.advantage[0, 0] > table.advantage[0, 1] > table.advantage[0, 2]


@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_a_head_learns_what_goes_wrong_and_what_it_is_worth(decay: float) -> None:
    config = ReinforceConfig(decay=decay, leash=1e-4)
    groups, strata = planted(400), all_alike(400)
    strata.solved = {"alike": 1.0}
    table = tabulated(config, groups, strata)
    head = learn(config, table)
    leaves = np.array([[*g.features[0], 1] for g in groups]) @ head > 0
    wrong = np.array([not g.solved[0] for g in groups])
    assert np.mean(leaves != wrong) > 0.95
    found = described(groups, table, head)
    assert found["advantage"][1] > found["advantage"][0]
    assert found["only_last_solves"] == wrong.sum()
    assert found["without_spread_of_outcome"] == round(1 - wrong.mean(), 4)
    held = learn(ReinforceConfig(decay=decay, leash=1e3), table)
    np.testing.assert_allclose(held, START, atol=0.2)


class Script:
    """Rollouts by a rule: one forward fails on every fifth seed."""

    def outcomes(
        self, policy: str, decoders: Sequence[str], seeds: range
    ) -> Iterator[tuple[str, int, str, bool, int]]:
        for seed in seeds:
            yield from (
                (name, seed, "t", name != "cap1" or seed % 5 > 0, 10 + seed % 2)
                for name in decoders
            )

    def groups(
        self, policy: str, decoder: str, cap: int, decisions: Sequence[tuple[int, str, int]]
    ) -> Iterator[Group]:
        for seed, _, _ in decisions:
            yield Group(seed, np.zeros((2, len(FEATURES))), [seed % 5 > 0, True])


def test_strata_weigh_back_to_their_share() -> None:
    config = ReinforceConfig(scouts=100, groups=400, seed=30_000)
    strata = scout(config, Script())
    assert {name: len(found) for name, found in strata.episodes.items()} == {
        "differ": 20,
        "alike": 80,
    }
    assert strata.solved == {"differ": 1.0, "alike": 1.0}
    decisions = drawn(config, strata, np.random.default_rng(0))
    assert all(0 <= at < 11 for _, _, at in decisions)
    of = [strata.of[seed] for seed, _, _ in decisions]
    assert of.count("differ") == 200
    groups = list(Script().groups("", "", 2, decisions))
    table = tabulated(config, groups, strata)
    wrong = torch.tensor([not group.solved[0] for group in groups])
    assert (table.weight * wrong).mean().item() == pytest.approx(0.2, abs=0.005)
    assert table.weight.mean().item() == pytest.approx(1)


def test_bad_settings(tmp_path: Path) -> None:
    for change in ({"cap": 1}, {"decay": 0.0}, {"groups": 0}):
        with pytest.raises(ConfigError):
            ReinforceConfig(**change)  # type: ignore[arg-type]
    for seeds in (range(39_999, 40_001), range(50_000, 50_001)):
        with pytest.raises(ConfigError, match="training seeds are 30000 to 39999"):
            next(SerialGroups(CeedTabletopEnv()).outcomes("student", ["cap1"], seeds))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output_dir"):
        reinforce(ReinforceConfig("student", str(tmp_path)), Script())


def test_groups_of_a_killed_run_are_kept_and_none_is_an_error(tmp_path: Path) -> None:
    strata, group = all_alike(1), Group(0, np.zeros((1, 4)), [True])
    (tmp_path / "groups.jsonl").write_text(
        f'{line_of(strata)}\n{line_of(group)}\n{{"seed": 0, "fea'
    )
    assert [(found.seed, found.solved) for found in read_groups(tmp_path / "groups.jsonl")[1]] == [
        (0, [True])
    ]
    script = Script()
    script.groups = lambda *_: iter(())  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="--groups is 1, but no group reached"):
        reinforce(ReinforceConfig("student", str(tmp_path / "out"), groups=1, scouts=5), script)


@pytest.mark.slow
def test_branches_go_on_as_an_episode_would() -> None:
    env = CeedTabletopEnv(task="push_cube", episode_length=60)
    seeds = range(36_000, 36_006)
    bundle = joined(load("student"), env)
    with EnvPool(6, env) as pool:
        runner = PolicyRunner(bundle, "cap1")
        alone = in_order(rollout(runner, pool, [(seed, "push_cube") for seed in seeds]))
    groups = group_runner("student", env, "cap1", 2)([(seed, "push_cube", 1) for seed in seeds])
    assert len(groups) == 6
    ran = [group for group in groups if group.solved[0] is not None]
    assert ran
    for group in ran:  # the first state is the one that cap1 executes
        assert group.features.shape == (len(group.solved), len(FEATURES))
        assert group.solved[0] == alone[seeds.index(group.seed)].success
    assert group_runner("student", env, "cap1", 2)([(36_000, "push_cube", 500)]) == []


@pytest.mark.slow
def test_from_the_shipped_student_to_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = CeedTabletopEnv(task="push_cube", episode_length=40)
    config = ReinforceConfig(
        "student", str(tmp_path / "out"), cap=2, rounds=1, groups=4, scouts=4, steps=20
    )
    assert reinforce(config, SerialGroups(env, 1)) == tmp_path / "out"
    report = json.loads((tmp_path / "out" / "reinforce.json").read_text())
    policy, _, _ = load(tmp_path / "out")
    assert policy.config.decodings["learned"] == f"{report['rounds'][0]['head']}_cap2"
    assert policy.decoding_config("learned").exits == (report["rounds"][0]["head"],)
    again = ReinforceConfig(
        "student", str(tmp_path / "again"), cap=2, steps=20, groups_from=str(tmp_path / "out")
    )
    reinforce(again, Script())  # a rule that is not used
    assert json.loads((tmp_path / "again" / "reinforce.json").read_text()) == report
    lines = (tmp_path / "out" / "groups.jsonl").read_text().splitlines()
    for damage in (
        lines[:1],
        [*lines, "{"],
        lines[1:],
        [lines[0], lines[1].replace('"seed": 3', '"seed": 9')],
    ):
        (tmp_path / "out" / "groups.jsonl").write_text("\n".join([*damage, ""]))
        again.output_dir = str(tmp_path / "damaged")
        with pytest.raises(DatasetError, match=r"groups\.jsonl"):
            reinforce(again, Script())
    monkeypatch.delattr(TabletopEnv, "snapshot")
    with pytest.raises(SimulationError, match=r"lacks snapshot\(\), which reinforce needs"):
        next(SerialGroups(env, 1).groups("student", "cap1", 2, [(0, "x", 0)]))


GROUPS_LINES = {
    "text": "hello\nthere\n",
    "one line": "hello",
    "empty": "",
    "a list": "[]\n[]\n",
    "many values": "[" + "[]," * 2_000_000 + "[]]\n",
    "deep": "[" * 100_000 + "\n",
    "other strata": '{"of": {"0": "x"}, "episodes": {}, "solved": {}}\n{}\n',
    "no chunks": (
        '{"of": {"0": "alike"}, "episodes": {"alike": [[0, "a", 0]], "differ": []}, '
        '"solved": {"alike": 1, "differ": 0}}\n{}\n'
    ),
}


@pytest.mark.parametrize("content", GROUPS_LINES.values(), ids=GROUPS_LINES)
def test_other_files_are_no_groups(tmp_path: Path, content: str) -> None:
    (tmp_path / "groups.jsonl").write_text(content)
    config = ReinforceConfig("nowhere", str(tmp_path / "out"), groups_from=str(tmp_path))
    with pytest.raises(DatasetError, match="groups"):  # raised before the policy is loaded
        reinforce(config, Script())


@pytest.mark.parametrize(
    "change",
    [
        {"solved": ["yes"]},
        {"solved": []},
        {"solved": [True] * 100},
        {"seed": "0"},
        {"seed": 7},
        {"features": [[1, 2]]},
        {"features": [[float("nan")] * 4]},
        {"features": [["a"] * 4]},
    ],
    ids=str,
)
def test_a_group_of_other_kinds_does_not_teach(tmp_path: Path, change: dict[str, Any]) -> None:
    values = json.loads(line_of(Group(0, np.zeros((1, 4)), [True]))) | change
    lines = [line_of(all_alike(1)), json.dumps(values)]
    (tmp_path / "groups.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DatasetError, match="groups"):
        read_groups(tmp_path / "groups.jsonl")


@pytest.mark.parametrize("kind", ["pipe", "device", "nothing"])
def test_groups_are_read_from_a_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "groups.jsonl"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    with pytest.raises(DatasetError, match=r"must be a file|There is no"):
        read_groups(file)
