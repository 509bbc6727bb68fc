"""The benchmark of shapes: every engine decodes the same tokens, caps take their forwards, and a
run end to end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import shapes
from benchmarks.models.trunk import SHAPES, CompactTrunk, Trunk
from ceed_vla.compiled.engine import compiled

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {
    **SHAPES["openvla-0.3b"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
GEMMA = {
    **SHAPES["pi0fast-0.3b"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "vocab_size": 800,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Trunk(LLAMA, 14, torch.float32),
        lambda: Trunk(GEMMA, 14, torch.float32),
        lambda: CompactTrunk(14, 2, 48),
    ],
)
@torch.inference_mode()
@pytest.mark.slow
def test_engines_decode_the_same_and_caps_take_their_forwards(make: Any) -> None:
    backbone = make()
    observation = {
        "embeds": torch.randn(2, 9, backbone.width, generator=torch.Generator().manual_seed(0))
    }
    eager, fast = (
        {name: run() for name, run in shapes.decodes(model, model.prefill(observation), 2).items()}
        for model in (backbone, compiled(backbone, "aot_eager"))
    )
    for name, result in eager.items():
        assert torch.equal(result.tokens, fast[name].tokens), name
    assert [eager[name].forwards for name in ("ar", "ar_h", "cap1", "cap2", "loop3_h")] == [
        13,
        6,
        1,
        2,
        3,
    ]
    for k in range(1, 5):
        assert torch.equal(eager[f"loop{k}_h"].tokens, eager[f"cap{k}"].tokens)


def test_a_run_writes_times_and_ratios(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(shapes.SHAPES, "openvla-0.3b", LLAMA)
    monkeypatch.setattr(shapes, "engines", lambda device: {"eager": lambda backbone: backbone})
    output = tmp_path / "shape.json"
    flags = ["--minutes", "0.01", "--batches", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["shapes", "openvla-0.3b", str(output), *flags])
    shapes.main()
    found = json.loads(output.read_text())
    batch = found["batches"]["1"]
    assert {"prefill", "block_1", "block_55", "ar", "cap4"} <= batch["ms"]["eager"].keys()
    assert batch["x_ar"]["cap1"] > batch["x_ar"]["cap4"] > 0
    assert found["parameters"] == sum(
        p.numel() for p in Trunk(LLAMA, 56, torch.float32).parameters()
    )


@pytest.mark.slow
def test_it_needs_no_lerobot() -> None:
    """A bare machine with a GPU has torch, transformers and draccus."""
    script = "import sys; sys.modules['lerobot'] = None; import benchmarks.shapes"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert not done.returncode, done.stderr
