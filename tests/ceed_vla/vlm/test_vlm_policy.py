"""Policies with an image-text-to-text model: checkpoints that need no other folder, or refer to the
base.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_vlms import FAMILIES

import ceed_vla
from ceed_vla import CeedVLAPolicy
from ceed_vla.backbones.vlm.config import VLMConfig
from ceed_vla.checkpoints import save, weights_hash
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from tests.helpers.edits import unsealed
from tests.helpers.tabletop import tabletop_config

STATS = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}


def new_policy(base: Path, chunk_size: int = 2, **settings: Any) -> tuple[CeedVLAPolicy, Any, Any]:
    config = tabletop_config(
        backbone=VLMConfig(path=str(base), **settings),
        chunk_size=chunk_size,
        n_action_steps=1,
        decoding=DecodingConfig(max_iterations=2, watch="executed"),
    )
    policy = CeedVLAPolicy(config).eval()
    pre, post = make_ceed_vla_pre_post_processors(config, STATS, instructions=["push the red cube"])
    return policy, pre, post


def observation(rows: int = 2) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    cameras = {
        f"observation.images.{name}": torch.rand(rows, 3, 96, 96, generator=random)
        for name in ("front", "wrist")
    }
    state = torch.randn(rows, 14, generator=random)
    return {**cameras, "observation.state": state, "task": ["push the red cube", "lift"][:rows]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proprio", ["text", "projected"])
def test_a_checkpoint_needs_no_base_folder(
    family: str, proprio: str, base: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(base(family), tmp_path / "base")
    policy, pre, post = new_policy(
        folder, proprio=proprio, action_ids="added" if proprio == "text" else "last"
    )
    save(tmp_path / "policy", policy, pre, post)
    shutil.rmtree(folder)
    loaded, loaded_pre, _ = ceed_vla.load(tmp_path / "policy")
    assert loaded.config == policy.config
    batch = pre(observation())
    again = loaded_pre(observation())
    assert all(torch.equal(again[key], value) for key, value in batch.items() if "vlm" in key)
    tokens = policy.decode(batch, "ar").tokens
    assert torch.equal(loaded.decode(again, "ar").tokens, tokens)
    assert torch.equal(loaded.decode(again, "jacobi").tokens, tokens)
    chunk = loaded.predict_action_chunk(again)
    assert chunk.shape == (2, 2, 7)
    assert loaded.select_action(again).shape == (2, 7)


def test_a_checkpoint_may_leave_the_weights_where_they_are(base: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(base("smolvlm"), tmp_path / "base")
    policy, pre, post = new_policy(folder, weights="reference", proprio="projected")
    policy.backbone.model.requires_grad_(False)
    save(tmp_path / "policy", policy, pre, post)
    written = load_file(tmp_path / "policy" / "model.safetensors")
    # no row of the embeddings is new
    assert not [name for name in written if name.startswith("backbone.model.")]
    loaded, _, _ = ceed_vla.load(tmp_path / "policy")
    batch = pre(observation())
    assert torch.equal(loaded.decode(batch, "ar").tokens, policy.decode(batch, "ar").tokens)
    assert weights_hash(tmp_path / "policy") == weights_hash(tmp_path / "policy")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"are in .*base.*no such folder"):
        ceed_vla.load(tmp_path / "policy")


@pytest.mark.parametrize("action_ids", ["last", "added"])
def test_tied_embeddings_by_reference_are_written_once(
    action_ids: str, base: Any, tmp_path: Path
) -> None:
    policy, pre, post = new_policy(base("paligemma"), weights="reference", action_ids=action_ids)
    model = policy.backbone.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    save(tmp_path / "policy", policy, pre, post)  # all are trained
    loaded, _, _ = ceed_vla.load(tmp_path / "policy")
    batch = pre(observation())
    assert torch.equal(loaded.decode(batch, "ar").tokens, policy.decode(batch, "ar").tokens)


def test_bfloat16(base: Any) -> None:
    policy, pre, _ = new_policy(base("qwen2_5_vl"), dtype="bfloat16", proprio="projected")
    assert {p.dtype for p in policy.backbone.model.parameters()} == {torch.bfloat16}
    assert policy.backbone.state.weight.dtype == torch.float32
    assert policy.decode(pre(observation()), "jacobi").tokens.shape == (2, 14)


def test_a_configuration_that_was_edited(base: Any, tmp_path: Path) -> None:
    unsealed(save(tmp_path / "policy", *new_policy(base("smolvlm"))))
    file = tmp_path / "policy" / "config.json"
    config = json.loads(file.read_text())
    for changes, message in (
        ({"architecture": "{"}, "does not describe a model"),
        ({"action_token_ids": [1, 2, 3]}, "3 ids; it must have one for each of the 255 bins"),
    ):
        file.write_text(json.dumps({**config, "backbone": {**config["backbone"], **changes}}))
        with pytest.raises((CheckpointError, ConfigError), match=message):
            ceed_vla.load(tmp_path / "policy")


def test_features_that_cannot_be_served(base: Any) -> None:
    config = tabletop_config(backbone=VLMConfig(path=str(base("smolvlm"))))
    del config.input_features["observation.state"]
    with pytest.raises(ConfigError, match=r"backbone\.proprio=none"):
        CeedVLAPolicy(config)
    config.backbone = VLMConfig(path=str(base("smolvlm")), proprio="none", cameras="stacked")
    CeedVLAPolicy(config)
    config.input_features["observation.images.wrist"].shape = (3, 96, 48)
    with pytest.raises(ConfigError, match="the cameras differ in width"):
        CeedVLAPolicy(config)
