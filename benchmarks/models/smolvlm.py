"""Write a tiny random SmolVLM in its published file format, for examples and pipeline tests.

The folder is one for ``--policy.backbone.path``: `python -m benchmarks.models.smolvlm DIR`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

IMAGE, PATCH = 48, 12  # sides of the images after preprocessing, and of their patches [px]
SENTENCES = (
    "What action should the robot take to put the red cube on the blue cube in the green bin?",
    (
        "USER: ASSISTANT: pick up the yellow cube, push the purple block to the left, and place it "
        "in the drawer."
    ),
    (
        "stack open close press button turn lift move reach slide insert right front back top "
        "bottom of it"
    ),
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
        vocab_size=512,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
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


def text_config(kind: str, tokenizer: PreTrainedTokenizerFast, width: int) -> dict[str, Any]:
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


def vision_config(kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }


def smolvlm(kind: str, width: int) -> tuple[Any, Any]:
    """Idefics3 (SmolVLM), and SmolVLM2, which also takes videos."""
    special = [
        "<image>",
        "<video>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
    ]
    tokenizer = make_tokenizer(special, image_token="<image>", video_token="<video>")
    config = AutoConfig.for_model(
        kind,
        vision_config=vision_config(f"{kind}_vision"),
        text_config=text_config("llama", tokenizer, width),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    joint = {
        "image_seq_len": (IMAGE // PATCH // 2) ** 2,
        "chat_template": CHAT.replace("@", "<image>"),
    }
    sizes = {"size": {"longest_edge": IMAGE}, "max_image_size": {"longest_edge": IMAGE}}
    if kind == "idefics3":
        images = transformers.Idefics3ImageProcessor(**sizes, do_image_splitting=False)
        return config, transformers.Idefics3Processor(images, tokenizer, **joint)
    images = transformers.SmolVLMImageProcessor(**sizes, do_image_splitting=False)
    return config, transformers.SmolVLMProcessor(
        images, tokenizer, SmolVLMVideoProcessor(**sizes), **joint
    )


def write_tiny(config: Any, processor: Any, folder: str | Path, *, scale: float = 1.0) -> Path:
    """Write a random model of a configuration and its processor into a folder.

    `scale` is a factor on the matrices of the language model: above 1 its output depends more on
    every token.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "visual" not in name and "vision" not in name:
                torch.nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=processor.tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny random SmolVLM.")
    parser.add_argument("folder")
    written = Path(parser.parse_args().folder)
    if written.exists() and any(written.iterdir()):
        parser.error(f"{written} is not empty; name a new folder")
    print(write_tiny(*smolvlm("idefics3", width=64), written))
