"""What decoding costs beyond the language model: our AR and Jacobi loops against its bare forwards.

    python benchmarks/decode_overhead.py

Layers have the size of a 7B Llama, with random weights. The bare forwards are those that a loop made, one by one: the
same query lengths behind the same cached positions, and the same rows of the head. Loop and bare forwards take turns;
the fastest run of each is compared, as whatever else a machine does can only add time.

The last line is about the checks of what comes in and out (images, state, words, the previous chunk's tokens, finite
scores): their time alone over that of a whole chunk of the shipped student, both medians of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ceed_vla.backbones.openvla.folder import Architecture
from ceed_vla.backbones.openvla.model import OpenVLABackbone
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings, TransformersPrefix
from ceed_vla.checkpoints import load
from ceed_vla.decoding import BlockRequest, DecodeResult, DecodingConfig, decode_autoregressive, decode_jacobi
from ceed_vla.decoding.finite import check_rows, row_sums, to_host
from ceed_vla.tensors import check_tokens

WORDS, BINS = 32000, 256
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}


@dataclass
class Timing:
    """Times of a decoder's loop and of its bare forwards [s], one of each a repetition."""

    forwards: int
    loop: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    @property
    def overhead(self) -> float:
        """Share of the bare forwards' time that the loop adds, by the fastest runs."""
        return min(self.loop) / min(self.bare) - 1


def build(layers: int, dtype: str, block: int, width: int | None = None) -> OpenVLABackbone:
    """An OpenVLA whose language model has `layers` layers of a 7B Llama (or of `width`), and tiny vision."""
    text = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": WORDS + 64, **LLAMA_7B}
    if width:
        text |= {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4,
                 "num_key_value_heads": 4}  # fmt: skip
    architecture = {
        "text_config": text,
        "pad_to_multiple_of": 64,
        "n_action_bins": BINS,
        "use_fused_vision_backbone": False,
        "image_sizes": [28],
        "timm_model_ids": ["vit_base_patch16_siglip_224"],
        "timm_model_kwargs": [{"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 14}],
    }
    backbone = OpenVLABackbone(Architecture(architecture), block, BINS, dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.language_model.parameters():
        scale = 1.0 if parameter.ndim < 2 else parameter.shape[1] ** -0.5
        parameter.data = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return backbone.eval()


def recorded_calls(backbone: OpenVLABackbone, decode: Callable[[], DecodeResult]) -> list[tuple[int, Tensor]]:
    """(committed tokens, tokens (B, k)) of every forward behind the prefix that `decode` makes."""
    calls, original = [], backbone.block_logits

    def record(prefix: TransformersPrefix, tokens: Tensor) -> Tensor:
        calls.append((prefix.cache.committed, tokens.clone()))
        return original(prefix, tokens)

    backbone.block_logits = record  # type: ignore[assignment, method-assign]
    try:
        decode()
    finally:
        del backbone.block_logits
    return calls


def bare_forwards(backbone: OpenVLABackbone, embeds: Tensor, calls: list[tuple[int, Tensor]]) -> Callable[[], None]:
    """The forwards of `calls`, and nothing else, behind the prefix `embeds` (B, P, d)."""
    model, head = backbone.language_model.model, backbone.language_model.lm_head.weight[WORDS - BINS : WORDS]
    words, cache, length = backbone.language_model.get_input_embeddings(), DynamicCache(), embeds.shape[1]
    model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)

    def run() -> None:
        for committed, tokens in calls:
            cache.crop(length + committed)
            output = model(inputs_embeds=words(WORDS - 1 - tokens), past_key_values=cache, use_cache=True)
            F.linear(output.last_hidden_state, head)

    return run


def measure(loop: Callable[[], DecodeResult], bare: Callable[[], None], repeats: int) -> Timing:
    """Time both in turns."""
    timing = Timing(loop().forwards)
    bare()  # warm
    for _ in range(repeats):
        for function, times in ((loop, timing.loop), (bare, timing.bare)):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return timing


@torch.inference_mode()
def compare(
    layers: int, dtype: str, block: int, prefix_length: int, repeats: int, width: int | None = None
) -> dict[str, Timing]:
    """Timings of greedy and strict Jacobi decoding of one block."""
    backbone = build(layers, dtype, block, width)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, prefix_length, backbone.language_model.config.hidden_size, generator=generator)
    embeds = embeds.to(backbone.dtype)
    prefix = backbone.prefill_embeddings(
        PrefixEmbeddings.in_order(embeds, torch.ones(1, prefix_length, dtype=torch.bool))
    )
    guess = torch.randint(BINS, (1, block), generator=generator)
    decoders: dict[str, Callable[[], DecodeResult]] = {
        "ar": lambda: decode_autoregressive(backbone, prefix, BlockRequest(DecodingConfig(method="ar"))),
        "jacobi": lambda: decode_jacobi(backbone, prefix, BlockRequest(guess=guess, tokens_per_step=7)),
    }
    return {
        name: measure(decode, bare_forwards(backbone, embeds, recorded_calls(backbone, decode)), repeats)
        for name, decode in decoders.items()
    }


@torch.inference_mode()
def checks(repeats: int) -> tuple[float, float]:
    """Medians of a chunk of the shipped student, pre-processing included, and of all of its checks alone [s]."""
    policy, preprocess, _ = load("student")
    generator = torch.Generator().manual_seed(2)
    raw: dict[str, Any] = {c: torch.rand(1, 3, 96, 96, generator=generator) for c in policy.config.cameras}
    raw |= {"observation.state": torch.zeros(1, policy.config.robot_state_feature.shape[0])}
    raw["task"] = ["put the red cube in the bin"]
    batch, backbone, n = preprocess(raw), policy.backbone, policy.config.block_length
    last = policy.decode(batch)
    scores, tokens = torch.rand(1, n), last.tokens
    chunk, alone = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        result = policy.decode(preprocess(raw), previous=last.tokens)
        chunk.append(time.perf_counter() - started)
        started = time.perf_counter()
        policy.check_observation(batch)
        check_tokens(tokens, "The previous chunk", (1, n), backbone.vocabulary_size, none=True)
        check_tokens(tokens, "tokens", (1, n), backbone.vocabulary_size)
        for _ in range(result.forwards):
            check_rows(to_host(tokens, row_sums(scores, backbone))[1])
        alone.append(time.perf_counter() - started)
    return statistics.median(chunk), statistics.median(alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--block", type=int, default=21, help="tokens of a block: 7 times the actions")
    parser.add_argument("--prefix", type=int, default=280, help="256 patches and the words of a prompt")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--chunks", type=int, default=200, help="chunks of the shipped student")
    options = parser.parse_args()
    print(
        f"{options.layers} layers of a 7B Llama, {options.dtype}, prefix {options.prefix}, block {options.block}, "
        f"batch 1, {torch.get_num_threads()} threads, fastest of {options.repeats}"
    )
    timings = compare(options.layers, options.dtype, options.block, options.prefix, options.repeats)
    for name, timing in timings.items():
        loop, bare = (
            f"{1e3 * min(t):.1f} ms (median {1e3 * statistics.median(t):.1f})" for t in (timing.loop, timing.bare)
        )
        print(f"{name:<7}{timing.forwards} forwards: loop {loop}, bare {bare}, overhead {timing.overhead:+.2%}")
    chunk, alone = checks(options.chunks)
    print(
        f"checks alone {1e3 * alone:.3f} ms, a chunk of the student {1e3 * chunk:.2f} ms (p50 of {options.chunks}): "
        f"{alone / chunk:.2%}"
    )


if __name__ == "__main__":
    main()
