"""KV caches of a prefix and one action block: append, commit, roll back.

    positions   0 ........ P ........... P + c ............ P + c + t
                | prefix   | committed   | written, not final          |
                           ^ prefix_length
                                         ^ length

`write` always starts at ``length`` and does not advance it, so the next iteration overwrites the
tokens that a Jacobi iteration rejects. A draft of several forwards through the first layers starts
each `behind` those before it. Tokens that have not passed the last layer cannot be committed. No
other file accesses the internals of a cache.

Eager code reads the written part of a cache; compiled code has a cache of constant shape
(`ceed_vla.compiled.static_cache`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ceed_vla.errors import ConfigError, TokenError


class BlockCache:
    """Base of all caches: which positions are valid, and what a decoder calls."""

    def __init__(self) -> None:
        self.length = 0
        self.prefix_length = 0
        self.ahead = 0  # positions behind `length` that the next forward leaves as they are
        # End of the positions with keys and values of all layers, final or not.
        self._written = 0

    @property
    def committed(self) -> int:
        """Block tokens whose keys and values are final."""
        return self.length - self.prefix_length

    def seal_prefix(self, t: int, shallow: bool = False) -> None:
        """Declare the first `t` positions, which were just written, the prefix.

        Args:
            t: Number of positions.
            shallow: Whether only some layers were written.

        Raises:
            TokenError: Fewer than `t` positions were written.
        """
        if not (shallow or 0 < t <= self._written):
            raise TokenError(
                f"The prefix cannot have {t} positions: {self._written} were written. Prefill "
                "first."
            )
        self.length = self.prefix_length = t

    def unseal(self) -> None:
        """Set the length to 0 but retain the keys and values, so that further layers can be
        written.
        """
        self.length = self.prefix_length = self._written = 0

    def commit(self, t: int) -> None:
        """Make the next `t` written positions final.

        Raises:
            TokenError: Fewer positions were written, or `t` is negative.
        """
        if not 0 <= t <= self._written - self.length:
            raise TokenError(
                f"Cannot commit {t} positions: {self._written - self.length} were written after "
                f"position {self.length}. Run block_logits on the tokens first."
            )
        self.length += t

    def disown(self) -> None:
        """Make the positions behind `length` uncommittable, whichever layers have written them."""
        self._written = self.length

    @contextmanager
    def behind(self, ahead: int) -> Iterator[None]:
        """A context whose forwards start `ahead` positions behind `length`, where the first layers
        hold the keys and values of these positions.
        """
        self.ahead = ahead
        try:
            yield
        finally:
            self.ahead = 0

    def roll_back(self) -> None:
        """Discard the block, so that another block can be decoded behind the prefix."""
        self.length = self._written = self.prefix_length

    def entries(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, H, length, D) of every layer; requires that no position behind
        `length` is written.
        """
        raise NotImplementedError


class KVCache(BlockCache):
    """Pre-allocated keys and values (L, B, H, T, D), written by index; it never grows.

    The layers of exits follow the model's ``L`` layers, but are written before the last of these.

    Args:
        num_layers: Layers ``L`` of the model.
        batch: Rows ``B``.
        num_kv_heads: Heads ``H`` of keys and values.
        capacity: Positions ``T``, prefix plus block.
        head_dim: Width ``D`` of a head.
        device: Device of the tensors.
        dtype: Type of the tensors.
        exits: Layers of exits.

    Raises:
        ConfigError: A size is below 1.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        exits: int = 0,
    ) -> None:
        super().__init__()
        shape = (num_layers, batch, num_kv_heads, capacity, head_dim)
        if min(shape) < 1:
            raise ConfigError(
                f"A cache of shape (L, B, H, T, D) = {shape} is empty; every size must be at "
                "least 1."
            )
        self.capacity = capacity
        self._last = num_layers - 1
        self._keys = [
            torch.empty(shape[1:], device=device, dtype=dtype) for _ in range(num_layers + exits)
        ]
        self._values = [
            torch.empty(shape[1:], device=device, dtype=dtype) for _ in range(num_layers + exits)
        ]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, t, D) of one layer at the next t positions.

        Returns:
            Views (B, H, T, D) of all keys and values up to these, in the cache's memory.

        Raises:
            TokenError: The positions exceed the capacity.
        """
        start = self.length + self.ahead
        end = start + k.shape[2]
        if end > self.capacity:
            raise TokenError(
                f"{k.shape[2]} tokens after position {start} do not fit a cache of {self.capacity} "
                "positions; a block is longer than the backbone's block_length."
            )
        keys = self._keys[layer].narrow(2, 0, end)
        values = self._values[layer].narrow(2, 0, end)
        keys.narrow(2, start, end - start).copy_(k)
        values.narrow(2, start, end - start).copy_(v)
        self._written = end if layer == self._last else self.length
        return keys, values

    def rows(self, table: Tensor, k: int) -> Tensor:
        """Rows (k, d) of `table` (n, d), which has one per slot, for the next `k` tokens."""
        start = self.committed + self.ahead
        return table[start : start + k]

    def mask(self, k: int) -> Tensor | None:
        """(k, T), True where one of the next `k` tokens may attend; None allows all."""
        if k == 1:
            return None
        start = self.length + self.ahead
        return torch.ones(k, start + k, dtype=torch.bool, device=self._keys[0].device).tril(start)

    def entries(self) -> list[tuple[Tensor, Tensor]]:
        both = zip(self._keys, self._values, strict=True)
        return [(k.narrow(2, 0, self.length), v.narrow(2, 0, self.length)) for k, v in both]


class TransformersCache(BlockCache):
    """The same interface for a ``DynamicCache`` of transformers, to which its models append."""

    def __init__(self) -> None:
        super().__init__()
        self._cache = DynamicCache()

    def begin(self, t: int, shallow: bool = False) -> DynamicCache:
        """Cut the cache to `length` for a model call.

        Args:
            t: Positions that the call appends.
            shallow: Whether it appends them to some layers only.

        Returns:
            The cache of transformers.
        """
        # Before the prefill the cache is empty, and crop(0) does nothing (transformers #47433).
        if self.length:
            self._cache.crop(self.length + self.ahead)
        self._written = self.length if shallow else self.length + t
        return self._cache

    def begin_rest(self, t: int, depth: int, layers: int) -> DynamicCache:
        """Prepare a call of the layers behind the first `depth` of all `layers`, for t positions
        that the first layers have written behind `length`.
        """
        own = self._cache.layers
        while len(own) < layers:
            own.append(DynamicLayer())
        for layer in own[depth:layers]:
            cast("Any", layer).crop(self.length)
        rest = DynamicCache()
        # A model asks the first layer how many positions are in front.
        rest.layers = [own[depth]] * depth + own[depth:]
        self._written = self.length + t
        return rest

    def slots(self, k: int, device: torch.device) -> Tensor:
        """(k,) block slots of the next `k` tokens."""
        start = self.committed + self.ahead
        return torch.arange(start, start + k, device=device)

    def real(self, prefix: Tensor, k: int) -> Tensor:
        """Attention mask (B, T) of the next `k` tokens; `prefix` (B, P) is False for padding."""
        return F.pad(prefix.long(), (0, self.committed + self.ahead + k), value=1)

    def entries(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in cast("Any", self._cache.layers)]
