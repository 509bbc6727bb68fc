"""Exactly K forwards with no host synchronization in between: ``loop2``, ``loop2_h``.

Jacobi decoding synchronizes after every forward to test for convergence. On a GPU, this costs as
much as a small forward. Here the host launches all forwards back to back, for example as replayed
graphs of a compiled block, and synchronizes once. There is no early exit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.finite import check_rows
from ceed_vla.decoding.host import row_sums, to_host
from ceed_vla.decoding.registry import Options, register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@dataclass(frozen=True)
class LoopOptions(Options):
    """Number of forwards."""

    count: int


@register_decoder(
    r"loop(?P<count>[1-9]\d{0,2})",
    "loop<K>",
    "exactly K forwards, one synchronization",
    ("loop4", "loop3", "loop2", "loop1"),
    options=LoopOptions,
    relaxes=True,
)
@torch.no_grad()
def decode_loop(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode with exactly K forwards and no convergence test.

    The watched tokens are those of ``cap<K>``, whose rows may end before their tail is computed.

    The first forward computes the whole block, later ones the watched slots.

    Raises:
        ConfigError: The request has exit rules, recorded states or a stop token; and as
            `decode_jacobi`.
    """
    n = backbone.block_length
    request.refuse_jacobi_settings()
    if request.stop is not None or request.record_states:
        raise ConfigError("loop<K> supports neither a stop token nor recorded states; use jacobi.")
    tokens, frozen, watched = request.begin(backbone, prefix, guessed=True)  # (B, n)
    start = max(frozen, 1)
    end = n
    taken = 0
    sums = row_sums(prefix.logits.amax(-1, keepdim=True))
    # (B, 1) leading tokens that are proven
    exact = torch.full((len(tokens), 1), start, device=tokens.device)
    while taken < request.options.count and end > start:
        logits = backbone.block_logits(prefix, tokens[:, : end - 1])[:, start - 1 :]  # (B, k, V)
        best, new = logits.max(-1)  # (B, k)
        # The token behind the unchanged ones is right too.
        same = (new == tokens[:, start:end]).long().cumprod(1).sum(1, keepdim=True)
        exact = torch.maximum(exact, (start + same + 1).clamp(max=end))
        tokens[:, start:end] = new
        sums = sums + row_sums(best)
        end = watched
        taken += 1
    right, found = to_host(exact, sums)  # the one synchronization
    check_rows(found)
    reasons = [
        "converged" if k >= n else "stable" if k >= watched else "max_iterations"
        for k in right[:, 0].tolist()
    ]
    proven = torch.from_numpy(right[:, 0].copy())
    iterations = torch.full((len(tokens),), taken)
    return DecodeResult(tokens, taken, iterations, reasons, proven, proven >= n)
