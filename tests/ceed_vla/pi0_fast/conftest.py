"""LeRobot's pi0-FAST, tiny and random, with generated tokenizer folders; its own decoder is the
oracle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.policies.pi0_fast import modeling_pi0_fast as lerobot_pi0
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from tiny_pi0_fast import (
    SKIP,
    STOP,
    WORDS,
    tiny_config,
    tiny_sizes,
    write_fast_tokenizer,
    write_text_tokenizer,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ceed_vla.backbones.pi0_fast.config import Pi0FastTokensConfig
from ceed_vla.backbones.pi0_fast.model import Pi0FastBackbone
from ceed_vla.backbones.pi0_fast.tokens import Pi0FastTokenizer, text_ids
from ceed_vla.decoding import DecodeResult, DecodingConfig, decode_block
from ceed_vla.tokens.fast_codec import FastCodec

STEPS, DIM, PROMPT = 4, 3, 12
CAMERAS = ("observation.images.front", "observation.images.wrist")

Build = Callable[..., lerobot_pi0.PI0FastPolicy]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Builds LeRobot's policy, tiny and random, with generated tokenizer folders."""
    chunks = 0.4 * torch.randn(300, STEPS, DIM, generator=torch.Generator().manual_seed(0)).cumsum(
        1
    )
    write_fast_tokenizer(tmp_path / "fast", chunks)

    # the parts of the remote-code processor that LeRobot uses
    def load_fast(path: str, **_: Any) -> SimpleNamespace:
        numbers = json.loads((Path(path) / "processor_config.json").read_text())
        bpe = PreTrainedTokenizerFast(tokenizer_file=str(Path(path) / "tokenizer.json"))
        return SimpleNamespace(
            bpe_tokenizer=bpe, min_token=numbers["min_token"], scale=numbers["scale"]
        )

    monkeypatch.setattr(lerobot_pi0, "AutoProcessor", SimpleNamespace(from_pretrained=load_fast))

    def make(seed: int = 0, stop_id: int = STOP, **changes: Any) -> lerobot_pi0.PI0FastPolicy:
        write_text_tokenizer(tmp_path / "text", stop_id)
        sizes = {"tokenizer_max_length": PROMPT, "max_decoding_steps": 20}
        config = tiny_config(tmp_path, chunks, CAMERAS, 4, **{**sizes, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return lerobot_pi0.PI0FastPolicy(config).eval()

    with tiny_sizes():
        yield make


def observe(batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Cameras of another size, and prompts of different lengths, right-padded as in LeRobot."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, PROMPT + 1, (batch, 1), generator=generator)
    mask = torch.arange(PROMPT) < lengths
    tokens = torch.randint(8, WORDS, (batch, PROMPT), generator=generator) * mask
    images = {key: torch.rand(batch, 3, 40, 32, generator=generator) for key in CAMERAS}
    return {**images, OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: mask}


def wrap(policy: Any, vocabulary: str = "full") -> tuple[Pi0FastBackbone, Pi0FastTokenizer]:
    """Our backbone and tokenizer around LeRobot's policy."""
    config = policy.config
    codec = FastCodec.from_folder(config.action_tokenizer_name)
    settings = Pi0FastTokensConfig(
        max_tokens=config.max_decoding_steps,
        skip_tokens=config.fast_skip_tokens,
        scored=WORDS if vocabulary == "full" else 0,
        bpe=codec.bpe.to_str(),
        scale=codec.scale,
        least=codec.least,
        **text_ids(policy._paligemma_tokenizer),
    )
    tokenizer = settings.build(config.chunk_size, DIM)
    return Pi0FastBackbone(policy.model, tokenizer).eval(), tokenizer


def lerobot_tokens(
    policy: Any, batch: dict[str, Tensor], stop: int, *, cached: bool = True
) -> Tensor:
    """Tokens of LeRobot's own decoder, cut behind a row's stop token, where it reads none."""
    images, masks = policy._preprocess_images(batch)
    decode = (
        policy.model.sample_actions_fast_kv_cache if cached else policy.model.sample_actions_fast
    )
    tokens = decode(
        images,
        masks,
        batch[OBS_LANGUAGE_TOKENS],
        batch[OBS_LANGUAGE_ATTENTION_MASK],
        max_decoding_steps=policy.config.max_decoding_steps,
        temperature=policy.config.temperature,
    )
    return torch.where((tokens == stop).cumsum(1) > 0, stop, tokens)


def decode(
    backbone: Any, tokenizer: Any, batch: Any, config: DecodingConfig, **more: Any
) -> DecodeResult:
    with torch.no_grad():
        return decode_block(backbone, backbone.prefill(batch), tokenizer, config, **more)


def overfit(policy: Any, batch: dict[str, Tensor], target: Tensor, steps: int = 60) -> None:
    """Train LeRobot's policy, with its own loss, until it writes `target` (B, n)."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    images, masks = policy._preprocess_images(batch)
    prompt = (batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK])
    fast = torch.cat([torch.full_like(target[:, :1], 2), target], dim=1)  # behind BOS
    for _ in range(steps):
        loss = policy.model.forward(
            images, masks, *prompt, fast, torch.ones_like(fast, dtype=torch.bool)
        )["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def lab(build: Build, tmp_path: Path) -> SimpleNamespace:
    """The builder and its helpers."""
    sizes = {
        "WORDS": WORDS,
        "SKIP": SKIP,
        "STEPS": STEPS,
        "DIM": DIM,
        "STOP": STOP,
        "CAMERAS": CAMERAS,
    }
    parts = (observe, wrap, lerobot_tokens, decode, overfit)
    return SimpleNamespace(
        build=build, folder=tmp_path, **sizes, **{part.__name__: part for part in parts}
    )
