"""Tiny random models of every image-text-to-text family, in their own file formats."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from benchmarks.models.smolvlm import (
    CHAT,
    IMAGE,
    PATCH,
    make_tokenizer,
    smolvlm,
    text_config,
    vision_config,
    write_tiny,
)

_SQUARE = {"height": IMAGE, "width": IMAGE}


def _llava(width: int) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(["<image>"], image_token="<image>")
    config = AutoConfig.for_model(
        "llava",
        vision_config=vision_config("clip_vision_model"),
        text_config=text_config("llama", tokenizer, width),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=_SQUARE),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("@", "<image>"),
    )
    return config, processor


def _llava_onevision(width: int) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    pinpoints = [[IMAGE, IMAGE]]
    config = AutoConfig.for_model(
        "llava_onevision",
        vision_config=vision_config("siglip_vision_model"),
        text_config=text_config("qwen2", tokenizer, width),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=pinpoints),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=_SQUARE),
        num_image_tokens=(IMAGE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT.replace("@", "<image>"),
    )
    return config, processor


def _qwen(kind: str, vision: dict[str, Any], videos: Any, join: Any, width: int) -> tuple[Any, Any]:
    """Qwen2.5-VL and Qwen3-VL: patches in one list, three rotary axes."""
    special = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    names = dict(
        zip(
            ("vision_bos_token", "image_token", "vision_eos_token", "video_token"),
            special,
            strict=True,
        )
    )
    tokenizer = make_tokenizer(special, **names)
    start, image, end, video = (tokenizer.convert_tokens_to_ids(token) for token in special)
    half = width // 4 // 2  # rotary frequencies of a head, shared by time, height and width
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    config = AutoConfig.for_model(
        kind,
        vision_config={**sizes, "out_hidden_size": width, **vision},
        text_config={
            **text_config(f"{kind}_text", tokenizer, width),
            "head_dim": width // 4,
            "rope_parameters": rope,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    patch = vision["patch_size"]
    pixels = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (6 * patch) ** 2}
    processor = join(
        transformers.Qwen2VLImageProcessor(size=pixels, patch_size=patch),
        tokenizer,
        videos(size=pixels, patch_size=patch),
        chat_template=CHAT.replace("@", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return config, processor


_QWEN2_5 = {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
_QWEN3 = {"patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}


def _paligemma(width: int) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(["<image>"], image_token="<image>")
    images: Any = transformers.SiglipImageProcessor(size=_SQUARE)
    images.image_seq_length = (IMAGE // PATCH) ** 2
    # adds 1,152 location and mask tokens
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = AutoConfig.for_model(
        "paligemma",
        vision_config={**vision_config("siglip_vision_model"), "vision_use_head": False},
        text_config={**text_config("gemma", tokenizer, width), "head_dim": width // 4},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=width,
        hidden_size=width,
    )
    return config, processor


FAMILIES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": partial(
        _qwen, "qwen2_5_vl", _QWEN2_5, Qwen2VLVideoProcessor, transformers.Qwen2_5_VLProcessor
    ),
    "qwen3_vl": partial(
        _qwen, "qwen3_vl", _QWEN3, Qwen3VLVideoProcessor, transformers.Qwen3VLProcessor
    ),
    "smolvlm": partial(smolvlm, "idefics3"),
    "smolvlm2": partial(smolvlm, "smolvlm"),
    "paligemma": _paligemma,
}


def make_tiny_vlm(family: str, folder: Path, *, width: int = 64, scale: float = 1.0) -> Path:
    """Write one of `FAMILIES` into a folder; the `width` is a multiple of 24 or of 32."""
    return write_tiny(*FAMILIES[family](width), folder, scale=scale)
