"""`ceed-vla context`: the scorer finds tokens without effect, the policy does not change.

Wrong settings are refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ceed_vla
from ceed_vla.checkpoints import weights_hash
from ceed_vla.errors import ConfigError
from ceed_vla.training.axes.context import LEAST, REPORT, ContextConfig, Scored, context
from ceed_vla.training.distill import distill
from ceed_vla.training.distill_data import DistillData, TrajectoriesConfig


@pytest.mark.slow
def test_it_learns_what_one_token_costs(studio: Any, tmp_path: Path) -> None:
    sizes = {"steps": 40, "eval_frames": 16, "batch_size": 8, "lr": 0.02}
    folder = context(
        ContextConfig(str(studio.teacher), str(studio.demo), str(tmp_path / "out"), **sizes)
    )
    report = json.loads((folder / REPORT).read_text())
    assert (report["steps"], report["dropped"]) == (40, 1)
    for found in report["kept"].values():
        assert set(found) == {"scorer", "places", "norm", "random"}
        assert all(kl >= 0 and 0 <= same <= 1 for kl, same in found.values())
    policy, pre, _ = ceed_vla.load(folder)
    (scorer,) = policy.backbone.context
    data = DistillData(str(studio.demo), policy, pre, eval_frames=16)
    data.root, data.frame = np.zeros(len(data.stores[0]), int), np.arange(len(data.stores[0]))
    data.split()
    frames = Scored(data, data.held_out)
    scores = scorer(*frames.tokens)  # (B, N)
    count = scores.shape[1]
    one = [
        frames.without((torch.arange(count) != i).float().expand_as(scores), count - 1)[0]
        for i in range(count)
    ]
    costs = torch.stack(one, dim=1).clamp(min=LEAST).log()  # (B, N)
    assert torch.corrcoef(torch.stack([costs.flatten(), scores.flatten()]))[0, 1] > 0.6
    costly = costs.gather(1, scores.topk(count // 4).indices)
    assert costly.mean() > costs.mean() + 0.5
    assert weights_hash(folder) == weights_hash(studio.teacher)
    base, _, _ = ceed_vla.load(studio.teacher)
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), base.parameters(), strict=True)
    )
    # A student of other weights does not inherit it.
    config = studio.distill_config(
        tmp_path / "student", teacher_path=str(folder), steps=1, save_every=1
    )
    student, _, _ = ceed_vla.load(distill(config))
    assert student.backbone.context == ()
    # A student with a part of the prefix stores which tokens: the best of the scorer, on average.
    config = studio.distill_config(
        tmp_path / "kept", teacher_path=str(folder), kept=5, steps=3, save_every=1, eval_every=1
    )
    student, _, _ = ceed_vla.load(distill(config))
    kept = student.config.backbone.kept_tokens
    assert (len(kept), student.backbone.context) == (5, ())
    data.policy = policy
    assert set(kept) <= set(scores.mean(0).topk(20).indices.tolist())
    entries = [
        json.loads(line) for line in (tmp_path / "kept" / "log.jsonl").read_text().splitlines()
    ]
    assert entries[0]["teacher_agreement"] < 1
    again, _, _ = ceed_vla.load(distill(replace(config, steps=4, resume=True)))
    assert again.config.backbone.kept_tokens == kept
    for teacher in (
        str(studio.teacher),
        str(tmp_path / "kept" / "checkpoints" / "final"),
    ):  # without a scorer; with a part of the prefix
        settings = {
            "teacher_path": teacher,
            "trajectories": TrajectoriesConfig(online=True),
            "kept": 3,
            "steps": 1,
        }
        with pytest.raises(
            ConfigError, match="--kept needs a teacher of the compact backbone that runs its whole"
        ):
            distill(studio.distill_config(tmp_path / "none", **settings))


def test_what_cannot_work_is_refused(studio: Any, tmp_path: Path) -> None:
    def config(**changes: Any) -> ContextConfig:
        given = {
            "policy_path": str(studio.teacher),
            "roots": str(studio.demo),
            "output_dir": str(tmp_path / "new"),
        }
        return ContextConfig(**{**given, **changes})

    for change, message in (
        ({"output_dir": str(studio.teacher)}, r"which holds .* name a new or empty folder"),
        ({"roots": ""}, "No data"),
    ):
        with pytest.raises(ConfigError, match=message):
            context(config(**change))
    with pytest.raises(ConfigError, match="dropped"):
        config(dropped=0)
