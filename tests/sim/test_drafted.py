"""A teacher that begins from its student's chunk writes what it writes alone; forwards and layers
of both count.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ceed_vla import load
from ceed_vla.errors import ConfigError
from ceed_vla.sim.decoders import parse_decoders, resolve_rows
from ceed_vla.sim.drafted import DraftedRunner
from ceed_vla.sim.environment import EnvPool, joined
from ceed_vla.sim.rollout import PolicyRunner
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from ceed_vla.sim.timing import make_runner


def test_drafts_are_verified_and_counted() -> None:
    env = CeedTabletopEnv()
    bundles: dict[str, Any] = {
        name: joined(load(path), env)
        for name, path in (("policy", "student"), ("teacher", "teacher"))
    }
    configs = {name: bundle[0].config for name, bundle in bundles.items()}
    (row,) = resolve_rows(parse_decoders("teacher_from_cap2", has_teacher=True)[2:], configs)
    assert (row.model, row.draft, row.reference) == ("teacher", "cap2", "teacher_ar")
    runner = make_runner(row, bundles, 4)
    assert isinstance(runner, DraftedRunner)
    exact, student = (
        PolicyRunner(bundles[m], d, None, 4) for m, d in (("teacher", "ar"), ("policy", "cap2"))
    )
    with EnvPool(2, env) as pool:
        observations = []
        for slot in range(2):
            pool.env(slot).reset(seed=40_000 + slot)
            observations.append(pool.env(slot).observe())
        previous: list[torch.Tensor | None] = [None, torch.full((56,), 100)]
        frozen = [torch.full((7,), 127)] * 2
        for given in ((), frozen):
            asked = (observations, ["push the red cube to the green zone"] * 2, previous, given)
            found, alone, drafts = (who.decode(*asked) for who in (runner, exact, student))
            for own, other, draft in zip(found, alone, drafts, strict=True):
                assert torch.equal(own.tokens[:28], other.tokens[:28])
                assert own.forwards > draft.forwards
                assert own.block_layers == draft.block_layers + 4 * (own.forwards - draft.forwards)
                assert own.prefix_layers == 8
                assert own.seconds["decode"] > 0


def test_what_drafts_decides_what_may_share_a_batch() -> None:
    pair, timed = (PolicyRunner(load("student"), name) for name in ("cap1", "deadline8"))
    assert [DraftedRunner(load("teacher"), draft, 4, 0).alone for draft in (pair, timed)] == [
        False,
        True,
    ]


def test_names_and_tokens_that_do_not_fit() -> None:
    for name, message in {
        "teacher_from_": "Unknown decoder",
        "teacher_from_nothing": "Unknown decoder",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_decoders(name, has_teacher=True)
    with pytest.raises(ConfigError, match="needs the teacher"):
        parse_decoders("teacher_from_cap1", has_teacher=False)
    student, other = load("student"), load("teacher")
    other[0].config = replace(other[0].config, chunk_size=4, n_action_steps=4)
    with pytest.raises(ConfigError, match="same tokens"):
        DraftedRunner(other, PolicyRunner(student, "cap1"), 4, 0)
