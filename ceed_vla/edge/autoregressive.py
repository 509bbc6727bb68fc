"""Greedy autoregressive decoding on exported graphs, one token per forward."""

from __future__ import annotations

from typing import Any

import numpy as np

from ceed_vla.decoding.finite import check_rows
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.edge.forwards import GraphForwards
from ceed_vla.edge.result import row_result
from ceed_vla.edge.slots import Slots


def decode_autoregressive(
    forwards: GraphForwards, prefix: Slots, request: BlockRequest, frozen: int, end: int
) -> DecodeResult:
    """Decode the slots up to `end` token by token, as
    `ceed_vla.decoding.autoregressive.decode_autoregressive` does.

    Args:
        forwards: The forwards; their state holds the guess, which begins with the frozen tokens.
        prefix: What the prefix predicts for slot 0.
        request: The block request.
        frozen: Frozen tokens at the start.
        end: End of the slots to decode.

    Raises:
        NotFiniteError: The logits are NaN or infinite.
    """
    tokens: Any = forwards.tokens
    n = tokens.shape[1]
    free = max(frozen, 1)  # the first slot that takes a forward
    slots = prefix
    unchecked = [slots.total]
    if frozen:
        slots = forwards.read(tokens[:, :frozen])
        forwards.commit(frozen)
        unchecked.append(slots.total)
    tokens[:, frozen] = slots.tokens[:, -1]
    slot = frozen + 1
    while slot < end:
        slots = forwards.read(tokens[:, slot - 1 : slot])
        forwards.commit(1)
        unchecked.append(slots.total)
        tokens[:, slot] = slots.tokens[:, -1]
        slot += 1
        if request.on_proven is not None and slot % (request.tokens_per_step or n) == 0:
            _check(unchecked)
            request.on_proven(tokens, slot, slot - free)
    _check(unchecked)
    return row_result(tokens, slot - free, "complete", slot - free, end)


def _check(totals: list[np.ndarray]) -> None:
    check_rows(np.concatenate(totals, axis=1).sum(1, keepdims=True))
