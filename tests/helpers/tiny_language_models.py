"""A tiny random language model with its tokenizer, in the file format of published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.models.smolvlm import make_tokenizer, text_config


def make_tiny_language_model(
    folder: Path, kind: str = "llama", layers: int = 4, scale: float = 3.0, **changes: Any
) -> Path:
    """Write a model whose weights are `scale` times as large as usual, so that every token depends
    on those before it; returns the folder.
    """
    tokenizer = make_tokenizer([])
    values = text_config(kind, tokenizer, 32) | {"num_hidden_layers": layers} | changes
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data *= scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
