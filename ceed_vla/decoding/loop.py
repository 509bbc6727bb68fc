"""So many forwards of a block, without a look in between: ``loop2``, ``loop2_h``; nothing ends
early.

Jacobi decoding waits for each forward, to see what it proved. On a GPU that wait costs as much as a
small forward; here all of them are launched one behind the other, as replayed graphs of a compiled
block can be, and the host waits once.
"""

from __future__ import annotations

import torch

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.drafts import refuse_jacobi_settings
from ceed_vla.decoding.finite import check_rows, row_sums, to_host
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError


@register_decoder(
    r"loop(?P<count>[1-9]\d{0,2})", "loop<K>", "K, one wait", ("loop4", "loop3", "loop2", "loop1")
)
@torch.no_grad()
def decode_loop(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """The tokens of ``cap<K>``, from K forwards whatever they prove; the first computes the whole
    block.

    Raises as `decode_jacobi`; `ConfigError` too for exit rules, states, and tokens with a stop.
    """
    started = request.clock()
    n = backbone.block_length
    refuse_jacobi_settings(request.config)
    if request.stop is not None or request.record_states:
        raise ConfigError("loop<K> has no stop token and keeps no states; use jacobi.")
    tokens, given, watched = request.begin(backbone, prefix, guessed=True)  # (B, n)
    first = max(given, 1)
    end = n
    taken = 0
    sums = row_sums(prefix.logits.amax(-1, keepdim=True), backbone)
    # leading tokens that are proven
    exact = torch.full((len(tokens), 1), first, device=tokens.device)
    while taken < int(request.options["count"]) and end > first:
        # (B, k)
        best, new = backbone.block_logits(prefix, tokens[:, : end - 1])[:, first - 1 :].max(-1)
        # the next one is right too
        same = (new == tokens[:, first:end]).long().cumprod(1).sum(1, keepdim=True)
        exact = torch.maximum(exact, (first + same + 1).clamp(max=end))
        tokens[:, first:end] = new
        sums = sums + row_sums(best, backbone)
        end = watched
        taken = taken + 1
    right, found = to_host(exact, sums)  # the one wait
    check_rows(found)
    ends = [
        "converged" if k >= n else "stable" if k >= watched else "max_iterations"
        for k in right[:, 0].tolist()
    ]
    proven = torch.from_numpy(right[:, 0].copy())
    result = DecodeResult(
        tokens, taken, torch.full((len(tokens),), taken), ends, proven, proven >= n
    )
    result.seconds = {"decode": request.clock() - started}
    return result


decode_loop.relaxes = lambda _: True  # type: ignore[attr-defined]
