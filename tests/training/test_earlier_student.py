"""A distillation that goes on from an earlier student of the same teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ceed_vla
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.training.distill import DistillRun, distill

FINAL = Path("checkpoints/final/pretrained_model")


@pytest.fixture(scope="module")
def first(studio: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student after 20 steps."""
    folder = tmp_path_factory.mktemp("first") / "run"
    distill(studio.distill_config(folder, steps=20, lr=1e-2, muon_lr=3e-2))
    return folder / FINAL


def test_it_starts_from_the_student_and_keeps_the_teacher(
    studio: Any, first: Path, tmp_path: Path
) -> None:
    run = DistillRun(studio.distill_config(tmp_path / "run", student_path=str(first)), None)
    earlier, teacher = (ceed_vla.load(path)[0].state_dict() for path in (first, studio.teacher))
    begun, copy = run.policy.state_dict(), run.objective.copy[0].state_dict()
    assert all(torch.equal(begun[name], earlier[name]) for name in earlier)
    assert all(torch.equal(copy[name], teacher[name]) for name in teacher)
    assert any(not torch.equal(earlier[name], teacher[name]) for name in teacher)


def test_its_loss_goes_on_where_the_student_ended(
    studio: Any, first: Path, tmp_path: Path, read_log: Callable[..., dict[int, float]]
) -> None:
    losses = {}
    for name, student in (("anew", ""), ("on", str(first))):
        distill(studio.distill_config(tmp_path / name, student_path=student, steps=1))
        losses[name] = read_log(tmp_path / name, "consistency_loss")[1]
    assert losses["on"] < 0.9 * losses["anew"]


def test_a_run_is_resumed_with_the_same_student_only(
    studio: Any,
    first: Path,
    tmp_path: Path,
    interrupt_at: Callable[[int], None],
) -> None:
    interrupt_at(4)
    with pytest.raises(KeyboardInterrupt):
        distill(studio.distill_config(tmp_path / "run", student_path=str(first)))
    interrupt_at(-1)
    with pytest.raises(CheckpointError, match="cannot be resumed: student differ"):
        distill(studio.distill_config(tmp_path / "run", resume=True))
    distill(studio.distill_config(tmp_path / "run", student_path=str(first), resume=True))


def test_a_student_of_another_teacher_is_refused(studio: Any, tmp_path: Path) -> None:
    shipped = str(ceed_vla.pretrained_path("student_all_tokens"))
    with pytest.raises(ConfigError, match=r"student_all_tokens differs from the teacher in .*: na"):
        DistillRun(studio.distill_config(tmp_path / "run", student_path=shipped), None)
    kept = str(ceed_vla.pretrained_path("student"))
    with pytest.raises(ConfigError, match=r"student runs 9 tokens of its prefix"):
        DistillRun(studio.distill_config(tmp_path / "run", student_path=kept), None)
