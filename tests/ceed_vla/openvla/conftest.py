"""Tiny OpenVLA folders as they are published, with random weights, and their outputs by an independent route."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList

from ceed_vla.backbones.openvla import OpenVLABackbone
from ceed_vla.backbones.openvla_folder import Architecture

EMPTY_TOKEN, WORDS, BINS = 29871, 32000, 256
SIZE = 28
STATS = {
    "kitchen": {"action": {"q01": [-0.5, -1.0, 0.0], "q99": [0.5, 3.0, 1.0], "mask": [True, True, False]}},
    "garage": {"action": {"q01": [-100.0, 0.2, -1.0], "q99": [300.0, 0.4, 1.0]}},
}
TOWERS = {
    "vit_base_patch14_reg4_dinov2.lvd142m": {"depth": 3, "embed_dim": 16, "num_heads": 2},
    "vit_base_patch16_siglip_224": {
        "depth": 3,
        "embed_dim": 24,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "patch_size": 14,
    },
    "vit_base_patch16_clip_224.openai": {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 14},
}
MEANS = [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]]
STDS = [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]]


def settings(towers: list[str], activations: list[str | None] | None = None) -> dict[str, Any]:
    """config.json of a tiny model."""
    return {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {"AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"},
        "image_sizes": [SIZE] * len(towers),
        "n_action_bins": BINS,
        "norm_stats": STATS,
        "pad_to_multiple_of": 64,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "rope_theta": 5000.0,
            "vocab_size": WORDS + 64,
        },
        "timm_model_ids": towers,
        "timm_model_kwargs": [TOWERS[tower] for tower in towers],
        "timm_override_act_layers": activations or [None] * len(towers),
        "torch_dtype": "float32",
        "use_fused_vision_backbone": len(towers) == 2,
    }


def images(count: int, strategy: str = "resize-naive") -> dict[str, Any]:
    """preprocessor_config.json for `count` towers."""
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": strategy,
        "input_sizes": [[3, SIZE, SIZE]] * count,
        "interpolations": ["bicubic", "bilinear"][:count],
        "means": MEANS[-count:],
        "stds": STDS[-count:],
        "use_fused_vision_backbone": count == 2,
    }


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    text = "In : What action should the robot take to ? Out put red blue cube on plate open drawer"
    words = text.split()
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def write_folder(
    folder: Path, towers: list[str], activations: list[str | None] | None = None, *, shards: int = 1
) -> Path:
    """Write a published folder with random weights."""
    folder.mkdir(parents=True)
    config = settings(towers, activations)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(images(len(towers))))
    write_tokenizer(folder)
    model = OpenVLABackbone(Architecture(config), 9, BINS, "float32")
    generator = torch.Generator().manual_seed(len(towers))
    for name, parameter in sorted(model.named_parameters()):
        scale = 1.0 if parameter.ndim < 2 or "embed" in name else 1.5 / parameter[0].numel() ** 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    weights = {name.replace(".gamma", ".scale_factor"): t for name, t in model.state_dict().items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


KINDS: dict[str, tuple[list[str], list[str | None] | None, int]] = {
    "fused": (list(TOWERS)[:2], None, 3),
    "siglip": (list(TOWERS)[1:2], None, 1),
    "clip": (list(TOWERS)[2:], ["quick_gelu"], 1),
}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of towers ("fused", "siglip", "clip") -> a folder; nothing may write into it."""
    root, made = tmp_path_factory.mktemp("openvla"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            towers, activations, shards = KINDS[kind]
            made[kind] = write_folder(root / kind, towers, activations, shards=shards)
        return made[kind]

    return get


@pytest.fixture
def copied(published: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """(kind, **changes of config.json) -> a copy that a test may damage."""

    def get(kind: str = "siglip", **changes: Any) -> Path:
        folder = shutil.copytree(published(kind), tmp_path / "published")
        edit(folder / "config.json", **changes)
        return folder

    return get


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="session", name="edit")
def _edit() -> Callable[..., None]:
    return edit


# ---- the reference: the same weights through other code -----------------------------------------------------------


def reference_pixels(picture: np.ndarray, folder: Path) -> Tensor:
    """Pixels (C, S, S) of an RGB picture of any size, by Pillow and numpy."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    image, parts = Image.fromarray(picture), []
    strategy, size = config["image_resize_strategy"], SIZE
    if strategy == "letterbox":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * v) for v in config["means"][0]))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    for mode, mean, std in zip(config["interpolations"], config["means"], config["stds"], strict=True):
        resample = getattr(Image.Resampling, mode.upper())
        if strategy == "resize-crop":
            shorter = min(image.size)
            resized = image.resize(tuple(int(size * side / shorter) for side in image.size), resample)
            left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
            resized = resized.crop((left, top, left + size, top + size))
        else:
            resized = image.resize((size, size), resample)
        values = np.asarray(resized, dtype=np.float32) / np.float32(255)
        parts.append((values - np.array(mean, np.float32)) / np.array(std, np.float32))
    return torch.from_numpy(np.concatenate(parts, axis=2)).permute(2, 0, 1)


class OnlyActions(LogitsProcessor):
    """Lets `generate()` choose action ids only."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, WORDS - BINS : WORDS] = scores[:, WORDS - BINS : WORDS]
        return kept


@torch.no_grad()
def reference_tokens(backbone: OpenVLABackbone, ids: list[int], pixels: Tensor, count: int) -> list[int]:
    """Vocabulary ids of one row by timm's blocks one by one, and transformers' `generate()`."""
    vision, features, start = backbone.vision_backbone, [], 0
    for tower in (vision.featurizer, vision.fused_featurizer):
        if tower is None:
            continue
        x = tower.patch_embed(pixels[None, start : start + 3])
        x = tower.norm_pre(tower._pos_embed(x))
        for block in list(tower.blocks)[:-1]:
            x = block(x)
        features.append(x[:, tower.num_prefix_tokens :])
        start += 3
    words = backbone.language_model.get_input_embeddings()(torch.tensor([ids]))
    embeds = torch.cat([words[:, :1], backbone.projector(torch.cat(features, dim=2)), words[:, 1:]], dim=1)
    output = backbone.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([OnlyActions()]),
    )
    return output[0].tolist()


@pytest.fixture(scope="session", name="reference_pixels")
def _reference_pixels() -> Callable[[np.ndarray, Path], Tensor]:
    return reference_pixels


@pytest.fixture(scope="session", name="reference_tokens")
def _reference_tokens() -> Callable[..., list[int]]:
    return reference_tokens


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    """(4, 40, 48, 3) uint8."""
    blocks = np.random.default_rng(0).integers(0, 256, (4, 10, 12, 3), dtype=np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)
