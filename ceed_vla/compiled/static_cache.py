"""A cache of constant shape, for compiled code.

Eager code reads a cache as far as it is written. Compiled code needs shapes that never change: it
reads all of a `StaticCache`, under a mask, and is told the position by a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ceed_vla.cache import BlockCache
from ceed_vla.errors import TokenError


class StaticCache(BlockCache, Cache):
    """A cache of constant shape, written at the position that a tensor says; to models of
    transformers it is theirs.

    What compiled code calls (all but `place`) reads tensors only, and none of the counts, which the
    host keeps. The ``StaticCache`` of transformers cannot be cut, and its sliding layers count on
    the host.

    Args:
        prefix: Cache with the prefix, which is copied.
        capacity: Positions ``T``.
        last: Cache of the same shape that ends here: its tensors are taken over; None makes new
            ones.
    """

    is_compileable = True

    def __init__(self, prefix: BlockCache, capacity: int, last: StaticCache | None = None) -> None:
        BlockCache.__init__(self)
        Cache.__init__(self, layers=[])
        found = list(zip(*prefix.entries(), strict=True))
        self.capacity = capacity
        length = prefix.length
        if last is None:
            with torch.inference_mode(False):
                self.keys, self.values = (
                    [e.new_zeros(*e.shape[:2], capacity, e.shape[3]) for e in p] for p in found
                )
                self.position, self.start = (
                    self.keys[0].new_zeros((), dtype=torch.int64) for _ in range(2)
                )
            for tensor in (
                (*self.keys, *self.values, self.position, self.start)
                if self.keys[0].is_cuda
                else ()
            ):
                torch._dynamo.mark_static_address(tensor)  # CUDA graphs write to them in place
        else:
            self.keys = last.keys
            self.values = last.values
            self.position = last.position
            self.start = last.start
            last.keys = []
        for kept, new in zip(self.keys + self.values, found[0] + found[1], strict=True):
            kept.narrow(2, 0, length).copy_(new)
            # What is masked is still multiplied by 0, which a NaN survives.
            kept.narrow(2, length, capacity - length).zero_()
        self.start.fill_(length)
        self._written = length
        self.seal_prefix(length)

    def place(self, t: int, shallow: bool) -> None:
        """Tell compiled code where the next `t` tokens are; it writes them to some layers only if
        `shallow`.

        `TokenError` if another prefix has been run since.
        """
        if not self.keys:
            raise TokenError(
                "Another prefix has taken this one's place in the compiled cache; prefill it again."
            )
        self.position.fill_(self.length)
        self._written = self.length if shallow else self.length + t

    def positions(self, k: int) -> Tensor:
        """(k,) positions of the next `k` tokens."""
        return self.position + torch.arange(k, device=self.position.device)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, t, D) of one layer; returns all (B, H, T, D), written or
        not.
        """
        where = self.positions(k.shape[2])
        self.keys[layer].index_copy_(2, where, k)
        self.values[layer].index_copy_(2, where, v)
        return self.keys[layer], self.values[layer]

    def slots(self, k: int, device: torch.device | None = None) -> Tensor:
        return self.positions(k) - self.start

    def rows(self, table: Tensor, k: int) -> Tensor:
        """As `KVCache.rows`; tokens behind the block, which only fill a window, share the last
        slot's.
        """
        return table[self.slots(k).clamp(max=len(table) - 1)]

    def mask(self, k: int) -> Tensor:
        """(k, T), True where one of the next `k` tokens may attend."""
        positions = self.positions(k)
        return torch.arange(self.capacity, device=positions.device) <= positions.unsqueeze(1)

    def real(self, prefix: Tensor, k: int) -> Tensor:
        """`prefix` (B, T) as it is: what is behind the tokens is masked as causality has it."""
        return prefix

    # ---- what models of transformers call --------------------------------------------------------

    def begin(self, t: int, shallow: bool = False) -> Cache:
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Any:
        return self.write(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.capacity, 0
