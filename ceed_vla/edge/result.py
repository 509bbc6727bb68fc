"""Results of one row, with numpy's arrays in place of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from ceed_vla.decoding.result import DecodeResult


def row_result(
    tokens: np.ndarray, forwards: int, exit_reason: str, iterations: int, exact_tokens: int
) -> DecodeResult:
    """The result of decoding `tokens` (1, n) with `forwards`; see `DecodeResult`."""
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "iterations": np.array([iterations]),
        "exact_tokens": np.array([exact_tokens]),
        "exact": np.array([exact_tokens >= tokens.shape[1]]),
    }
    return DecodeResult(forwards=forwards, exit_reason=[exit_reason], **arrays)
