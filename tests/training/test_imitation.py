"""A new policy that learns the predictions of a trained one."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ceed_vla import CeedVLAPolicy
from ceed_vla.backbones.language.config import LanguageConfig
from ceed_vla.backbones.language.stems import StemConfig
from ceed_vla.checkpoints import load
from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import ConfigError
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.supervision import divergence, teacher_loss
from ceed_vla.training.distill import distill
from ceed_vla.training.imitation import IMITATED, Imitated
from ceed_vla.training.teacher import train
from ceed_vla.training.teacher_objective import TeacherObjective
from tests.helpers.tabletop import tabletop_config
from tests.helpers.tiny_language_models import make_tiny_language_model

FINAL = Path("checkpoints/final/pretrained_model")


def new_policy(folder: Path, stems: Path, **changes: Any) -> Any:
    backbone = LanguageConfig(path=str(folder), stems=StemConfig(path=str(stems)))
    sizes = {"chunk_size": 4, "n_action_steps": 2, "num_bins": 63, "auxiliary_scale": []}
    return tabletop_config(backbone=backbone, **{**sizes, **changes})


def mean_divergence(folder: Path, other: Imitated, frames: Any) -> float:
    policy, pre, _ = load(folder)
    tokens = policy.tokenizer.encode(frames["action"])
    batch = pre(dict(frames))
    with torch.no_grad():
        _, (logits,) = policy.backbone.packed_logits(policy.backbone.embed_prefix(batch), [tokens])
        return float(divergence(other.logits(other.observation(frames), tokens), logits).mean())


def test_a_language_model_learns_from_a_compact_policy(studio: Any, tmp_path: Path) -> None:
    folder = make_tiny_language_model(tmp_path / "model", layers=2, scale=1.0)
    found = {}
    for name, imitate in (("alone", ""), ("imitating", str(studio.teacher))):
        config = studio.train_config(
            tmp_path / name,
            policy=new_policy(folder, studio.teacher),
            imitate=imitate,
            grounding_roots="",
            grounding_batch=0,
            grounding_steps=0,
            steps=60,
            lr=3e-3,
            muon_lr=0.0,
            save_every=60,
        )
        train(config)
        policy, _, post = load(tmp_path / name / FINAL)
        other = Imitated(str(studio.teacher), policy, post)
        frames = open_dataset(studio.demo).batch(list(range(8)), 4)
        found[name] = mean_divergence(tmp_path / name / FINAL, other, frames)
    assert found["imitating"] < found["alone"]
    config = studio.distill_config(
        tmp_path / "student",
        teacher_path=str(tmp_path / "imitating" / FINAL),
        trajectories=type(studio.distill_config(tmp_path / "x").trajectories)(online=True),
        steps=2,
    )
    distill(config)
    student = load(tmp_path / "student" / FINAL)[0]
    stems = load(studio.teacher)[0].backbone.stems
    own = student.backbone.stems.stems
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), stems.parameters(), strict=True))


def test_the_divergence_adds_to_the_loss(studio: Any) -> None:
    policy, pre, post = load(studio.teacher)
    frames = open_dataset(studio.demo).batch(list(range(8)), 4)
    batch = pre(dict(frames))
    alone, _ = teacher_loss(policy, batch)
    itself = Imitated(str(studio.teacher), policy, post)
    objective = TeacherObjective(policy, itself)
    same, _ = objective({**batch, IMITATED: itself.observation(frames)}, None, 1.0, 1.0)
    torch.testing.assert_close(same, alone)
    tokens = policy.tokenizer.encode(batch["action"])
    uniform = torch.zeros(*tokens.shape, policy.tokenizer.vocabulary_size)
    other, _ = teacher_loss(policy, batch, imitated=lambda tokens: uniform)
    _, (logits,) = policy.backbone.packed_logits(policy.backbone.embed_prefix(batch), [tokens])
    weight = policy.tokenizer.weight(tokens, batch.get("action_is_pad"))
    apart = -math.log(63) - logits.log_softmax(-1).mean(-1)  # KL of a uniform distribution
    rows = (apart * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(other - alone, rows.mean())


def test_other_action_tokens_are_refused(studio: Any, tmp_path: Path) -> None:
    folder = make_tiny_language_model(tmp_path / "model", layers=1)
    for changes in ({"num_bins": 31}, {"chunk_size": 3}, {"action_low": [-2.0] * 7}):
        config = studio.train_config(
            tmp_path / "run",
            policy=new_policy(folder, studio.teacher, **changes),
            imitate=str(studio.teacher),
            grounding_roots="",
            grounding_batch=0,
            grounding_steps=0,
        )
        with pytest.raises(ConfigError, match="whose action tokens differ"):
            train(config)


def test_dimensions_may_be_counted_from_the_end(studio: Any, tmp_path: Path) -> None:
    folder = make_tiny_language_model(tmp_path / "model", layers=1)
    policy = CeedVLAPolicy(new_policy(folder, studio.teacher, gripper_dims=[-1]))
    teacher, _, post = load(studio.teacher)
    assert teacher.config.action_tokens.gripper_dims == [6]
    Imitated(str(studio.teacher), policy, post)


def test_a_longer_chunk_learns_the_predictions_of_its_first_steps(
    studio: Any, tmp_path: Path
) -> None:
    folder = make_tiny_language_model(tmp_path / "model", layers=1)
    policy = CeedVLAPolicy(new_policy(folder, studio.teacher, chunk_size=6)).eval()
    pre, post = make_ceed_vla_pre_post_processors(policy.config)
    other = Imitated(str(studio.teacher), policy, post)
    frames = open_dataset(studio.demo).batch(list(range(4)), 6)
    tokens = policy.tokenizer.encode(frames["action"])
    observation = other.observation(frames)
    found = other.logits(observation, tokens)
    assert found.shape == (4, 4 * 7, 63)
    torch.testing.assert_close(found, other.logits(observation, tokens[:, : 4 * 7]))
    longer = pre(dict(frames))
    alone, _ = teacher_loss(policy, longer)
    both, _ = teacher_loss(policy, longer, imitated=partial(other.logits, observation))
    embeddings = policy.backbone.embed_prefix(longer)
    _, (logits,) = policy.backbone.packed_logits(embeddings, [tokens])
    apart = divergence(found, logits[:, : 4 * 7]).sum(1) / tokens.shape[1]
    torch.testing.assert_close(both - alone, apart.mean())
