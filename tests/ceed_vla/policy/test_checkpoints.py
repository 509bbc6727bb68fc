"""Checkpoints: a loaded policy acts like the saved one; damage raises one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import NormalizationMode

from ceed_vla import CeedVLAPolicy
from ceed_vla.checkpoints import load, pretrained_path, resolve_checkpoint, save, weights_hash
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from tests.helpers.edits import unsealed
from tests.helpers.tabletop import tabletop_config

STATE = "observation.state"
TOKENS = "observation.language.tokens"


@pytest.mark.parametrize("how", ["load", "from_pretrained", "parent folder"])
def test_a_saved_policy_acts_the_same(
    policy: CeedVLAPolicy,
    batch: dict[str, Any],
    checkpoint: Path,
    tmp_path: Path,
    how: str,
    raw_observation: Any,
) -> None:
    if how == "load":
        loaded, pre, post = load(checkpoint)
        again = pre(raw_observation())
        torch.testing.assert_close(again[STATE], (raw_observation()[STATE] - 0.5) / 2)
        assert torch.equal(again[TOKENS], batch[TOKENS])
        actions = torch.rand(2, 7)
        assert torch.equal(post(actions), actions)  # actions are already in the environment's units
    elif how == "from_pretrained":
        loaded = CeedVLAPolicy.from_pretrained(checkpoint)
    else:
        shutil.copytree(checkpoint, tmp_path / "step" / "pretrained_model")
        loaded, _, _ = load(tmp_path / "step")
    assert not loaded.training
    assert torch.equal(loaded.decode(batch, "ar").tokens, policy.decode(batch, "ar").tokens)
    assert loaded.config.decoding == policy.config.decoding
    assert loaded.config == policy.config


def test_loading_is_quiet(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(checkpoint)
    assert capsys.readouterr().out == ""


def test_a_checkpoint_is_replaced_file_by_file(
    policy: CeedVLAPolicy, processors: tuple[Any, Any], checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "policy")
    (folder / "notes.txt").write_text("kept")
    save(folder, policy, *processors)
    assert {f.name for f in folder.iterdir()} == {f.name for f in checkpoint.iterdir()} | {
        "notes.txt"
    }
    assert weights_hash(folder) == weights_hash(checkpoint)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "No checkpoint folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), "do not load"),
    "weights of other sizes": (
        lambda f: edit_config(f, backbone={"type": "compact", "width": 66}),
        "belong to different models",
    ),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config is no mapping": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "another policy": (lambda f: edit_config(f, type="act"), "type 'act'"),
    "unknown setting": (lambda f: edit_config(f, wheels=4), "wheels"),
    "unknown backbone": (
        lambda f: edit_config(f, backbone={"type": "gpt"}),
        "backbone.type is 'gpt'; choose one of compact",
    ),
    "unknown size": (lambda f: edit_config(f, backbone={"type": "compact", "depth": 2}), "depth"),
    "bad setting": (lambda f: edit_config(f, n_action_steps=9), "n_action_steps is 9"),
}


@pytest.mark.parametrize("loader", [load, CeedVLAPolicy.from_pretrained])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_one_clear_error(
    checkpoint: Path, tmp_path: Path, damage: str, loader: Callable[[Path], Any]
) -> None:
    folder = unsealed(shutil.copytree(checkpoint, tmp_path / "broken"))
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(CheckpointError, match=message):
        loader(folder)


def test_missing_weights_are_refused_unless_asked_for(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    folder = unsealed(shutil.copytree(checkpoint, tmp_path / "partial"))
    weights = load_file(folder / "model.safetensors")
    del weights["backbone.head.bias"]
    save_file(weights, folder / "model.safetensors")
    for loader in (load, CeedVLAPolicy.from_pretrained):
        with pytest.raises(CheckpointError, match=r"head\.bias|do not load"):
            loader(folder)
    CeedVLAPolicy.from_pretrained(folder, strict=False)
    assert "backbone.head.bias" in caplog.text


def test_processors_are_needed_to_load_but_not_for_the_policy(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = unsealed(shutil.copytree(checkpoint, tmp_path / "bare"))
    (folder / "policy_preprocessor.json").write_text("{")
    for loader in (load, CeedVLAPolicy.from_pretrained):
        with pytest.raises(CheckpointError, match=r"policy_preprocessor\.json is not JSON"):
            loader(folder)
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks policy_preprocessor\.json"):
        load(folder)
    (folder / "policy_postprocessor.json").unlink()
    CeedVLAPolicy.from_pretrained(folder)


def test_a_name_is_never_looked_up_on_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda **_: pytest.fail("asked the hub")
    )
    for loader in (load, CeedVLAPolicy.from_pretrained, resolve_checkpoint):
        with pytest.raises(CheckpointError, match="No checkpoint folder at someone/policy"):
            loader("someone/policy")
    with pytest.raises(CheckpointError, match="teacher, student"):
        pretrained_path("pupil")


@pytest.mark.parametrize("version", [1, 2, 4, "3", True, None])
def test_other_formats_are_named(tmp_path: Path, version: Any) -> None:
    folder = unsealed(shutil.copytree(pretrained_path("student"), tmp_path / "other"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "format_version": version}))
    with pytest.raises(CheckpointError, match=f"format_version {version!r}, this version reads 3"):
        load(folder)


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILES"])
def test_a_state_that_never_moves_loads_again(mode: str, tmp_path: Path) -> None:
    still = {"min": [0.0] * 14, "max": [1.0] * 14, "q01": [0.0] * 14, "q99": [1.0] * 14}
    stats = {
        STATE: {
            "mean": np.zeros(14),
            "std": np.ones(14),
            **{k: np.array(v) for k, v in still.items()},
        }
    }
    for name, value in (
        ("mean", 5.0),
        ("std", 0.0),
        ("min", 5.0),
        ("max", 5.0),
        ("q01", 5.0),
        ("q99", 5.0),
    ):
        stats[STATE][name][1] = value
    config = tabletop_config()
    config.normalization_mapping = {
        **config.normalization_mapping,
        "STATE": NormalizationMode(mode),
    }
    # LeRobot's tools pass these to the normaliser of a checkpoint, too
    policy = CeedVLAPolicy(config, stats)
    assert stats[STATE]["std"][1] > 0
    assert stats[STATE]["max"][1] > 5
    save(tmp_path, policy, *make_ceed_vla_pre_post_processors(config, stats, instructions=["go"]))
    _, pre, _ = load(tmp_path)
    raw = {
        STATE: torch.full((1, 14), 5.0),
        **{c: torch.zeros(1, 3, 96, 96) for c in config.cameras},
        "task": "go",
    }
    assert pre(raw)[STATE][0, 1].abs() <= 1


def test_actions_that_a_step_normalises_need_tokens_that_know() -> None:
    config = tabletop_config()
    config.normalization_mapping = {
        **config.normalization_mapping,
        "ACTION": NormalizationMode.MEAN_STD,
    }
    with pytest.raises(
        ConfigError, match="ACTION MEAN_STD; it must be IDENTITY, because uniform tokens"
    ):
        CeedVLAPolicy(config)
