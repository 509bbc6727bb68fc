"""Converted OpenVLA models through collection and distillation: copied and by reference, with all
weights or adapters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ceed_vla.checkpoints import load
from ceed_vla.convert import ConvertConfig, convert

FIXTURES = Path(__file__).parents[4] / "shared" / "fixtures"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recorded demonstrations."""
    pytest.importorskip("mujoco")
    from ceed_vla.sim.record import record
    from ceed_vla.sim.recording.config import RecordConfig

    root = tmp_path_factory.mktemp("recorded") / "data"
    record(RecordConfig(root=root, episodes=2, progress=False))
    return root


def published_model(name: str, folder: Path) -> Path:
    """A tiny random model, or one of the project's fixtures."""
    from benchmarks.models.openvla import write_openvla

    if name == "tiny":
        return write_openvla(folder)
    if not (FIXTURES / name).is_dir():
        pytest.skip(f"no {name} beside the repository")
    return FIXTURES / name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "openvla-fused", "openvla-siglip"])
@pytest.mark.parametrize("weights", ["copied", "reference"])
def test_a_converted_model_is_distilled(
    name: str, weights: str, data: Path, tmp_path: Path
) -> None:
    from ceed_vla.data.frames import open_dataset
    from ceed_vla.training.adapters import LoRAConfig
    from ceed_vla.training.distill import DistillConfig, TrajectoriesConfig, distill
    from ceed_vla.training.trajectories import CollectConfig, collect

    model, teacher = published_model(name, tmp_path / "model"), tmp_path / "teacher"
    convert(ConvertConfig(str(model), str(teacher), weights=weights, chunk_size=3))
    settings: dict[str, Any] = {
        "teacher_path": str(teacher),
        "roots": str(data),
        "steps": 3,
        "batch_size": 4,
        "eval_every": 0,
        # the vocabulary belongs to other data
        "eval_frames": 8,
        "mixed_precision": "no",
        "max_clipped": 1.0,
    }
    stored = tmp_path / "trajectories"
    collect(
        CollectConfig(
            policy_path=str(teacher),
            roots=str(data),
            output_dir=str(stored),
            frame_stride=1,
            max_frames=24,
            max_clipped=1.0,
        )
    )
    if weights == "copied":
        ways = {
            "trajectories": TrajectoriesConfig(str(stored)),
            "states": "stored",
            "loss": "paper",
        }
    else:
        ways = {
            "trajectories": TrajectoriesConfig(online=True),
            "lora": LoRAConfig(rank=2),
            "gradient_checkpointing": True,
        }
    student = distill(DistillConfig(output_dir=str(tmp_path / "student"), **settings, **ways))
    # or adapters only
    assert ((student / "model.safetensors").stat().st_size > 1e6) == (weights == "copied")
    if weights == "copied" and name == "tiny":
        shutil.rmtree(model)

    before, _, _ = load(teacher)
    after, pre, post = load(student)
    batch = pre(open_dataset(data).batch(np.arange(4), 3))
    greedy = after.decode(batch, "ar")
    assert torch.equal(greedy.tokens, after.decode(batch, "jacobi").tokens)
    assert post(after.predict_action_chunk(batch)).shape == (4, 3, 7)
    old, new = before.backbone.prefill(batch).logits, after.backbone.prefill(batch).logits
    assert not torch.equal(old, new)  # trained weights changed,
    assert torch.equal(  # except those of the prefix
        before.backbone.embed_prefix(batch).embeds, after.backbone.embed_prefix(batch).embeds
    )
