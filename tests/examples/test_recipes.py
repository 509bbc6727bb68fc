"""Recipes: a grown trunk decodes as the original one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

import ceed_vla

GROW = Path(__file__).resolve().parents[2] / "recipes" / "grow.py"


def test_a_grown_trunk_decodes_the_same_tokens_and_can_learn(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("grow", GROW)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.grow("teacher", str(tmp_path / "grown"), 3)
    base, pre, _ = ceed_vla.load("teacher")
    grown, _, _ = ceed_vla.load(tmp_path / "grown")
    assert (base.backbone.num_layers, grown.backbone.num_layers) == (4, 12)
    assert grown.config.backbone.layers == 12
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.rand(2, 3, 96, 96, generator=generator) for name in base.config.cameras}
    batch = pre(
        {
            **images,
            "observation.state": torch.rand(2, 14, generator=generator),
            "task": ["push the red cube"] * 2,
        }
    )
    assert torch.equal(base.decode(batch, "ar").tokens, grown.decode(batch, "ar").tokens)
    block = torch.zeros(2, 56, dtype=torch.int64)
    _, (scores,) = grown.backbone.packed_logits(grown.backbone.embed_prefix(batch), [block])
    scores.logsumexp(-1).sum().backward()
    assert grown.backbone.layers[1].out.weight.grad.abs().max() > 0
