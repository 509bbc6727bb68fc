"""The overhead benchmark times what it says: the forwards of a decoder, with and without its loop."""

from __future__ import annotations

import torch

from benchmarks.decode_overhead import bare_forwards, build, compare, recorded_calls
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings
from ceed_vla.decoding import BlockRequest, DecodingConfig, decode_autoregressive


def test_both_sides_run_the_same_forwards() -> None:
    timings = compare(layers=1, dtype="float32", block=7, prefix_length=5, repeats=2, width=64)
    assert timings["ar"].forwards == 6
    assert 1 <= timings["jacobi"].forwards <= 6
    assert all(len(timing.loop) == len(timing.bare) == 2 for timing in timings.values())


@torch.inference_mode()
def test_bare_forwards_are_those_of_the_decoder() -> None:
    backbone, embeds = build(1, "float32", 7, width=64), torch.randn(1, 5, 64)
    prefix = backbone.prefill_embeddings(PrefixEmbeddings.in_order(embeds, torch.ones(1, 5, dtype=torch.bool)))
    calls = recorded_calls(
        backbone, lambda: decode_autoregressive(backbone, prefix, BlockRequest(DecodingConfig(method="ar")))
    )
    assert [(committed, tuple(tokens.shape)) for committed, tokens in calls] == [(i, (1, 1)) for i in range(6)]
    lengths: list[int] = []
    hook = backbone.language_model.model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["past_key_values"].get_seq_length()), with_kwargs=True
    )
    bare_forwards(backbone, embeds, calls)()
    hook.remove()
    assert lengths == [0, *range(5, 11)]  # the prefix, then every token behind it
