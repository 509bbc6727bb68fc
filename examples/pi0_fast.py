"""Jacobi decoding on LeRobot's pi0-FAST, with its weights unchanged: the same tokens in fewer forwards.

    python examples/pi0_fast.py

makes a tiny pi0-FAST and its tokenizers, and teaches it one movement with LeRobot's own loss: under a minute on a CPU.
With a real checkpoint (a folder as `lerobot-train --policy.type=pi0_fast` writes it), frames of its data
(a LeRobotDataset folder), and local tokenizer folders, on a GPU:

    python examples/pi0_fast.py --checkpoint DIR --data ROOT --fast_tokenizer DIR --text_tokenizer DIR --device cuda

A state is decoded three times: by LeRobot's decoder, token by token by ours, and in parallel. `docs/other-vlas.md`
explains what stays equal, and what distillation adds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of benchmarks/models, which are not installed

from benchmarks.models.pi0_fast import SIDE, save_weights, tiny_sizes, write_pi0_fast
from ceed_vla.backbones.pi0_fast.inputs import load_text_tokenizer
from ceed_vla.backbones.pi0_fast.model import Pi0FastBackbone
from ceed_vla.backbones.pi0_fast.tokens import Pi0FastTokenizer
from ceed_vla.checkpoints import load
from ceed_vla.convert import ConvertConfig, convert
from ceed_vla.data.frames import open_dataset
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import MalformedChunkError

STEPS, DIM, FRAMES, FRONT = 8, 3, 24, "observation.images.front"


def movement() -> tuple[list[dict[str, Any]], Tensor]:
    """A loop of the hand as the tiny model's data: raw observations, and the chunks (N, m, A) that follow them."""
    time = torch.arange(FRAMES + STEPS) / (FRAMES / 3)
    path = torch.stack([time.sin(), time.cos(), (time.sin() > 0).float()], dim=1)  # (N + m, A)
    images = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).expand(FRAMES, -1, -1, -1)
    frames = [
        {FRONT: images[i : i + 1], "observation.state": path[i : i + 1, :2], "task": ["put the cube in the bin"]}
        for i in range(FRAMES)
    ]
    return frames, path.unfold(0, STEPS, 1)[:FRAMES].transpose(1, 2)


def make_tiny(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A tiny LeRobot checkpoint that has learnt the movement, and its frames."""
    frames, chunks = movement()
    checkpoint = write_pi0_fast(folder, chunks)
    convert(ConvertConfig(str(checkpoint), str(folder / "untrained"), from_="pi0_fast"))
    policy, pre, _ = load(folder / "untrained")
    tokenizer, model = policy.tokenizer, policy.backbone.model.train()
    batches = [pre(frame) for frame in frames]
    batch = {key: torch.cat([b[key] for b in batches]) for key in batches[0] if isinstance(batches[0][key], Tensor)}
    images, masks = PI0FastPolicy._preprocess_images(policy.backbone, batch)
    target = torch.cat([torch.full((FRAMES, 1), tokenizer.settings.bos), tokenizer.encode(chunks)], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        prompt = (batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK])
        loss = model(images, masks, *prompt, target, torch.ones_like(target, dtype=torch.bool))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"taught a tiny pi0-FAST {FRAMES} frames, loss {loss.item():.3f}")
    save_weights(model, checkpoint)
    return checkpoint, frames


def lerobot_tokens(backbone: Pi0FastBackbone, tokenizer: Pi0FastTokenizer, batch: dict[str, Any]) -> Tensor:
    """Tokens (1, n) of LeRobot's cached decoder; what is behind the stop token, which it never reads, is cut."""
    images, masks = PI0FastPolicy._preprocess_images(backbone, batch)
    prompt = (batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK])
    tokens = backbone.model.sample_actions_fast_kv_cache(
        images, masks, *prompt, max_decoding_steps=tokenizer.block_length
    )
    stop = tokenizer.settings.stop
    return torch.where((tokens == stop).cumsum(1) > 0, stop, tokens)


@torch.no_grad()
def compare(checkpoint: Path, text: Path, frames: Any, device: str) -> None:
    """Decode every frame by LeRobot's decoder and by ours, and print what differs."""
    policy, pre, _ = load(checkpoint, device)
    backbone, tokenizer = policy.backbone, policy.tokenizer
    backbone.model._paligemma_tokenizer = load_text_tokenizer(text)  # LeRobot's decoder asks it for "|" and BOS
    decoders = {
        "greedy (AR)": DecodingConfig(method="ar"),
        "Jacobi": DecodingConfig(guess="mid", window=32),
        "Jacobi, warm start": DecodingConfig(guess="previous", window=32),
    }
    counts = {name: [0, 0, 0.0] for name in decoders}  # equal blocks, forwards, seconds
    previous, blocks, malformed = None, 0, 0
    for frame in frames:
        batch, blocks = pre(frame), blocks + 1
        expected = lerobot_tokens(backbone, tokenizer, batch)
        for name, decoding in decoders.items():
            started = time.perf_counter()
            try:
                result = policy.decode(batch, decoding, previous=previous, shift_steps=1)
            except MalformedChunkError:  # for any decoder, as the tokens are equal; on a robot: hold
                malformed += 1
                continue
            counts[name][2] += time.perf_counter() - started
            counts[name][1] += result.forwards
            counts[name][0] += int(torch.equal(result.tokens, expected))
        previous = expected
    readable = blocks - malformed // len(decoders)
    print(f"{blocks} chunks, {blocks - readable} malformed")
    for name, (equal, forwards, seconds) in counts.items():
        print(
            f"  {name:<19}{equal} of {readable} chunks equal LeRobot's tokens, {forwards / max(readable, 1):5.1f} "
            f"forwards and {1e3 * seconds / max(readable, 1):6.1f} ms a chunk"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="LeRobot's pi0_fast folder; a tiny one is made without it")
    parser.add_argument("--data", type=Path, help="LeRobotDataset folder with its observations")
    parser.add_argument("--fast_tokenizer", default="", help="FAST tokenizer folder; else the checkpoint's")
    parser.add_argument("--text_tokenizer", default="", help="PaliGemma tokenizer folder; else the checkpoint's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder for checkpoints; a temporary one without it")
    options = parser.parse_args()
    if (options.checkpoint is None) != (options.data is None) or (options.checkpoint and not options.text_tokenizer):
        parser.error("--checkpoint, --data and --text_tokenizer belong together")
    output = options.output or Path(tempfile.mkdtemp(prefix="pi0-fast-"))
    tiny = options.checkpoint is None
    with tiny_sizes() if tiny else nullcontext():
        if tiny:
            torch.set_num_threads(1)  # more of them only get in each other's way on tiny layers
            checkpoint, frames = make_tiny(output)
        else:
            checkpoint, frames = options.checkpoint, None
        settings = {name: getattr(options, name) for name in ("fast_tokenizer", "text_tokenizer", "device")}
        print(convert(ConvertConfig(str(checkpoint), str(output / "ours"), from_="pi0_fast", **settings)))
        if frames is None:
            store, steps = open_dataset(options.data), load(output / "ours")[0].config.chunk_size
            frames = [store.batch(np.array([frame]), steps) for frame in range(min(FRAMES, len(store)))]
        compare(output / "ours", Path(options.text_tokenizer or output / "text"), frames, options.device)


if __name__ == "__main__":
    main()
