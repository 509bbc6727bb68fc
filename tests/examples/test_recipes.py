"""Recipes: grown, truncated and finer policies, and the table of pairs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ceed_vla
from ceed_vla.backbones.language.config import LanguageConfig
from ceed_vla.checkpoints import load, save
from ceed_vla.errors import ConfigError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.training.adapters import LoRAConfig, attach, plain_weights, scale_of
from tests.helpers.tabletop import tabletop_config
from tests.helpers.tiny_language_models import make_tiny_language_model

TASKS = ["push the red cube"]
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def recipe(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_grown_trunk_decodes_the_same_tokens_and_can_learn(tmp_path: Path) -> None:
    recipe("grow").grow("teacher", str(tmp_path / "grown"), 3)
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


def language_policy(
    folder: Path, layers: int, weights: str = "copied"
) -> tuple[CeedVLAPolicy, Path]:
    """Return a policy of the language backbone, and its checkpoint."""
    model = make_tiny_language_model(folder / "model", layers=layers)
    config = tabletop_config(
        backbone=LanguageConfig(path=str(model), weights=weights),
        auxiliary_scale=[],
        chunk_size=2,
        n_action_steps=1,
    )
    policy = CeedVLAPolicy(config).eval()
    state = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    processors = make_ceed_vla_pre_post_processors(config, state, instructions=TASKS)
    save(folder / "policy", policy, *processors)
    return policy, folder / "policy"


def test_a_truncated_policy_has_the_first_layers(tmp_path: Path) -> None:
    policy, folder = language_policy(tmp_path, 3)
    recipe("truncate").truncate(str(folder), str(tmp_path / "short"), 2)
    short, pre, _ = ceed_vla.load(tmp_path / "short")
    assert (short.backbone.num_layers, short.config.backbone.layers) == (2, 2)
    own, new = policy.state_dict(), short.state_dict()
    assert {name for name in own if ".layers.2." not in name} == set(new)
    assert all(torch.equal(own[name], new[name]) for name in new)
    images = {name: torch.rand(1, 3, 96, 96) for name in policy.config.cameras}
    batch = pre({**images, "observation.state": torch.rand(1, 14), "task": TASKS})
    assert short.decode(batch, "ar").tokens.shape == (1, policy.config.block_length)
    with pytest.raises(SystemExit, match="more than 2 layers"):
        recipe("truncate").truncate(str(tmp_path / "short"), str(tmp_path / "other"), 2)


def test_a_truncated_policy_keeps_adapters_apart_from_their_base(tmp_path: Path) -> None:
    policy, folder = language_policy(tmp_path, 3, "reference")
    attach(policy, LoRAConfig(rank=2))
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    weights = plain_weights(policy.state_dict(), scale_of(policy), keep_adapters=True)
    save(folder, policy, *load(folder)[1:], weights)
    recipe("truncate").truncate(str(folder), str(tmp_path / "short"), 2)
    names = set(load_file(tmp_path / "short" / "model.safetensors"))
    assert not any(".embed_tokens." in name for name in names)
    of_layers = {name for name in names if ".layers." in name}
    assert of_layers == {n for n in weights if ".lora_" in n and ".layers.2." not in n}
    whole, short = load(folder)[0].state_dict(), load(tmp_path / "short")[0].state_dict()
    assert all(torch.equal(whole[name], short[name]) for name in short)
    recipe("finer_patches").finer(str(tmp_path / "short"), str(tmp_path / "fine"))
    fine = load(tmp_path / "fine")[0].state_dict()
    assert all(torch.equal(fine[name], short[name]) for name in short if ".project." not in name)
    assert of_layers < set(load_file(tmp_path / "fine" / "model.safetensors"))


def test_adapters_of_a_projection_that_would_be_new_are_refused(tmp_path: Path) -> None:
    policy, folder = language_policy(tmp_path, 2, "reference")
    attach(policy, LoRAConfig(rank=2, targets="all"))
    weights = plain_weights(policy.state_dict(), scale_of(policy), keep_adapters=True)
    save(folder, policy, *load(folder)[1:], weights)
    with pytest.raises(SystemExit, match="adapters of the projection"):
        recipe("finer_patches").finer(str(folder), str(tmp_path / "fine"))


def test_finer_patches_leave_the_other_weights(tmp_path: Path) -> None:
    policy, folder = language_policy(tmp_path, 2)
    module = recipe("finer_patches")
    module.finer(str(folder), str(tmp_path / "fine"))
    fine, pre, _ = ceed_vla.load(tmp_path / "fine")
    own, new = policy.state_dict(), fine.state_dict()
    kept = {name for name in own if not name.startswith("backbone.project.")}
    assert all(torch.equal(own[name], new[name]) for name in kept)
    for part in ("0.weight", "0.bias", "1.weight", "1.bias"):  # the keypoints' token
        assert torch.equal(own[f"backbone.project.0.{part}"], new[f"backbone.project.1.{part}"])
    images = {name: torch.rand(1, 3, 96, 96) for name in policy.config.cameras}
    batch = pre({**images, "observation.state": torch.rand(1, 14), "task": TASKS})
    embeddings = fine.backbone.embed_prefix(batch)
    assert int(fine.backbone.prefix_tokens(embeddings)[1].sum()) == 2 * (12**2 + 1)
    with pytest.raises(SystemExit, match="must be a policy of the language backbone"):
        module.finer("teacher", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="must be a policy of the language backbone"):
        module.finer(str(tmp_path / "fine"), str(tmp_path / "none"))


def test_pairs_refuse_evaluations_that_lack_episodes(tmp_path: Path) -> None:
    row = {"episodes": 2, "success": 1, "failed_seeds": [41]}
    report = {"complete": True, "seeds": {"first": 40, "count": 2}, "decoders": {"ar": row}}
    module = recipe("pairs")
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert module.outcomes(module.opened(str(tmp_path)), "ar") == {40: True, 41: False}
    file.write_text(json.dumps(report | {"seeds": {"first": 40, "count": 4}}))
    with pytest.raises(ConfigError, match="one shard of several"):
        module.opened(str(tmp_path))
    file.write_text(json.dumps(report | {"complete": False}))
    with pytest.raises(ConfigError, match="is not complete"):
        module.opened(str(tmp_path))
