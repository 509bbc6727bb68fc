"""Tiny random bases of every family, created once, and the parts of a policy around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlms import make_tiny_vlm
from torch import Tensor

from ceed_vla.backbones.vlm.inputs import VLMInputsStep
from ceed_vla.backbones.vlm.loading import choose_action_ids, load_model
from ceed_vla.backbones.vlm.model import FLAT_KEY, ROW_KEY, VLMBackbone
from ceed_vla.backbones.vlm.processor import load_processor

CAMERAS = ("observation.images.front", "observation.images.wrist")
PROMPT = "What action should the robot take to {instruction}?"
TASKS = (
    "put the red cube in the bin",
    "stack the blue cube on the green cube, then push both of them to the left",
    "press",
    "open the drawer",
)
# Attention to the last 16 tokens only, in one layer of two: what "<family>+sliding" changes in the
# language model.
CHANGES: dict[str, dict[str, Any]] = {
    "llava": {"model_type": "mistral", "sliding_window": 16},
    "qwen2_5_vl": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's tiny random model, with weights so large that every token depends on all
    earlier ones.
    """
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            name, _, change = family.partition("+")
            folder = make_tiny_vlm(name, tmp_path_factory.mktemp(name), scale=3.0)
            config = json.loads((folder / "config.json").read_text())
            config["text_config"] |= CHANGES[name] if change else {}
            (folder / "config.json").write_text(json.dumps(config))
            folders[family] = folder
        return folders[family]

    return make


@pytest.fixture(scope="session")
def backbone(base: Callable[[str], Path]) -> Callable[..., tuple[VLMBackbone, VLMInputsStep]]:
    """Backbone and inputs step of a family; `settings` go to the backbone."""

    def make(family: str, block_length: int = 14, bins: int = 255, **settings: Any) -> Any:
        kind, layout = settings.pop("action_ids", "last"), settings.pop("layout", "separate")
        model = load_model(base(family), torch.float32, "sdpa")
        processor = load_processor(base(family))
        ids = choose_action_ids(model, processor, kind, bins)
        places = 1 if settings.get("project_state") else settings.get("state_dim", 0)
        sizes = {camera: [64, 96] for camera in CAMERAS}
        step = VLMInputsStep(sizes=sizes, layout=layout, prompt=PROMPT, state_places=places)
        step.set_processor(processor)
        torch.manual_seed(1)
        return VLMBackbone(model, ids, block_length, **settings).eval(), step

    return make


@pytest.fixture(scope="session")
def observe() -> Callable[..., dict[str, Tensor]]:
    """Inputs of random images and states for a number of rows, each with its own instruction."""

    def make(
        step: VLMInputsStep, rows: int, seed: int = 0, state_dim: int = 5
    ) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        cameras = {
            name: torch.rand(rows, 3, *size, generator=random) for name, size in step.sizes.items()
        }
        state = torch.randn(rows, state_dim, generator=random)
        transition: Any = {
            "observation": {**cameras, "observation.state": state},
            "complementary_data": {"task": list(TASKS[:rows])},
        }
        return step(transition)["observation"]  # type: ignore[return-value]

    return make


@pytest.fixture(scope="session")
def generate() -> Callable[..., Tensor]:
    """The block (B, n) from transformers' own `generate()`, restricted to the action ids."""

    def run(backbone: VLMBackbone, observation: dict[str, Tensor], **settings: Any) -> Tensor:
        inputs = {
            k.removeprefix(ROW_KEY): v for k, v in observation.items() if k.startswith(ROW_KEY)
        }
        inputs |= {
            k.removeprefix(FLAT_KEY): v.flatten(0, 1)
            for k, v in observation.items()
            if k.startswith(FLAT_KEY)
        }
        if backbone.state_dim:
            places = inputs["input_ids"][:, -backbone.state_dim :]
            places.copy_(backbone.state_ids(observation["observation.state"]))
        allowed = backbone.action_ids.tolist()
        output = backbone.model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=backbone.block_length,
            do_sample=False,
            **settings,
            prefix_allowed_tokens_fn=lambda row, ids: allowed,
        )
        written = output[:, inputs["input_ids"].shape[1] :]  # (B, n) vocabulary ids
        return (written.unsqueeze(-1) == backbone.action_ids).int().argmax(-1)

    return run
