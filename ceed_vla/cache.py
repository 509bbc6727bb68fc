"""KV caches of a prefix and one action block: append, commit, roll back. The only file that touches cache
internals.

    positions   0 ........ P ........... P + c ............ P + c + t
                | prefix   | committed   | written, not final          |
                           ^ prefix_length
                                         ^ length

`write` always starts at ``length`` and does not advance it, so tokens that a Jacobi iteration rejects are
simply overwritten by the next one. What has not passed the last layer cannot be committed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from ceed_vla.errors import ConfigError, TokenError


class BlockCache:
    """Which positions of a cache are valid; what a decoder needs of any cache."""

    def __init__(self) -> None:
        self.length = 0
        self.prefix_length = 0
        self._written = 0  # end of the positions that hold keys and values of all layers, final or not

    @property
    def committed(self) -> int:
        """Block tokens whose keys and values are final."""
        return self.length - self.prefix_length

    def seal_prefix(self, t: int) -> None:
        """Declare the first `t` positions, just written, the prefix.

        Raises:
            TokenError: Fewer than `t` positions were written.
        """
        if not 0 < t <= self._written:
            raise TokenError(f"The prefix cannot have {t} positions: {self._written} were written. Prefill first.")
        self.length = self.prefix_length = t

    def commit(self, t: int) -> None:
        """Make the next `t` written positions final; they are not recomputed any more.

        Raises:
            TokenError: Negative `t`, or fewer than `t` positions were written after `length`.
        """
        if not 0 <= t <= self._written - self.length:
            raise TokenError(
                f"Cannot commit {t} positions: {self._written - self.length} were written after position "
                f"{self.length}. Run block_logits on the tokens first."
            )
        self.length += t

    def roll_back(self) -> None:
        """Forget the block and keep the prefix, ready to decode another block behind it."""
        self.length = self._written = self.prefix_length


class KVCache(BlockCache):
    """Pre-allocated keys and values (L, B, H, T, D), written by index; never grows.

    Args:
        num_layers: Layers ``L``.
        batch: Rows ``B``.
        num_kv_heads: Key/value heads ``H``.
        capacity: Positions ``T``: prefix plus block.
        head_dim: Width ``D`` of a head.
        device: Where the cache lives.
        dtype: Type of keys and values.

    Raises:
        ConfigError: A size below 1.
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
    ) -> None:
        super().__init__()
        shape = (num_layers, batch, num_kv_heads, capacity, head_dim)
        if min(shape) < 1:
            raise ConfigError(f"A cache of shape (L, B, H, T, D) = {shape} is empty; every size must be at least 1.")
        self.capacity = capacity
        self._keys = [torch.empty(shape[1:], device=device, dtype=dtype) for _ in range(num_layers)]
        self._values = [torch.empty(shape[1:], device=device, dtype=dtype) for _ in range(num_layers)]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, t, D) of one layer at positions ``[length, length + t)``.

        Returns:
            Views (B, H, length + t, D) of all keys and values up to there. They share memory with the cache.

        Raises:
            TokenError: The positions lie past the capacity.
        """
        start, end = self.length, self.length + k.shape[2]
        if end > self.capacity:
            raise TokenError(
                f"{k.shape[2]} tokens after position {start} do not fit a cache of {self.capacity} "
                "positions; a block is longer than the backbone's block_length."
            )
        keys, values = self._keys[layer].narrow(2, 0, end), self._values[layer].narrow(2, 0, end)
        keys.narrow(2, start, end - start).copy_(k)
        values.narrow(2, start, end - start).copy_(v)
        self._written = end if layer == len(self._keys) - 1 else start
        return keys, values


class TransformersCache(BlockCache):
    """The same interface over a transformers ``DynamicCache``, which its models append to by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._cache = DynamicCache()

    def begin(self, t: int, shallow: bool = False) -> DynamicCache:
        """The cache, cut to `length`, for a model call that appends `t` positions; to some layers only if `shallow`."""
        # An empty cache, before the prefill, needs no cut; crop(0) is a no-op anyway (transformers #47433).
        if self.length:
            self._cache.crop(self.length)
        self._written = self.length if shallow else self.length + t
        return self._cache
