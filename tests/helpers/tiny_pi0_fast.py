"""A tiny pi0-FAST in LeRobot's file format, with generated tokenizers.

LeRobot fixes the sizes of its models, so its classes must be patched when such a folder is read:

    with tiny_sizes():
        folder = write_pi0_fast("tiny", chunks)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0_fast import modeling_pi0_fast as lerobot_pi0
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.processor_pi0_fast import (
    Pi0FastPrepareStateAndLanguageTokenizerProcessorStep,
)
from lerobot.processor import (
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ceed_vla.tokens.fast_codec import cosine_basis

# text ids, ids after the FAST ids, image side [px], prompt [tokens]
WORDS, SKIP, SIDE, PROMPT = (
    700,
    8,
    28,
    48,
)
# id of "|"; smallest coefficient and quantisation of the FAST tokenizer
STOP, LEAST, SCALE = (
    5,
    -60,
    10,
)


def write_text_tokenizer(folder: Path, stop_id: int = STOP) -> None:
    """A word-level tokenizer with "Action", ":" and "|" among `WORDS` ids."""
    names = {i: f"w{i}" for i in range(WORDS)}
    names |= {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 6: "Action", 7: ":"}
    names |= {100 + i: str(i) for i in range(256)}  # the bins of a state
    names |= dict(enumerate(("Task", "State", ",", ";", "put", "the", "cube", "in", "bin"), 10))
    names[stop_id] = "|"
    words = Tokenizer(models.WordLevel({name: i for i, name in names.items()}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
    }
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def write_fast_tokenizer(folder: Path, chunks: Tensor) -> None:
    """Write a published FAST folder: a byte-level BPE fitted on normalised `chunks` (N, m, A)."""
    folder.mkdir(parents=True)
    rounded = (cosine_basis(chunks.shape[1]) @ chunks.double() * SCALE).round().long().flatten(
        1
    ) - LEAST
    bpe = ByteLevelBPETokenizer()
    texts = ["".join(map(chr, row)) for row in rounded.tolist()]
    bpe.train_from_iterator(texts, vocab_size=300, min_frequency=2, show_progress=False)
    bpe.save(str(folder / "tokenizer.json"))
    numbers = {
        "scale": SCALE,
        "min_token": LEAST,
        "vocab_size": 300,
        "action_dim": None,
        "time_horizon": None,
    }
    (folder / "processor_config.json").write_text(json.dumps(numbers))


@contextmanager
def tiny_sizes() -> Iterator[None]:
    """Within the block, LeRobot builds pi0-FAST with two narrow layers and `WORDS` text ids."""
    paligemma, sizes = (
        lerobot_pi0.PaliGemmaForConditionalGenerationWithPiGemma,
        lerobot_pi0.get_gemma_config,
    )
    tiny = lerobot_pi0.GemmaConfig(32, 2, 48, 4, 1, 8)
    changed: Any = lerobot_pi0
    changed.PaliGemmaForConditionalGenerationWithPiGemma = lambda config: paligemma(
        config=_shrink(config)
    )
    changed.get_gemma_config = lambda variant: tiny
    try:
        yield
    finally:
        changed.PaliGemmaForConditionalGenerationWithPiGemma, changed.get_gemma_config = (
            paligemma,
            sizes,
        )


def _shrink(config: Any) -> Any:
    vision, text = config.vision_config, config.text_config
    vision.update(
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    )
    vision.image_size, vision.projection_dim = SIDE, text.hidden_size
    text.vocab_size = config.image_token_index = WORDS
    text.initializer_range = config.initializer_range = 0.3
    return config


def tiny_config(
    folder: Path, chunks: Tensor, cameras: tuple[str, ...], state_dim: int, **more: Any
) -> PI0FastConfig:
    """LeRobot's configuration for chunks (N, m, A), with tokenizers in ``text`` and ``fast``."""
    steps, dim = chunks.shape[1:]
    return PI0FastConfig(
        input_features={
            **{key: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for key in cameras},
            "observation.state": PolicyFeature(FeatureType.STATE, (state_dim,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (dim,))},
        **{
            "chunk_size": steps,
            "n_action_steps": steps,
            "image_resolution": (SIDE, SIDE),
            "tokenizer_max_length": PROMPT,
            "max_decoding_steps": 3 + steps * dim,
            "fast_skip_tokens": SKIP,
            "text_tokenizer_name": str(folder / "text"),
            "action_tokenizer_name": str(folder / "fast"),
            "device": "cpu",
            "push_to_hub": False,
            **more,
        },
    )


def write_pi0_fast(folder: str | Path, chunks: Tensor, *, state_dim: int = 2) -> Path:
    """Write a random model with one camera in LeRobot's format, and its tokenizers.

    The model is in ``folder/lerobot``, the tokenizers in ``folder``.
    The FAST tokenizer is fitted on normalised `chunks` (N, m, A); the processors' statistics are
    standard normals.
    """
    folder = Path(folder)
    write_text_tokenizer(folder / "text")
    write_fast_tokenizer(folder / "fast", chunks)
    config = tiny_config(folder, chunks, ("observation.images.front",), state_dim)
    with tiny_sizes(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = lerobot_pi0.PI0FastPytorch(config)
    checkpoint = folder / "lerobot"
    checkpoint.mkdir()
    config._save_pretrained(checkpoint)
    save_weights(model, checkpoint)
    sizes = {"observation.state": state_dim, "action": chunks.shape[2]}
    normal = {name: {"mean": torch.zeros(n), "std": torch.ones(n)} for name, n in sizes.items()}
    steps = make_default_policy_processor_steps(config, normal)
    prompt = TokenizerProcessorStep(
        tokenizer_name=str(folder / "text"),
        max_length=PROMPT,
        padding_side="right",
        padding="max_length",
    )
    state: Any = Pi0FastPrepareStateAndLanguageTokenizerProcessorStep()
    inputs = [
        steps.rename_observations,
        steps.add_batch_dim,
        steps.normalize,
        state,
        prompt,
        steps.to_device,
    ]
    for pipeline in make_policy_processor_pipelines(inputs, [steps.unnormalize, steps.to_cpu]):
        pipeline.save_pretrained(checkpoint)
    return checkpoint


def save_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Write LeRobot's model.safetensors, with the shared matrix of head and embeddings once."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    kept: dict[int, str] = {}
    for name in sorted(weights, key=lambda name: "lm_head" not in name):
        kept.setdefault(weights[name].data_ptr(), name)
    save_file(
        {name: weights[name].contiguous() for name in kept.values()},
        checkpoint / "model.safetensors",
    )
