"""A cache of constant shape, for compiled code.

Eager code reads the written part of a cache. Compiled code needs constant shapes: it reads all of a
`StaticCache`, under a mask, and takes the position from a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ceed_vla.cache import BlockCache
from ceed_vla.errors import TokenError


class StaticCache(BlockCache, Cache):
    """A cache of constant shape, which is written at the position in a tensor.

    It also is a cache of transformers, for models of that library. Methods that compiled code calls
    (all but `place`) read tensors only, never the counts on the host. The ``StaticCache`` of
    transformers does not fit, because it cannot be cut and its sliding layers count on the host.

    Args:
        prefix: Cache with the prefix, which is copied.
        capacity: Positions ``T``.
        last: A cache of the same shape that is no longer used, whose tensors are reused; None
            allocates new ones.
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
        for stored, new in zip(self.keys + self.values, found[0] + found[1], strict=True):
            stored.narrow(2, 0, length).copy_(new)
            # Masked values are multiplied by 0, which would not remove a NaN.
            stored.narrow(2, length, capacity - length).zero_()
        self.start.fill_(length)
        self._written = length
        self.seal_prefix(length)

    def place(self, t: int, shallow: bool) -> None:
        """Set the position of the next `t` tokens for compiled code.

        Args:
            t: Number of tokens.
            shallow: Whether the forward writes only some layers.

        Raises:
            TokenError: Another prefix has run since.
        """
        if not self.keys:
            raise TokenError(
                "Another prefix has overwritten this one in the compiled cache; prefill it again."
            )
        self.position.fill_(self.length + self.ahead)
        self._written = self.length if shallow else self.length + t

    def positions(self, k: int) -> Tensor:
        """(k,) positions of the next `k` tokens."""
        return self.position + torch.arange(k, device=self.position.device)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, t, D) of one layer; returns all of them (B, H, T, D)."""
        where = self.positions(k.shape[2])
        self.keys[layer].index_copy_(2, where, k)
        self.values[layer].index_copy_(2, where, v)
        return self.keys[layer], self.values[layer]

    def slots(self, k: int, device: torch.device | None = None) -> Tensor:
        return self.positions(k) - self.start

    def rows(self, table: Tensor, k: int) -> Tensor:
        """As `KVCache.rows`; padding behind the block has the row of the last slot."""
        return table[self.slots(k).clamp(max=len(table) - 1)]

    def mask(self, k: int) -> Tensor:
        """(k, T), True where one of the next `k` tokens may attend."""
        positions = self.positions(k)
        return torch.arange(self.capacity, device=positions.device) <= positions.unsqueeze(1)

    def real(self, prefix: Tensor, k: int) -> Tensor:
        """`prefix` (B, T) unchanged; the causal mask hides the positions behind the tokens."""
        return prefix

    # ---- called by models of transformers --------------------------------------------------------

    def begin(self, t: int, shallow: bool = False) -> Cache:
        return self

    def begin_rest(self, t: int, depth: int, layers: int) -> Cache:
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Any:
        return self.write(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.capacity, 0
