"""The examples run as printed, and with the flags of a real model.

The example backbone fulfils the contract.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from example_scripts import run_script

from ceed_vla.backbones.check import check_backbone, check_untrained
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError
from tests.helpers.tabletop import tabletop_config

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *flags: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *flags],
        capture_output=True,
        text=True,
        timeout=800,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows_of(output: Path) -> list[dict[str, dict[str, float]]]:
    """Rows of the open-loop reports before and after distillation."""
    parts = ("before", "after")
    return [json.loads((output / part / "open_loop.json").read_text())["rows"] for part in parts]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_of_smolvlm_runs(tmp_path: Path) -> None:
    run_script("smolvlm.sh", tmp_path, small=True)
    for rows in rows_of(tmp_path):
        assert rows["jacobi"]["tokens_equal_ar"] == 1.0
    assert rows_of(tmp_path)[1]["ceed"]["forwards_mean"] <= 2


@pytest.mark.external  # four minutes
@pytest.mark.timeout(900)
def test_smolvlm_needs_half_as_many_iterations(tmp_path: Path) -> None:
    """A random model, fine-tuned and distilled on simulated data."""
    run_script("smolvlm.sh", tmp_path)
    before, after = rows_of(tmp_path)
    assert after["jacobi"]["forwards_mean"] <= before["jacobi"]["forwards_mean"] / 2
    assert after["ceed"]["forwards_mean"] <= 2
    assert after["ar"]["error"] < after["mean action"]["error"]


@pytest.mark.slow
def test_own_backbone() -> None:
    output = run("own_backbone.py")
    assert int(re.findall(r"(\d+) tokens by all routes: equal", output)[0]) > 1000


@pytest.fixture
def own() -> ModuleType:
    """The example as a module with a new name, because a family registers only once."""
    module = sys.modules.get("own_backbone_example")
    if module is None:
        module = ModuleType("own_backbone_example")
        module.__file__ = str(EXAMPLES / "own_backbone.py")
        sys.modules["own_backbone_example"] = module
        exec(
            compile((EXAMPLES / "own_backbone.py").read_text(), module.__file__, "exec"),
            module.__dict__,
        )
    return module


def test_the_backbone_has_80_lines() -> None:
    text = (EXAMPLES / "own_backbone.py").read_text()
    classes = {c.name: c for c in ast.parse(text).body if isinstance(c, ast.ClassDef)}
    lines = [
        line
        for name in ("OwnBackbone", "Layer")
        for line in (ast.get_source_segment(text, classes[name]) or "").splitlines()
        if line.strip()
    ]
    assert len(lines) <= 80


def test_the_check_finds_what_is_wrong(own: Any) -> None:
    decoding = DecodingConfig(watch="executed")
    sizes = {"chunk_size": 2, "n_action_steps": 1, "decoding": decoding, "auxiliary_scale": []}
    config = tabletop_config(backbone=own.OwnConfig(), **sizes)
    check_untrained(config.backbone.build(config.shape), config, instruction_tokens=12)
    torch.manual_seed(0)
    backbone = config.backbone.build(config.shape).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    observation = {
        **{camera: torch.rand(2, 3, 96, 96) for camera in config.cameras},
        own.STATE: torch.randn(2, 14),
        own.WORDS: torch.randint(1, 256, (2, 12)),
    }
    forced = 2 * 14
    assert check_backbone(backbone, observation, action_dim=7) == forced * (1 + 4 + 1 + 1)

    right = backbone.block_logits

    def not_causal(prefix: Any, tokens: torch.Tensor) -> torch.Tensor:
        logits = right(prefix, tokens)
        return logits + logits.flip(1)

    def rows_mixed(prefix: Any, tokens: torch.Tensor) -> torch.Tensor:
        return right(prefix, tokens) + 5 * prefix.logits.flip(0).unsqueeze(1)

    def stale(prefix: Any, tokens: torch.Tensor) -> torch.Tensor:
        prefix.calls = getattr(prefix, "calls", 0) + 1
        return right(prefix, tokens) * (1 if prefix.calls < 14 else -1)

    backbone.shallow_logits = lambda prefix, tokens, depth: right(prefix, tokens)
    backbone.shallow_layers = lambda depth: depth
    with pytest.raises(ConfigError, match="it ignores depth"):
        check_backbone(backbone, observation, action_dim=7)
    del backbone.shallow_logits
    for wrong, message in (
        (not_causal, r"strict Jacobi decoding differ .* a block that is not causal"),
        (rows_mixed, r"packed_logits differ"),
        (stale, r"strict Jacobi decoding differ"),
    ):
        backbone.block_logits = wrong
        if wrong is not rows_mixed:  # leave this route out: the first one to differ
            backbone.packed_logits = lambda embeddings, blocks: (None, [_one_hot(blocks[0])])
        else:
            del backbone.__dict__["packed_logits"]
        with pytest.raises(ConfigError, match=message):
            check_backbone(backbone, observation, action_dim=7)


def _one_hot(tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(tokens, 255).float()
