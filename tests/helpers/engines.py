"""Comparison of a compiled backbone with the eager one, for tests of every family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ceed_vla.decoding import decode_block
from ceed_vla.tokens.base import ActionTokens

DECODINGS = ("ar", "ar_h", "jacobi", "cap1", "cap2", "cap4", "conf0.2_cap2")


@torch.no_grad()
def assert_same_tokens(
    backbone: Any, engine: Any, observation: dict[str, Tensor], tokens: ActionTokens
) -> None:
    """Assert equal tokens and exit reasons of every decoder, with and without frozen tokens."""
    eager, fast = backbone.prefill(observation), engine.prefill(observation)
    greedy = decode_block(backbone, eager, tokens, "ar").tokens
    previous = (greedy + 1) % backbone.vocabulary_size if tokens.stop is None else None
    size = tokens.tokens_per_step
    longest = backbone.block_length // size - 1 if size else 0
    for name in DECODINGS if tokens.stop is None else DECODINGS[:-1]:  # the last one compares bins
        for steps in sorted({0, min(1, longest), longest // 2}):
            request: dict[str, Any] = {"previous": previous}
            if size:
                request["shift_steps"] = 1
                request["frozen_steps"] = steps
                request["executed_steps"] = max(longest // 2, 1)
            expected = decode_block(backbone, eager, tokens, name, **request)
            result = decode_block(engine, fast, tokens, name, **request)
            case = f"{name}, {steps} frozen steps"
            assert torch.equal(result.tokens, expected.tokens), case
            assert torch.equal(result.exact_tokens, expected.exact_tokens), case
            assert (result.forwards, result.exit_reason) == (
                expected.forwards,
                expected.exit_reason,
            ), case
