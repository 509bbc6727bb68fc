"""Drafts without a model: the tokens that followed an earlier occurrence of the last two tokens.

Prompt lookup (an n-gram draft, as in lookahead decoding, arXiv 2402.02057) for action blocks. It
searches the proven tokens and the newest state of the block, which is initially the shifted
previous chunk. An occurrence counts only at the same action dimension. One forward verifies a
draft. The result is exact: every token is the greedy one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ceed_vla.axes.drafts.verification import Drafter, decode_drafts
from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.registry import Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.decoding.rows import Rows
from ceed_vla.errors import ConfigError


@dataclass(frozen=True)
class NgramOptions(Options):
    """Length of a draft [tokens]."""

    length: int = 8


@register_decoder(
    r"ngram(?P<length>\d*)",
    "ngram<L>",
    "drafts of L tokens from the previous chunk",
    ("ngram4", "ngram8"),
    options=NgramOptions,
    rows_wait=True,
)
def decode_ngram(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode a block with drafts of up to ``L`` tokens, each verified in one forward.

    As in Jacobi decoding, the first forward computes the whole block, so that its tail is a warm
    start.

    Raises:
        ConfigError: The draft length is 0; and as `decode_drafts`.
    """
    length = request.options.length
    if length < 1:
        raise ConfigError(
            f"The draft length of ngram is {length}; it must be at least 1, as in ngram8."
        )
    return decode_drafts(backbone, prefix, request, _Lookup(length, request.tokens_per_step or 1))


class _Lookup(Drafter):
    whole_first = True

    def __init__(self, length: int, period: int) -> None:
        self.length = length
        self.period = period
        self.read: np.ndarray | None = None  # (B, n), the input of the last forward

    def draft(
        self, backbone: Backbone, prefix: Prefix, tokens: Tensor, rows: Rows, exact: int, end: int
    ) -> int:
        text = tokens.cpu().numpy()  # (B, n)
        read = text if self.read is None else self.read
        self.read = text.copy()
        for row in np.flatnonzero(rows.running):
            known = int(rows.exact[row])
            if known >= end:  # ahead of the row whose draft this is
                continue
            guess = np.concatenate([read[row, :known], text[row, known:]])
            self.read[row, known:end] = draft(guess, text[row, :known], end - known, self.period)
        tokens.copy_(torch.from_numpy(self.read))
        return 0


def draft(guess: np.ndarray, proven: np.ndarray, count: int, period: int) -> np.ndarray:
    """Draft the tokens that follow an earlier occurrence of the last two proven tokens.

    The guess at the current slot has precedence, then the newest occurrence in the proven tokens,
    then the last occurrence in the guess.

    Args:
        guess: (n,) the newest state of the block.
        proven: (k,) its proven tokens.
        count: Tokens to draft.
        period: Tokens per control step; occurrences are compared at multiples of it.

    Returns:
        (count,) the draft.
    """
    k = len(proven)
    n = len(guess)
    places = [(guess, k)]
    places += [(proven, end) for end in range(k - period, 1, -period)]
    places += [(guess, end) for end in range(k + (n - 1 - k) // period * period, 1, -period)]
    for text, end in places if k >= 2 else ():
        if (text[end - 2 : end] == proven[-2:]).all():
            found = text[end : end + count]
            return np.concatenate([found, guess[k + len(found) : k + count]])
    return guess[k : k + count]
