"""The count of the initial states that LIBERO's scripted expert solves."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from benchmarks import libero_expert


class Countdown:
    """An environment whose episodes are solved after as many steps as their seed says."""

    task_description = "pick up the milk"

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.left = 0

    def reset(self, seed: int) -> None:
        self.left = seed

    def expert_action(self) -> int:
        return 1

    def advance(self, action: int) -> None:
        self.left -= action

    def is_success(self) -> bool:
        return self.left <= 0

    def close(self) -> None:
        pass


def test_steps_until_success() -> None:
    env: Any = Countdown()
    assert [libero_expert.run(env, seed, 3) for seed in (1, 3, 4)] == [1, 3, None]


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(libero_expert, "LiberoTasks", Countdown)
    monkeypatch.setattr(libero_expert, "VALIDATION_SEED", 278)  # 280 steps are the limit
    monkeypatch.setattr(sys, "argv", ["libero_expert", "--states", "4"])
    libero_expert.main()
    table = capsys.readouterr().out
    assert table.count("3 of 4") == 10
    assert table.count("279") == 10
    assert "30 of 40 [60, 86 %]" in table


@pytest.mark.slow
def test_the_expert_solves_a_sampled_state() -> None:
    pytest.importorskip("libero", reason="LIBERO is not installed (extra libero)")
    env = libero_expert.LiberoTasks(
        ["libero_object/1"], states="sampled", quality="fast", image_size=16
    )
    assert libero_expert.run(env, 40_000, 5) is None
    steps = libero_expert.run(env, 40_000, 280)
    assert steps is not None
    assert 50 < steps < 200
    env.close()
