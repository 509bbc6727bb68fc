"""`ceed-vla context`: the scorer finds tokens without effect, the policy does not change.

Students that run a part of the prefix, and wrong settings.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ceed_vla
from ceed_vla.axes.context.scorer import ContextScorer
from ceed_vla.checkpoints import weights_hash
from ceed_vla.errors import ConfigError
from ceed_vla.training.axes.context import (
    LEAST,
    REPORT,
    ContextConfig,
    Scored,
    context,
    forget_frames,
    mean_scores,
)
from ceed_vla.training.axes.depth import ExitsConfig, exits
from ceed_vla.training.distill import distill
from ceed_vla.training.distill_data import TrajectoriesConfig
from ceed_vla.training.joint_exits import JointExitsConfig
from ceed_vla.training.kept_prefix import keep_by_scorer, keep_places
from ceed_vla.training.losses import find_loss
from ceed_vla.training.objective import DistillationObjective


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
    data = ContextConfig(str(folder), str(studio.demo), "", eval_frames=16).data(
        policy, pre, states=False
    )
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
            ConfigError, match="--kept_by places needs a teacher of the compact backbone"
        ):
            distill(studio.distill_config(tmp_path / "none", **settings))


@pytest.mark.slow
def test_a_student_behind_the_tokens_of_each_frame(studio: Any, tmp_path: Path) -> None:
    """It keeps the scorer and decodes with it; the log measures it so, too."""
    sizes = {"steps": 4, "eval_frames": 8, "batch_size": 4, "fixed": True}
    folder = context(
        ContextConfig(str(studio.teacher), str(studio.demo), str(tmp_path / "scored"), **sizes)
    )
    scored, _, _ = ceed_vla.load(folder)
    (scorer,) = scored.backbone.context
    assert not scorer.out.weight.any()  # fixed: the same in all frames
    config = studio.distill_config(
        tmp_path / "student",
        teacher_path=str(folder),
        kept=5,
        kept_by="scorer",
        steps=2,
        save_every=1,
        eval_every=1,
    )
    student, _, _ = ceed_vla.load(distill(config))
    assert student.config.decoding.method == "keep5"
    (own,) = student.backbone.context
    assert torch.equal(own.place, scorer.place)
    lines = (tmp_path / "student" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["teacher_agreement"] < 0.8  # five tokens are not all
    again, _, _ = ceed_vla.load(distill(replace(config, steps=3, resume=True)))
    assert torch.equal(again.backbone.context[0].place, scorer.place)
    folder = tmp_path / "student/checkpoints/final"
    own_exits = {"policy_path": str(folder), "roots": str(studio.demo), "layers": [1]}
    with pytest.raises(ConfigError, match=r"chooses \(keep5\), but exits runs the whole prefix"):
        exits(ExitsConfig(**own_exits, output_dir=str(tmp_path / "exits")))
    with pytest.raises(ConfigError, match="does not work with --kept_by scorer"):
        distill(replace(config, output_dir=str(tmp_path / "both"), exits=JointExitsConfig([1])))


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


@pytest.fixture
def scored() -> Any:
    """The shipped teacher with a random scorer of its tokens, and three observations."""
    torch.manual_seed(0)
    policy, pre, _ = ceed_vla.load("teacher")
    images = {name: torch.rand(3, 3, 96, 96) for name in policy.config.cameras}
    batch = pre(
        {**images, "observation.state": torch.rand(3, 14), "task": ["push the red cube"] * 3}
    )
    embeddings = policy.backbone.embed_prefix(batch)
    scorer = ContextScorer(embeddings.shape[2], embeddings.shape[1] - 1)
    torch.nn.init.normal_(scorer.out.weight)
    policy.backbone.context = (scorer.requires_grad_(False),)
    return policy, batch, embeddings


def test_the_student_sees_the_best_tokens_of_each_frame(scored: Any) -> None:
    policy, batch, embeddings = scored
    scores = policy.backbone.context[0](*policy.backbone.prefix_tokens(embeddings))
    best = scores.topk(5).indices.sort(dim=1).values  # (B, 5)
    assert len({tuple(row) for row in best.tolist()}) > 1
    teacher, _, _ = ceed_vla.load("teacher")
    objective = DistillationObjective(policy, teacher, find_loss("trust_region"), 3.0)
    objective.choose = keep_by_scorer(policy, 5)
    block = torch.zeros(3, 56, dtype=torch.int64)
    whole, seen, _ = objective.prepare({**batch, "previous": block, "teacher_states": block}, None)
    assert torch.equal(whole, embeddings)
    rows = torch.arange(3).unsqueeze(1)
    state = torch.full((3, 1), embeddings.shape[1] - 1)
    assert torch.equal(seen, embeddings[rows, torch.cat([best, state], dim=1)])


def test_a_fixed_scorer_keeps_the_same_tokens_in_all_frames(scored: Any) -> None:
    policy, _, embeddings = scored
    (scorer,) = policy.backbone.context
    tokens = policy.backbone.prefix_tokens(embeddings)
    mean = scorer(*tokens).mean(0)

    class Frames:
        pass

    frames: Any = Frames()
    frames.tokens = tokens
    forget_frames(scorer, mean_scores(scorer, frames))
    torch.testing.assert_close(scorer(*tokens), mean.expand(3, -1))


def test_what_cannot_be_kept_is_refused(scored: Any) -> None:
    policy, batch, embeddings = scored
    count = embeddings.shape[1] - 1
    with pytest.raises(ConfigError, match=f"scores more tokens than that; this one scores {count}"):
        keep_by_scorer(policy, count)
    policy.backbone.context = ()
    with pytest.raises(ConfigError, match="this one scores 0"):
        keep_by_scorer(policy, 3)
    with pytest.raises(ConfigError, match="set --kept_by scorer"):
        keep_places(policy, 3, batch)
