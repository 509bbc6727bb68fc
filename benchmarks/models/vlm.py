"""Tiny random models of real families, in their own file format: to try a pipeline, and for tests and examples.

python -m benchmarks.models.vlm smolvlm DIR    # a folder as --policy.backbone.path takes it
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from ceed_vla.errors import ConfigError

IMAGE, PATCH = 48, 12  # sides of the images after pre-processing, and of their patches [px]
SENTENCES = (
    "What action should the robot take to put the red cube on the blue cube in the green bin?",
    "USER: ASSISTANT: pick up the yellow cube, push the purple block to the left, and place it in the drawer.",
    "stack open close press button turn lift move reach slide insert right front back top bottom of it",
)
FILLERS = 320  # ordinary ids that no text uses: room for action bins
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}@{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 900 ids, the `special` ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(learnt["vocab"])
    vocabulary |= {f"<unused{i}>": len(vocabulary) + i for i in range(FILLERS)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = ["<pad>", "<s>", "</s>", *special]
    tokenizer.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special,
        **names,
    )


def _text(kind: str, tokenizer: PreTrainedTokenizerFast, width: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer) + 7,  # rows beyond the tokenizer, as real models have
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _vision(kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }


_SQUARE = {"height": IMAGE, "width": IMAGE}


def _llava(width: int) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(["<image>"], image_token="<image>")
    config = AutoConfig.for_model(
        "llava",
        vision_config=_vision("clip_vision_model"),
        text_config=_text("llama", tokenizer, width),
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
        vision_config=_vision("siglip_vision_model"),
        text_config=_text("qwen2", tokenizer, width),
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
    names = dict(zip(("vision_bos_token", "image_token", "vision_eos_token", "video_token"), special, strict=True))
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
            **_text(f"{kind}_text", tokenizer, width),
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


def _smolvlm(kind: str, width: int) -> tuple[Any, Any]:
    """Idefics3 (SmolVLM), and SmolVLM2, which also takes videos."""
    special = ["<image>", "<video>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer = make_tokenizer(special, image_token="<image>", video_token="<video>")
    config = AutoConfig.for_model(
        kind,
        vision_config=_vision(f"{kind}_vision"),
        text_config=_text("llama", tokenizer, width),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    joint = {"image_seq_len": (IMAGE // PATCH // 2) ** 2, "chat_template": CHAT.replace("@", "<image>")}
    sizes = {"size": {"longest_edge": IMAGE}, "max_image_size": {"longest_edge": IMAGE}}
    if kind == "idefics3":
        images = transformers.Idefics3ImageProcessor(**sizes, do_image_splitting=False)
        return config, transformers.Idefics3Processor(images, tokenizer, **joint)
    images = transformers.SmolVLMImageProcessor(**sizes, do_image_splitting=False)
    return config, transformers.SmolVLMProcessor(images, tokenizer, SmolVLMVideoProcessor(**sizes), **joint)


def _paligemma(width: int) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(["<image>"], image_token="<image>")
    images: Any = transformers.SiglipImageProcessor(size=_SQUARE)
    images.image_seq_length = (IMAGE // PATCH) ** 2
    processor = transformers.PaliGemmaProcessor(images, tokenizer)  # adds 1,152 location and mask tokens
    config = AutoConfig.for_model(
        "paligemma",
        vision_config={**_vision("siglip_vision_model"), "vision_use_head": False},
        text_config={**_text("gemma", tokenizer, width), "head_dim": width // 4},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=width,
        hidden_size=width,
    )
    return config, processor


FAMILIES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": partial(_qwen, "qwen2_5_vl", _QWEN2_5, Qwen2VLVideoProcessor, transformers.Qwen2_5_VLProcessor),
    "qwen3_vl": partial(_qwen, "qwen3_vl", _QWEN3, Qwen3VLVideoProcessor, transformers.Qwen3VLProcessor),
    "smolvlm": partial(_smolvlm, "idefics3"),
    "smolvlm2": partial(_smolvlm, "smolvlm"),
    "paligemma": _paligemma,
}


def make_tiny_vlm(family: str, folder: str | Path, *, width: int = 64, scale: float = 1.0) -> Path:
    """Write a tiny random model of one of `FAMILIES` and its processor into a folder.

    The `width` of its language model is a multiple of 24 or of 32, and `scale` a factor on the matrices there: above 1
    answers depend more on every token.

    Raises:
        ConfigError: Unknown family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"No tiny model of the family {family!r}; choose one of {', '.join(FAMILIES)}.")
    config, processor = FAMILIES[family](width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "visual" not in name and "vision" not in name:
                torch.nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
    model.generation_config = transformers.GenerationConfig(pad_token_id=processor.tokenizer.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random image-text-to-text model.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder")
    print(make_tiny_vlm(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
