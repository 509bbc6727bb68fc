"""Drafts without a model: what followed the last two tokens before is tried again, and verified in
one forward.

Prompt lookup (an n-gram draft, as in lookahead decoding, arXiv 2402.02057) for action blocks: the
text that is searched is the newest state of the block, which begins as the shifted chunk before,
and the tokens that are proven. Tokens only follow one another where the same dimension of an action
follows. The result is exact: every token is the greedy one.
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
    """Tokens of a draft."""

    length: int = 8


@register_decoder(
    r"ngram(?P<length>\d*)",
    "ngram<L>",
    "drafts of L, verified",
    ("ngram4", "ngram8"),
    options=NgramOptions,
)
def decode_ngram(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode a block by drafting up to ``L`` tokens behind the proven ones and verifying them in
    one forward.

    As in Jacobi decoding, the first forward computes the whole block, so that its tail is a warm
    start.

    Raises:
        ConfigError: Drafts of no tokens; and as `decode_drafts`.
    """
    length = request.options.length
    if length < 1:
        raise ConfigError(f"ngram drafts {length} tokens; it must be at least one.")
    return decode_drafts(backbone, prefix, request, _Lookup(length, request.tokens_per_step or 1))


class _Lookup(Drafter):
    whole_first = True

    def __init__(self, length: int, period: int) -> None:
        self.length, self.period = length, period
        self.read: np.ndarray | None = None  # (B, n), what the last forward was given

    def draft(
        self, backbone: Backbone, prefix: Prefix, tokens: Tensor, rows: Rows, exact: int, end: int
    ) -> int:
        text = tokens.cpu().numpy()  # (B, n)
        read = text if self.read is None else self.read
        self.read = text.copy()
        for row in np.flatnonzero(rows.running):
            known = int(rows.exact[row])
            guess = np.concatenate([read[row, :known], text[row, known:]])
            self.read[row, known:end] = draft(guess, text[row, :known], end - known, self.period)
        tokens.copy_(torch.from_numpy(self.read))
        return 0


def draft(guess: np.ndarray, proven: np.ndarray, count: int, period: int) -> np.ndarray:
    """The next `count` tokens behind the `proven` ones (k,), from where their last two stood
    before.

    The `guess` (n,) as it stands comes first if it agrees, then the newest place in the proven
    tokens, then in it.
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
