"""The learned exit: its weights are its name, its features, and equality with conf<P> if only the
least certain slot has weight.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from decoders import jacobi
from hypothesis import given, settings
from hypothesis import strategies as st

from ceed_vla.axes.learned.rule import FEATURES, features, head_name
from ceed_vla.decoding import named_config
from ceed_vla.decoding.exits import Seen, exit_rules
from ceed_vla.errors import ConfigError


def seen(iteration: int, moved: list[list[int]]) -> Seen:
    rows = np.array(moved)
    return Seen(
        iteration,
        np.ones(len(rows), int),
        rows.shape[1],
        rows,
        0.0,
        0.0,
        lambda: np.ones(len(rows), bool),
    )


def test_features_are_what_they_are_called() -> None:
    mass = np.array([[0.5, 0.9], [0.2, 1.0]])
    found = features(seen(1, [[0, 3], [1, 1]]), mass)
    odds = [[0.0, math.log(9)], [math.log(0.25), math.log(999)]]
    np.testing.assert_allclose(
        found, [[0, np.mean(odds[0]), 0.5, 1], [odds[1][0], np.mean(odds[1]), 1, 1]], atol=1e-9
    )
    assert features(seen(2, [[0, 0], [0, 0]]), mass)[:, 2:].tolist() == [[0, 0], [0, 0]]
    assert found.shape[1] == len(FEATURES)
    assert features(seen(1, [[9, 0, 3]]), mass[:1])[0, 2] == 0.5  # the first slot is frozen


@given(st.lists(st.floats(-99, 99), min_size=5, max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_head_is_its_name(weights: list[float]) -> None:
    name = head_name(np.array(weights))
    rule, cap = exit_rules(named_config(f"{name}_cap2"))
    held = np.array([*rule.weights, rule.bias])  # type: ignore[attr-defined]
    np.testing.assert_allclose(held, weights, atol=0.00501)  # two places
    assert cap.reason == "max_iterations"
    wanted = features(seen(1, [[0, 2]]), np.array([[0.3, 0.8]])) @ held[:4] + held[4]
    ends = rule.ends(seen(1, [[0, 2]]), np.array([[0.3, 0.8]]))
    if abs(wanted[0]) > 1e-6:
        assert ends == (wanted > 0)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_least_certain_slot_alone_is_conf(toy: Any, share: float) -> None:
    backbone, observation = toy(1, 3, 28, 9)
    guess = torch.randint(9, (3, 28), generator=torch.Generator().manual_seed(1))
    prefix = backbone.prefill(observation)
    name = head_name(np.array([1, 0, 0, 0, math.log(1 / share - 1)]))
    by_head = jacobi(backbone, prefix, guess, named_config(name))
    by_share = jacobi(backbone, prefix, guess, named_config(f"conf{share}"))
    assert torch.equal(by_head.tokens, by_share.tokens)
    assert by_head.iterations.tolist() == by_share.iterations.tolist()
    assert by_head.exit_reason == [
        {"confidence": "learned"}.get(reason, reason) for reason in by_share.exit_reason
    ]


@pytest.mark.parametrize("name", ["head1x2", "head1x2x3x4x5x6"])
def test_a_head_of_other_features_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="weights and a bias"):
        exit_rules(named_config(name))


def test_learned_is_a_name_of_the_checkpoint() -> None:
    with pytest.raises(ConfigError, match="no decoding 'learned'"):
        named_config("learned", own={})
    assert named_config("learned", own={"learned": "head1x0x0x0x1_cap2"}).max_iterations == 2
