"""`ceed-vla route`: programs by importance, and a router that is cheaper than any of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import ceed_vla
from ceed_vla.checkpoints import weights_hash
from ceed_vla.errors import ConfigError
from ceed_vla.training.axes.programs import REPORT, RouteConfig, route

pytestmark = pytest.mark.slow


def test_it_learns_which_layers_a_chunk_needs(studio: Any, tmp_path: Path) -> None:
    settings = {"programs": 3, "search_frames": 16, "steps": 40, "batch_size": 8, "harm": 1.0}
    config = RouteConfig(
        policy_path="teacher",
        roots=str(studio.demo),
        output_dir=str(tmp_path / "out"),
        eval_frames=16,
        lr=0.02,
        **settings,
    )
    folder = route(config)
    report = json.loads((folder / REPORT).read_text())
    programs = [list(map(int, text.split("-"))) for text in report["programs"]]
    assert [len(program) for program in programs] == [4, 3, 2]
    assert all(set(b) < set(a) for a, b in pairwise(programs))
    found = report["held_out"]
    assert set(found) == {"4 layers", "3 layers", "2 layers", "router", "oracle"}
    assert found["oracle"]["cost"] <= min(values["cost"] for values in found.values())
    assert found["4 layers"]["cost"] == 1.0
    assert found["router"]["cost"] <= found["2 layers"]["cost"]
    policy, _, _ = ceed_vla.load(folder)
    assert [list(p) for p in policy.backbone.router[0].programs] == programs
    assert weights_hash(folder) == weights_hash("teacher")
    base, _, _ = ceed_vla.load("teacher")
    pairs = zip(policy.parameters(), base.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_wrong_settings(studio: Any, tmp_path: Path) -> None:
    config = RouteConfig("teacher", str(studio.demo), str(tmp_path / "out"), programs=5)
    with pytest.raises(ConfigError, match="programs is 5; the model has 4 layers"):
        route(config)
    with pytest.raises(ConfigError):
        RouteConfig("teacher", str(studio.demo), str(tmp_path / "out"), programs=1)
