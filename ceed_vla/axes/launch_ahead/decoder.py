"""Exactly K forwards with no host synchronisation in between: ``loop2``, ``loop2_h``; nothing ends
early.

Jacobi decoding waits for each forward, to see what it proved. On a GPU that wait costs as much as a
small forward; here all of them are launched one behind the other, as replayed graphs of a compiled
block can be, and the host waits once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.host import check_rows, row_sums, to_host
from ceed_vla.decoding.registry import Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@dataclass(frozen=True)
class LoopOptions(Options):
    """Forwards."""

    count: int


@register_decoder(
    r"loop(?P<count>[1-9]\d{0,2})",
    "loop<K>",
    "K, one wait",
    ("loop4", "loop3", "loop2", "loop1"),
    options=LoopOptions,
    relaxes=True,
)
@torch.no_grad()
def decode_loop(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """The tokens of ``cap<K>``, from K forwards whatever they prove; the first computes the whole
    block.

    Raises:
        ConfigError: Exit rules, states, or tokens with a stop; and as `decode_jacobi`.
    """
    n = backbone.block_length
    request.refuse_jacobi_settings()
    if request.stop is not None or request.record_states:
        raise ConfigError("loop<K> has no stop token and keeps no states; use jacobi.")
    tokens, given, watched = request.begin(backbone, prefix, guessed=True)  # (B, n)
    first = max(given, 1)
    end = n
    taken = 0
    sums = row_sums(prefix.logits.amax(-1, keepdim=True))
    # (B, 1) leading tokens that are proven
    exact = torch.full((len(tokens), 1), first, device=tokens.device)
    while taken < request.options.count and end > first:
        logits = backbone.block_logits(prefix, tokens[:, : end - 1])[:, first - 1 :]  # (B, k, V)
        best, new = logits.max(-1)  # (B, k)
        # Behind the tokens that stay as they were, the next one is right too.
        same = (new == tokens[:, first:end]).long().cumprod(1).sum(1, keepdim=True)
        exact = torch.maximum(exact, (first + same + 1).clamp(max=end))
        tokens[:, first:end] = new
        sums = sums + row_sums(best)
        end = watched
        taken += 1
    right, found = to_host(exact, sums)  # the one wait
    check_rows(found)
    reasons = [
        "converged" if k >= n else "stable" if k >= watched else "max_iterations"
        for k in right[:, 0].tolist()
    ]
    proven = torch.from_numpy(right[:, 0].copy())
    iterations = torch.full((len(tokens),), taken)
    return DecodeResult(tokens, taken, iterations, reasons, proven, proven >= n)
