"""The oracle of programs: its search against brute force, its choices against answers worked out by
hand.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import programs as measured
from benchmarks.models.trunk import CompactTrunk
from benchmarks.programs import Frame, Program, ProgramsConfig, choices, entry, null, search
from ceed_vla.cli.commands import Command
from ceed_vla.cli.entry import run
from ceed_vla.errors import ConfigError
from ceed_vla.sim.settings import CheckpointPath

LAYERS, N = 3, 9
FULL = tuple(range(LAYERS))


@pytest.fixture
def frame() -> Frame:
    """A tiny random model's, with a random guess and a random "fixed point" whose first token the
    prefix gives.
    """
    torch.manual_seed(0)
    backbone = CompactTrunk(N, LAYERS, 24).requires_grad_(False)
    backbone.head.weight.normal_()
    row = {"embeds": torch.randn(1, 4, 24)}
    fixed = torch.randint(255, (1, N))
    fixed[:, 0] = backbone.prefill(row).logits.argmax(-1)
    policy = SimpleNamespace(
        backbone=backbone,
        config=SimpleNamespace(n_action_steps=2),
        tokenizer=SimpleNamespace(tokens_per_step=3),
    )
    return Frame(policy, row, torch.randint(255, (1, N)), fixed)


def brute_force(edits: int, longest: int) -> set[Program]:
    """Every layer any number of times, in order, with at most so many layers skipped or repeated in
    all.
    """
    times = itertools.product(range(edits + 2), repeat=LAYERS)
    kept = [t for t in times if sum(abs(n - 1) for n in t) <= edits and 1 <= sum(t) <= longest]
    return {tuple(layer for layer, n in enumerate(t) for _ in range(n)) for t in kept}


@pytest.mark.parametrize("edits", [1, 2, 4])
def test_a_search_of_full_breadth_is_brute_force(frame: Frame, edits: int) -> None:
    found = search(frame.error, FULL, 1000, edits)
    assert found.keys() == brute_force(edits, 2 * LAYERS)
    tokens = torch.cat([frame.prefix.logits.argmax(-1, keepdim=True), frame.tokens[:, 1:]], 1)
    for program, error in found.items():  # of the 2 * 3 executed tokens all but the first
        state = frame.backbone.program_logits(frame.prefix, tokens, program).argmax(-1)
        assert error == pytest.approx(float((state - frame.fixed).abs().float().mean()))
    assert frame.fixed.shape == (1, 5)
    some = search(frame.error, FULL, 1, edits)
    assert some.items() <= found.items()
    if edits > 1:  # of every length the best goes on
        best = min((p for p in brute_force(1, 99) if len(p) == 2), key=found.__getitem__)
        assert {best[:1], best[1:]} <= some.keys()
        assert len(some) < len(found)


def frames_of(*tables: dict[Program, float]) -> list[Any]:
    """Frames that know the errors of some programs."""
    made = []
    for table in tables:
        one = SimpleNamespace(full=FULL, errors=table)
        one.error = table.__getitem__
        made.append(one)
    return made


def test_choices_are_what_their_names_say() -> None:
    short, skip, loop = (0,), (0, 2), (0, 1, 1, 2)
    frames = frames_of(
        {FULL: 2.0, short: 3.0, skip: 2.0, loop: 0.0},
        {FULL: 4.0, short: 5.0, skip: 1.0, loop: 0.5},
        {FULL: 0.0, short: 0.0, skip: 0.0, loop: 0.0},
    )
    found = choices(frames)
    assert found["shortest"] == [skip, skip, short]
    assert found["best"] == [skip, skip, short]
    assert entry(frames, found["best"]) == {
        "error": 1.0,
        "full": 2.0,
        "not_worse": 100.0,
        "better": 50.0,
    }
    assert entry(frames, [loop, loop, loop])["error"] == pytest.approx(0.5 / 3, abs=1e-4)
    assert entry(frames, [short] * 3)["not_worse"] == pytest.approx(100 / 3, abs=1e-3)


def test_the_null_keeps_what_is_true_of_all_frames_alone() -> None:
    always = frames_of(*[{FULL: 1.0, (0, 1): 1.0, (0,): 2.0}] * 6)
    assert null(always) == {"programs": 3, "saved": 33.33, "dealt_anew": 33.33}
    never = frames_of(
        *[{FULL: 1.0, (0, 1): 2.0, (0,): 2.0, (2,): 0.0}] * 3, {FULL: 1.0, (0, 1): 2.0, (0,): 2.0}
    )
    # (2,) was not tried everywhere
    assert null(never) == {
        "programs": 3,
        "saved": 0.0,
        "dealt_anew": 0.0,
    }
    # Where each frame has one good program of its own, dealt anew some have none and others
    # several.
    good = [(0,), (1,), (2,)]
    own = frames_of(*[{FULL: 1.0} | {p: 0.0 if p == mine else 9.0 for p in good} for mine in good])
    found = null(own)
    assert found["saved"] == pytest.approx(66.67)
    assert 10 < found["dealt_anew"] < 60


@pytest.mark.parametrize(("path", "roots"), [("", "data"), ("student", " , ")])
def test_missing_flags_are_named(path: str, roots: str) -> None:
    with pytest.raises(ConfigError, match=r"--policy.path to a checkpoint, and --roots"):
        measured.programs(ProgramsConfig(CheckpointPath(path), roots))
    for wrong in ({"frames": 3}, {"breadth": 0}, {"edits": 0}):
        with pytest.raises(ConfigError, match="--" + next(iter(wrong))):
            ProgramsConfig(**wrong)


@pytest.mark.slow
def test_a_run_prints_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.training.conftest import write_dataset

    data = write_dataset(tmp_path / "data", (12, 9))
    report = measured.programs(
        ProgramsConfig(CheckpointPath("student"), str(data), frames=4, breadth=1, edits=1)
    )
    assert json.loads(capsys.readouterr().out) == report
    full = report["0-1-2-3"]
    assert full["saved"] == 0
    assert full["own"]["error"] == full["own"]["full"]
    shortest, best = report["shortest"], report["best"]
    assert shortest["own"]["not_worse"] == 100
    assert best["own"]["error"] <= shortest["own"]["error"] <= full["own"]["error"]
    assert report["null"]["programs"] == 9


def test_errors_name_what_was_run(capsys: pytest.CaptureFixture[str]) -> None:
    command = Command("benefit", "benchmarks.programs ProgramsConfig programs")
    assert run("benchmarks.programs", command, []) == 1
    assert capsys.readouterr().err.startswith("python -m benchmarks.programs: error: Set --policy")
