"""The memory plan holds for a real step, and the arithmetic of a sample is what the model is asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.memory import MODES, make_policy, plan
from benchmarks.models.vlm import make_tiny_vlm
from benchmarks.scaling import Gpu, Work, derive
from training.corruption import draw_states
from training.losses import trust_region_loss
from training.objective import DistillationObjective

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert MODES["student_full"].bytes(7e9, 7e9) == pytest.approx(154e9)
    assert MODES["teacher_full"].bytes(7e9, 7e9, shards=8) == pytest.approx(15.75e9)
    plan()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + len(MODES)
    assert "shard" in rows[-1]


def test_tokens_of_a_sample_are_those_that_the_derivation_counts(tmp_path: Path) -> None:
    folder = make_tiny_vlm("smolvlm", tmp_path)
    student, batch = make_policy(folder, 1e-3, "float32", "cpu")
    teacher, _ = make_policy(folder, 1e-3, "float32", "cpu")
    objective = DistillationObjective(student.train(), teacher, trust_region_loss, 3.0)
    seen = {"with gradient": 0, "without": 0}

    def count(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        kind = "with gradient" if torch.is_grad_enabled() else "without"
        seen[kind] += arguments["inputs_embeds"].shape[1]

    for policy in (student, teacher):
        policy.backbone.decoder.layers[0].register_forward_pre_hook(
            lambda m, a, k: count(m, a, {"inputs_embeds": a[0], **k}), with_kwargs=True
        )
    n = student.config.block_length
    draw = draw_states(student, 1, np.array([0.0, 0.0, 1.0]), 2, np.random.default_rng(0))
    draw.updates[:] = 1  # the mean of 0, 1 and 2
    batch["previous"] = torch.full((1, n), -1)
    embeddings, states = objective.prepare(batch, (draw, 1))
    tokens = {"fixed_point": (states + 1) % 255, "states": states}
    objective.losses(embeddings, tokens, torch.ones(2))
    work = Work(parameters=0.5, prefix=embeddings.embeds.shape[1], block=n)  # one operation a token
    assert seen["without"] + 3 * seen["with gradient"] == pytest.approx(work.step, rel=0.03)


def test_the_derivation(capsys: pytest.CaptureFixture[str]) -> None:
    """A frame at batch 64 reads 14 GB for each of 55 tokens, shared by 64 frames, behind a prefix of arithmetic."""
    work, gpu = Work(7e9, 290, 56), Gpu()
    derive(work, gpu, frames=1e8, samples=1e7, bytes_a_frame=150)
    text = capsys.readouterr().out
    assert "15 GB stored" in text
    prefix = 14e9 * 290 / (989e12 * 0.4)
    hours = 1e8 * (prefix + 55 * 14e9 / (3.35e12 * 0.6) / 64) / 3600
    found = re.findall(r"collect, all frames, batch 64 +(\d+)", text)
    assert int(found[0]) == pytest.approx(hours, abs=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_measured_step_is_near_the_plan() -> None:
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--parameters", "0.05"]
    modes = ["--modes", "student_lora,teacher_full"]
    done = subprocess.run([*command, *modes], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    ratios = [float(text) for text in re.findall(r"([\d.]+)x", done.stdout)]
    assert len(ratios) == 2
    assert all(0.9 < ratio < 3 for ratio in ratios)  # small models: work space counts
