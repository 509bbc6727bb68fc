"""A tiny pi0-FAST that was trained on one movement with LeRobot's own loss: its tokens from every
decoder, in fewer forwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from tiny_pi0_fast import SIDE, save_weights, tiny_sizes, write_pi0_fast
from torch import Tensor

from ceed_vla.backbones.pi0_fast.inputs import load_text_tokenizer
from ceed_vla.checkpoints import load
from ceed_vla.convert import ConvertConfig, convert
from ceed_vla.decoding import DecodingConfig

STEPS, FRAMES = 8, 24


def movement() -> tuple[list[dict[str, Any]], Tensor]:
    """A loop of the hand: raw observations, and the chunks (N, m, A) that follow them."""
    time = torch.arange(FRAMES + STEPS) / (FRAMES / 3)
    path = torch.stack([time.sin(), time.cos(), (time.sin() > 0).float()], dim=1)  # (N + m, A)
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    frames = [
        {
            "observation.images.front": image,
            "observation.state": path[i : i + 1, :2],
            "task": ["put the cube in"],
        }
        for i in range(FRAMES)
    ]
    return frames, path.unfold(0, STEPS, 1)[:FRAMES].transpose(1, 2)


def inputs(backbone: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
    """Images, masks and prompt in the format of LeRobot's model."""
    prompt = (batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK])
    return (*PI0FastPolicy._preprocess_images(backbone, batch), *prompt)


def teach(folder: Path, checkpoint: Path, frames: list[dict[str, Any]], chunks: Tensor) -> None:
    """Train the folder's weights with LeRobot's loss, on the inputs of our conversion."""
    convert(ConvertConfig(str(checkpoint), str(folder / "untrained"), from_="pi0_fast"))
    policy, pre, _ = load(folder / "untrained")
    model = policy.backbone.model.train()
    batches = [pre(frame) for frame in frames]
    batch = {
        key: torch.cat([b[key] for b in batches])
        for key in batches[0]
        if isinstance(batches[0][key], Tensor)
    }
    bos = torch.full((FRAMES, 1), policy.tokenizer.settings.bos)
    target = torch.cat([bos, policy.tokenizer.encode(chunks)], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss = model(
            *inputs(policy.backbone, batch), target, torch.ones_like(target, dtype=torch.bool)
        )["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_weights(model, checkpoint)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_decoder_writes_lerobots_tokens_in_fewer_forwards(tmp_path: Path) -> None:
    frames, chunks = movement()
    with tiny_sizes():
        checkpoint = write_pi0_fast(tmp_path, chunks)
        teach(tmp_path, checkpoint, frames, chunks)
        convert(ConvertConfig(str(checkpoint), str(tmp_path / "ours"), from_="pi0_fast"))
        policy, pre, _ = load(tmp_path / "ours")
    backbone, tokenizer = policy.backbone, policy.tokenizer
    # LeRobot's decoder reads BOS from it
    backbone.model._paligemma_tokenizer = load_text_tokenizer(tmp_path / "text")
    forwards, previous = torch.zeros(3), None
    names = ("ar", "mid", "previous")
    for frame in frames:
        batch = pre(frame)
        written = backbone.model.sample_actions_fast_kv_cache(
            *inputs(backbone, batch), max_decoding_steps=tokenizer.block_length
        )
        stop = tokenizer.settings.stop  # LeRobot never reads tokens behind it
        expected = torch.where((written == stop).cumsum(1) > 0, stop, written)
        for row, name in enumerate(names):
            config = (
                DecodingConfig(method="ar")
                if name == "ar"
                else DecodingConfig(guess=name, window=32)
            )
            result = policy.decode(batch, config, previous=previous, shift_steps=1)
            assert torch.equal(result.tokens, expected)
            forwards[row] += result.forwards
        previous = expected
    assert forwards[2] < forwards[1] < forwards[0]
    print(
        {name: round(float(count) / FRAMES, 1) for name, count in zip(names, forwards, strict=True)}
    )
