"""Write a tiny random OpenVLA in the published file format, for examples and pipeline tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from ceed_vla.backbones.openvla.folder import PROMPT
from ceed_vla.backbones.openvla.model import OpenVLABackbone
from ceed_vla.errors import ConfigError

SIDE, WORDS = 56, 32000  # side of the images [px], and ids without padding
TEXT = (
    "stack put place pick up push the red blue green yellow cube block in bin plate on to left "
    "right of open drawer"
)
# 1 % and 99 % quantiles of the tabletop's actions, and the dimensions that are normalised.
LOW = [-1.0, -1.0, -1.0, -0.25, -0.25, -1.0, -1.0]
HIGH = [1.0, 1.0, 1.0, 0.25, 0.25, 1.0, 1.0]
MASK = [True] * 6 + [False]


def write_openvla(folder: str | Path, *, width: int = 96, seed: int = 0) -> Path:
    """Write the files of a random model, and return its folder.

    Args:
        folder: A new or empty folder.
        width: Width of the language model, a multiple of 8.
        seed: Seed of the weights.

    Raises:
        ConfigError: The folder is not empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; name a new folder.")
    config = _config(width)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(_IMAGES, indent=2) + "\n")
    _tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    model = OpenVLABackbone(config, len(LOW), config["n_action_bins"], "float32")
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            values *= 0
        elif parameter.ndim < 2:  # gains of norms and scaled layers
            values = torch.ones_like(values)
        elif "embed_tokens" not in name:
            values *= parameter[0].numel() ** -0.5
        weights[name.replace(".gamma", ".scale_factor")] = values
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_IMAGES: dict[str, Any] = {
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, SIDE, SIDE]] * 2,
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    "use_fused_vision_backbone": True,
}


def _config(width: int) -> dict[str, Any]:
    return {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "image_resize_strategy": "resize-naive",
        "image_sizes": [SIDE, SIDE],
        "llm_backbone_id": "llama2-7b-pure",
        "n_action_bins": 256,
        "norm_stats": {"tabletop": {"action": {"q01": LOW, "q99": HIGH, "mask": MASK}}},
        "pad_to_multiple_of": 64,
        "text_config": {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "vocab_size": WORDS + 64,
        },
        "timm_model_ids": [
            "vit_large_patch14_reg4_dinov2.lvd142m",
            "vit_so400m_patch14_siglip_224",
        ],
        # Published folders lack this; it makes the towers tiny.
        "timm_model_kwargs": [
            {"depth": 2, "embed_dim": 32, "num_heads": 2},
            {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2.0},
        ],
        "timm_override_act_layers": [None, None],
        "torch_dtype": "float32",
        "use_fused_vision_backbone": True,
    }


def _tokenizer() -> Tokenizer:
    """A byte-level BPE that is trained on the prompt and begins every text with ``<s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT.format(instruction=TEXT)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


if __name__ == "__main__":
    print(write_openvla(sys.argv[1], seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0))
