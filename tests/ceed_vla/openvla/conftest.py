"""Tiny OpenVLA folders in the published format, with random weights, and their outputs by an
independent route.
"""

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

from ceed_vla.backbones.openvla.model import OpenVLABackbone

EMPTY_TOKEN, WORDS, BINS = 29871, 32000, 256
SIZE = 28
STATS = {
    "kitchen": {
        "action": {"q01": [-0.5, -1.0, 0.0], "q99": [0.5, 3.0, 1.0], "mask": [True, True, False]}
    },
    "garage": {"action": {"q01": [-100.0, 0.2, -1.0], "q99": [300.0, 0.4, 1.0]}},
}
DINO, SIGLIP, CLIP = (
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224.openai",
)
TOWERS = {
    DINO: {"depth": 3, "embed_dim": 16, "num_heads": 2},
    SIGLIP: {"depth": 3, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 14},
    CLIP: {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 14},
    "vit_large_patch16_224.augreg_in21k_ft_in1k": {
        "depth": 3,
        "embed_dim": 16,
        "num_heads": 2,
        "patch_size": 14,
    },
}
MEANS = {DINO: [0.485, 0.456, 0.406], CLIP: [0.48145466, 0.4578275, 0.40821073]}
STDS = {DINO: [0.229, 0.224, 0.225], CLIP: [0.26862954, 0.26130258, 0.27577711]}
TEXT = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rope_theta": 5000.0,
    "vocab_size": WORDS + 64,
}


def settings(towers: list[str], text: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """config.json of a tiny model."""
    return {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {"AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"},
        "image_sizes": [SIZE] * len(towers),
        "n_action_bins": BINS,
        "norm_stats": STATS,
        "pad_to_multiple_of": 64,
        "text_config": {**TEXT, **text},
        "timm_model_ids": towers,
        "timm_model_kwargs": [TOWERS[tower] for tower in towers],
        "timm_override_act_layers": ["quick_gelu" if tower == CLIP else None for tower in towers],
        "torch_dtype": "float32",
        "use_fused_vision_backbone": len(towers) == 2,
        **changes,
    }


def images(towers: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json for `towers`, in its short form."""
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, SIZE, SIZE]] * len(towers),
        "interpolations": ["bicubic", "bilinear"][: len(towers)],
        "means": [MEANS.get(tower, [0.5] * 3) for tower in towers],
        "stds": [STDS.get(tower, [0.5] * 3) for tower in towers],
        "use_fused_vision_backbone": len(towers) == 2,
        **changes,
    }


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json of whole words, with its own template."""
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
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )


def write_folder(
    folder: Path,
    towers: list[str],
    *,
    shards: int = 1,
    text: dict[str, Any] | None = None,
    pixels: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a published folder with random weights.

    Args:
        folder: New folder.
        towers: Names out of `TOWERS`.
        shards: Weight files.
        text: Changes of text_config.
        pixels: Changes of preprocessor_config.json.
        changes: Changes of config.json.
    """
    folder.mkdir(parents=True)
    config = settings(towers, text or {}, changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(images(towers, pixels or {})))
    write_tokenizer(folder)
    bins, dtype = config["n_action_bins"], config["torch_dtype"]
    model = OpenVLABackbone(config, 9, bins, dtype)
    random = np.random.default_rng(len(towers))
    weights, head = (
        {},
        (
            "embed_tokens.weight"
            if config["text_config"].get("tie_word_embeddings")
            else "lm_head.weight"
        ),
    )
    for name, parameter in sorted(model.named_parameters()):
        scale = 1.0 if parameter.ndim < 2 or "embed" in name else 1.5 / parameter[0].numel() ** 0.5
        values = scale * random.standard_normal(tuple(parameter.shape), dtype=np.float32)
        if name.endswith(head):
            values[WORDS - bins : WORDS] *= 8  # so that the best id is an action
        weights[name.replace(".gamma", ".scale_factor")] = torch.from_numpy(values).to(
            parameter.dtype
        )
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    files = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


KINDS: dict[str, tuple[list[str], int]] = {
    "fused": ([DINO, SIGLIP], 3),
    "siglip": ([SIGLIP], 1),
    "clip": ([CLIP], 1),
}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of towers ("fused", "siglip", "clip") -> a folder, which tests must not change."""
    root, made = tmp_path_factory.mktemp("openvla"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            towers, shards = KINDS[kind]
            made[kind] = write_folder(root / kind, towers, shards=shards)
        return made[kind]

    return get


@pytest.fixture(scope="session", name="write_folder")
def _write_folder() -> Callable[..., Path]:
    return write_folder


@pytest.fixture
def copied(published: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """(kind, **changes of config.json) -> a copy, which tests may change."""

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


# ---- the reference: the same weights through other code ------------------------------------------


def reference_pixels(picture: np.ndarray, folder: Path) -> Tensor:
    """Pixels (C, S, S) of an RGB image of any size, by Pillow and numpy."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    image, parts = Image.fromarray(picture), []
    strategy, size = config["image_resize_strategy"], SIZE
    if strategy == "letterbox":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * v) for v in config["means"][-1]))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    for mode, mean, std in zip(
        config["interpolations"], config["means"], config["stds"], strict=True
    ):
        resample = getattr(Image.Resampling, mode.upper())
        if strategy == "resize-crop":
            shorter = min(image.size)
            resized = image.resize(
                tuple(int(size * side / shorter) for side in image.size), resample
            )
            left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
            resized = resized.crop((left, top, left + size, top + size))
        else:
            resized = image.resize((size, size), resample)
        values = np.asarray(resized, dtype=np.float32) / np.float32(255)
        parts.append((values - np.array(mean, np.float32)) / np.array(std, np.float32))
    return torch.from_numpy(np.concatenate(parts, axis=2)).permute(2, 0, 1)


class OnlyActions(LogitsProcessor):
    """Restricts `generate()` to action ids."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, WORDS - BINS : WORDS] = scores[:, WORDS - BINS : WORDS]
        return kept


@torch.no_grad()
def reference_tokens(
    backbone: OpenVLABackbone, ids: list[int], pixels: Tensor, count: int
) -> list[int]:
    """Vocabulary ids of one row, from timm's blocks one by one and transformers' `generate()`."""
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
    embeds = torch.cat(
        [words[:, :1], backbone.projector(torch.cat(features, dim=2)), words[:, 1:]], dim=1
    )
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
