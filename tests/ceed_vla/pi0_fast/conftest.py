"""LeRobot's pi0-FAST, tiny and random, over tokenizer folders made on the spot; and its own decoder as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0_fast import modeling_pi0_fast as lerobot_pi0
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ceed_vla.backbones.pi0_fast import Pi0FastBackbone
from ceed_vla.backbones.pi0_fast_tokens import Pi0FastTokenizer, TextIds
from ceed_vla.decoding import DecodeResult, DecodingConfig, decode_block
from ceed_vla.fast_codec import FastCodec

WORDS, SKIP, STEPS, DIM, PROMPT, SIDE = 700, 8, 4, 3, 12, 28
STOP_WORD, CAMERAS = 5, ("observation.images.front", "observation.images.wrist")


def write_text_tokenizer(folder: Path, stop_id: int = STOP_WORD) -> None:
    """A word-level tokenizer with "Action", ":" and "|" among `WORDS` ids."""
    names = {i: f"w{i}" for i in range(WORDS)}
    names |= {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 6: "Action", 7: ":", stop_id: "|"}
    bpe = Tokenizer(models.WordLevel({name: i for i, name in names.items()}, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder)


def write_fast_tokenizer(folder: Path) -> None:
    """A FAST folder in the published format: byte-level BPE and its numbers."""
    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    chunks = 0.4 * torch.randn(300, STEPS, DIM, generator=torch.Generator().manual_seed(0)).cumsum(1)
    least = -60
    texts = ["".join(chr(int(v)) for v in row) for row in _rounded(chunks) - least]
    bpe.train_from_iterator(texts, vocab_size=300, min_frequency=2, show_progress=False)
    bpe.save(str(folder / "tokenizer.json"))
    numbers = {"scale": 10, "min_token": least, "vocab_size": 300, "action_dim": None, "time_horizon": None}
    (folder / "processor_config.json").write_text(json.dumps(numbers))


def _rounded(chunks: Tensor) -> Tensor:
    from scipy.fft import dct

    return torch.from_numpy(dct(chunks.double().numpy(), axis=1, norm="ortho") * 10).round().flatten(1)


def shrink(config: Any) -> Any:
    """LeRobot's PaliGemma with its sizes, which LeRobot fixes, made tiny."""
    config.vision_config.update(
        {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    )
    config.vision_config.image_size, config.vision_config.projection_dim = (
        SIDE,
        config.text_config.hidden_size,
    )
    config.text_config.vocab_size = config.image_token_index = WORDS
    config.text_config.initializer_range = config.initializer_range = 0.3
    return config


Build = Callable[..., lerobot_pi0.PI0FastPolicy]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds LeRobot's policy, tiny and random, over tokenizer folders made on the spot."""
    write_fast_tokenizer(tmp_path / "fast")

    def load_fast(
        path: str, **_: Any
    ) -> SimpleNamespace:  # what LeRobot uses of the processor that is remote code
        numbers = json.loads((Path(path) / "processor_config.json").read_text())
        bpe = PreTrainedTokenizerFast(tokenizer_file=str(Path(path) / "tokenizer.json"))
        return SimpleNamespace(bpe_tokenizer=bpe, min_token=numbers["min_token"], scale=numbers["scale"])

    original = lerobot_pi0.PaliGemmaForConditionalGenerationWithPiGemma
    monkeypatch.setattr(
        lerobot_pi0,
        "PaliGemmaForConditionalGenerationWithPiGemma",
        lambda config: original(config=shrink(config)),
    )
    sizes = lerobot_pi0.GemmaConfig(32, 2, 48, 4, 1, 8)
    monkeypatch.setattr(lerobot_pi0, "get_gemma_config", lambda variant: sizes)
    monkeypatch.setattr(lerobot_pi0, "AutoProcessor", SimpleNamespace(from_pretrained=load_fast))

    def make(seed: int = 0, stop_id: int = STOP_WORD, **changes: Any) -> lerobot_pi0.PI0FastPolicy:
        write_text_tokenizer(tmp_path / "text", stop_id)
        config = PI0FastConfig(
            input_features={
                **{key: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for key in CAMERAS},
                "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
            },
            output_features={"action": PolicyFeature(FeatureType.ACTION, (DIM,))},
            chunk_size=STEPS,
            n_action_steps=STEPS,
            image_resolution=(SIDE, SIDE),
            tokenizer_max_length=PROMPT,
            max_decoding_steps=changes.pop("max_decoding_steps", 20),
            fast_skip_tokens=SKIP,
            text_tokenizer_name=str(tmp_path / "text"),
            action_tokenizer_name=str(tmp_path / "fast"),
            device="cpu",
            **changes,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return lerobot_pi0.PI0FastPolicy(config).eval()

    return make


def observe(batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Cameras of another size, and prompts of different lengths, padded on the right as LeRobot pads them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, PROMPT + 1, (batch, 1), generator=generator)
    mask = torch.arange(PROMPT) < lengths
    tokens = torch.randint(8, WORDS, (batch, PROMPT), generator=generator) * mask
    images = {key: torch.rand(batch, 3, 40, 32, generator=generator) for key in CAMERAS}
    return {**images, OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: mask}


def wrap(policy: Any, vocabulary: str = "full") -> tuple[Pi0FastBackbone, Pi0FastTokenizer]:
    """Our backbone and tokenizer over LeRobot's policy."""
    config = policy.config
    tokenizer = Pi0FastTokenizer(
        FastCodec.from_folder(config.action_tokenizer_name),
        TextIds.of(policy._paligemma_tokenizer),
        config.chunk_size,
        DIM,
        config.max_decoding_steps,
        config.fast_skip_tokens,
        scored=WORDS if vocabulary == "full" else 0,
    )
    return Pi0FastBackbone(policy.model, tokenizer).eval(), tokenizer


def lerobot_tokens(policy: Any, batch: dict[str, Tensor], stop: int, *, cached: bool = True) -> Tensor:
    """Tokens of LeRobot's own decoder; what it writes behind a row's stop token, which it never reads, is cut."""
    images, masks = policy._preprocess_images(batch)
    decode = policy.model.sample_actions_fast_kv_cache if cached else policy.model.sample_actions_fast
    tokens = decode(
        images,
        masks,
        batch[OBS_LANGUAGE_TOKENS],
        batch[OBS_LANGUAGE_ATTENTION_MASK],
        max_decoding_steps=policy.config.max_decoding_steps,
        temperature=policy.config.temperature,
    )
    return torch.where((tokens == stop).cumsum(1) > 0, stop, tokens)


def decode(backbone: Any, tokenizer: Any, batch: Any, config: DecodingConfig, **more: Any) -> DecodeResult:
    with torch.no_grad():
        return decode_block(backbone, backbone.prefill(batch), config, tokenizer=tokenizer, **more)


def overfit(policy: Any, batch: dict[str, Tensor], target: Tensor, steps: int = 60) -> None:
    """Train LeRobot's policy, with its own loss, until it writes `target` (B, n)."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    images, masks = policy._preprocess_images(batch)
    prompt = (batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK])
    fast = torch.cat([torch.full_like(target[:, :1], 2), target], dim=1)  # behind BOS
    for _ in range(steps):
        loss = policy.model.forward(images, masks, *prompt, fast, torch.ones_like(fast, dtype=torch.bool))[
            "loss"
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def lab(build: Build, tmp_path: Path) -> SimpleNamespace:
    """The builder and its helpers."""
    sizes = {"WORDS": WORDS, "SKIP": SKIP, "STEPS": STEPS, "DIM": DIM, "STOP": STOP_WORD, "CAMERAS": CAMERAS}
    parts = (observe, wrap, lerobot_tokens, decode, overfit)
    return SimpleNamespace(build=build, folder=tmp_path, **sizes, **{part.__name__: part for part in parts})
