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
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.training.axes.programs import REPORT, RouteConfig, route
from ceed_vla.training.beside import DecodedConfig
from ceed_vla.training.collect_config import CollectConfig
from ceed_vla.training.trajectories import collect

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


def test_stored_trajectories_replace_decoding(studio: Any, tmp_path: Path) -> None:
    stored = {"roots": str(studio.demo), "output_dir": str(tmp_path / "stored")}
    collect(CollectConfig(policy_path="teacher", **stored, max_frames=40))
    settings = {"programs": 2, "search_frames": 8, "steps": 2, "batch_size": 4, "eval_frames": 8}

    def found(name: str, path: str) -> dict[str, Any]:
        config = RouteConfig("teacher", str(studio.demo), str(tmp_path / name), **settings)
        config.trajectories = DecodedConfig(path)
        return json.loads((route(config) / REPORT).read_text())

    assert found("read", stored["output_dir"])["held_out"]["4 layers"]
    other = RouteConfig("student_all_tokens", str(studio.demo), str(tmp_path / "no"), **settings)
    other.trajectories = DecodedConfig(stored["output_dir"])
    with pytest.raises(CheckpointError, match="collected from teacher"):
        route(other)


def test_wrong_settings(studio: Any, tmp_path: Path) -> None:
    config = RouteConfig("teacher", str(studio.demo), str(tmp_path / "out"), programs=5)
    with pytest.raises(ConfigError, match="programs is 5; the model has 4 layers"):
        route(config)
    with pytest.raises(ConfigError):
        RouteConfig("teacher", str(studio.demo), str(tmp_path / "out"), programs=1)
