"""A random policy whose language model stays in its own folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ceed_vla.backbones.language.config import LanguageConfig
from ceed_vla.checkpoints import save
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from tests.helpers.tabletop import tabletop_config
from tests.helpers.tiny_language_models import make_tiny_language_model


def save_student_beside_base(folder: Path) -> tuple[Path, CeedVLAPolicy]:
    """Write `folder`/base with 2 layers, and `folder`/student, which refers to it absolutely.

    Returns:
        The folder of the student, and its policy.
    """
    base = make_tiny_language_model(folder / "base", layers=2)
    config = tabletop_config(
        backbone=LanguageConfig(path=str(base), weights="reference"), auxiliary_scale=[]
    )
    policy = CeedVLAPolicy(config).eval().requires_grad_(False)
    state = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    processors = make_ceed_vla_pre_post_processors(config, state, instructions=["push the cube"])
    return save(folder / "student", policy, *processors), policy


def refer_relatively(student: Path) -> None:
    """Let the checkpoint name its base as ``../base``; it must be sealed again."""
    file = student / "config.json"
    values = json.loads(file.read_text())
    values["backbone"]["path"] = "../base"
    file.write_text(json.dumps(values))
