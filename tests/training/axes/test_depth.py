"""`ceed-vla exits`: exits approach the full depth, the base does not change.

Invalid settings are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ceed_vla
from ceed_vla.axes.depth.exits import EXITS
from ceed_vla.checkpoints import save, weights_hash
from ceed_vla.errors import ConfigError
from ceed_vla.training.axes.depth import REPORT, ExitsConfig, exits
from ceed_vla.training.teacher import train


@pytest.fixture(scope="module")
def deep(studio: Any, tiny_policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of three layers."""
    folder = tmp_path_factory.mktemp("deep")
    return train(studio.train_config(folder, policy=tiny_policy(layers=3), steps=40))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        ("linear", "states"),
        ("layer", "states"),
        ("coarse", "states"),
        ("linear", "fixed_points"),
    ],
)
def test_exits_learn_and_the_base_does_not(
    studio: Any, deep: Path, tmp_path: Path, kind: str, reads: str
) -> None:
    def trained(steps: int, lr: float) -> tuple[Path, dict[str, float]]:
        sizes = {"kind": kind, "reads": reads, "steps": steps, "lr": lr, "eval_frames": 16}
        config = ExitsConfig(
            str(deep), str(studio.demo), str(tmp_path / str(steps)), layers=[1], **sizes
        )
        folder = exits(config)
        return folder, json.loads((folder / REPORT).read_text())["depths"]["1"]

    (_, before), (folder, after) = trained(1, 1e-9), trained(40, 1e-2)
    worth = ("drafts",) if reads == "fixed_points" else ("same", "near")
    assert sum(after[name] for name in worth) > sum(before[name] for name in worth)
    assert after["near"] >= after["same"]
    assert weights_hash(folder) == weights_hash(deep)
    policy, _, _ = ceed_vla.load(folder)
    base, _, _ = ceed_vla.load(deep)
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), base.parameters(), strict=True)
    )
    assert list(policy.backbone.exits) == [1]
    policy.config.decodings, policy.config.decode_with = {"risk0.1": "deer1t1"}, "risk0.1"
    save(tmp_path / "measured", policy, *ceed_vla.load(folder)[1:])
    sizes = {"kind": kind, "steps": 1, "eval_frames": 16}
    anew = ExitsConfig(
        str(tmp_path / "measured"), str(studio.demo), str(tmp_path / "anew"), layers=[1], **sizes
    )
    config = ceed_vla.load(exits(anew))[0].config
    # measurements with other exits do not apply
    assert (config.decodings, config.decode_with) == (
        {},
        "ceed",
    )
    assert (folder / EXITS).stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size


def test_what_cannot_work_is_refused(studio: Any, deep: Path, tmp_path: Path) -> None:
    def config(**changes: Any) -> ExitsConfig:
        given = {
            "policy_path": str(deep),
            "roots": str(studio.demo),
            "output_dir": str(tmp_path / "new"),
        }
        return ExitsConfig(**{**given, "layers": [1], **changes})

    for change, message in (
        ({"layers": []}, "the layers of this model"),
        ({"layers": [3]}, "the layers of this model"),
        ({"output_dir": str(studio.teacher)}, r"which holds .* name a new or empty folder"),
        ({"roots": ""}, "No data"),
    ):
        with pytest.raises(ConfigError, match=message):
            exits(config(**change))
    with pytest.raises(ConfigError, match="kind"):
        config(kind="wide")
