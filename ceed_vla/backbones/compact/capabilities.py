"""The optional capabilities of the compact backbone; see `ceed_vla.backbones.capabilities`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ceed_vla.backbones.base import Prefix
from ceed_vla.backbones.capabilities import CutPrefix, check_linear
from ceed_vla.backbones.compact.layer import Layer
from ceed_vla.cache import KVCache

if TYPE_CHECKING:
    from ceed_vla.backbones.config import PolicyShape


class CompactCapabilities:
    """Mix-in of `CompactBackbone`: reads depths, cuts prefixes, and runs programs."""

    exits: dict[int, Any]
    num_layers: int
    final_norm: nn.LayerNorm
    head: nn.Linear
    shape: PolicyShape
    embed_prefix: Any
    _cache: Any
    _embed: Any
    _run: Any
    _scores: Any
    _packed: Any
    _unpacked: Any
    _packed_mask: Any

    @property
    def trunk(self) -> list[Layer]:
        """The layers."""
        raise NotImplementedError

    # ---- ReadsDepths, ComparesDepths -------------------------------------------------------------

    def shallow_logits(self, prefix: Prefix, tokens: Tensor, depth: int) -> Tensor:
        cache = prefix.cache
        block = self._embed(cache, tokens)  # (B, k, d)
        mask = cache.mask(tokens.shape[1])
        x = self._run(block, cache, mask, depth)
        return cast("Tensor", self.head(self._read(x, depth, cache, mask, [block])))

    def shallow_layers(self, depth: int) -> int:
        own = self.exits.get(depth)
        return depth + (own is not None and own.layer is not None)

    def depth_logits(
        self, prefix: Prefix, tokens: Tensor, depths: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        hidden, logits = self.first_layers(prefix, tokens, depths[-1], depths)
        return logits, hidden

    # ---- ResumesLayers ---------------------------------------------------------------------------

    def first_layers(
        self, prefix: Prefix, tokens: Tensor, depth: int, depths: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        block = self._embed(prefix.cache, tokens)  # (B, k, d)
        return self._layers_between(prefix, block, 0, depth, depths, [block])

    def last_layers(
        self, prefix: Prefix, hidden: Tensor, depth: int, depths: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        x, logits = self._layers_between(prefix, hidden, depth, self.num_layers, depths)
        return self._scores(x), logits

    def _layers_between(
        self,
        prefix: Prefix,
        x: Tensor,
        done: int,
        depth: int,
        depths: Sequence[int],
        blocks: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Run x (B, k, d) through the layers between `done` and `depth`.

        Returns:
            (B, k, d), and logits at each of the `depths` between them.
        """
        check_linear(self.exits, depths)
        cache = prefix.cache
        mask = cache.mask(x.shape[1])
        logits = []
        for end in depths:
            x = self._run(x, cache, mask, end, done)
            logits.append(self.head(self._read(x, end, cache, None, blocks)))
            done = end
        return (x if done == depth else self._run(x, cache, mask, depth, done)), logits

    # ---- TrainsDepths ----------------------------------------------------------------------------

    def packed_depth_logits(
        self, embeddings: Tensor, blocks: Sequence[Tensor], depth: int
    ) -> list[Tensor]:
        x, inputs = self._packed(embeddings, blocks, depth)
        prefix = embeddings.shape[1]
        mask = None
        if blocks:
            mask = self._packed_mask(prefix, inputs[0].shape[1], len(blocks), x.device)
        logits: list[Tensor] = self._unpacked(self._read(x, depth, None, mask, inputs), prefix)[1]
        return logits

    def _read(
        self,
        x: Tensor,
        depth: int,
        cache: KVCache | None,
        mask: Tensor | None,
        blocks: Sequence[Tensor],
    ) -> Tensor:
        """Map hidden vectors (B, t, d) behind `depth` layers to the input of the head; the last
        ones belong to the embedded `blocks`.
        """
        own = self.exits.get(depth)
        if own is None or depth == self.num_layers:
            return cast("Tensor", self.final_norm(x))
        return cast("Tensor", own.read(x, cache, mask, blocks))

    # ---- HasExits, MakesLayers -------------------------------------------------------------------

    def exit_parts(self) -> tuple[Sequence[nn.Module], nn.Module, int]:
        return self.trunk, self.final_norm, self.final_norm.normalized_shape[0]

    @cached_property
    def tokens_per_step(self) -> int | None:
        shape = self.shape
        return shape.action_tokens.build(shape.chunk_size, shape.action_dim).tokens_per_step

    def new_layer(self, width: int) -> nn.Module:
        return Layer(width, math.gcd(width, 4), 2 * width)

    # ---- CutsPrefix ------------------------------------------------------------------------------

    def prefill_to(self, observation: dict[str, Tensor], depth: int) -> CutPrefix:
        embeddings = self.embed_prefix(observation)
        cache = self._cache(embeddings)
        x = self._run(embeddings, cache, depth=depth)
        logits = self.head(self._read(x, depth, cache, None, ())[:, -1])
        cache.seal_prefix(x.shape[1], shallow=True)
        return CutPrefix(logits, cache, depth, x, state=x[:, -1])

    def extend(self, prefix: CutPrefix) -> Prefix:
        cache = prefix.cache
        length = prefix.hidden.shape[1]
        cache.unseal()
        x = self._run(prefix.hidden, cache, done=prefix.depth)
        cache.seal_prefix(length)
        return Prefix(logits=self._scores(x[:, -1]), cache=cache, state=x[:, -1])

    def continue_block(self, prefix: Prefix, hidden: Tensor, depth: int) -> Tensor:
        return self.last_layers(prefix, hidden, depth)[0]

    # ---- RunsPrograms ----------------------------------------------------------------------------

    def program_logits(self, prefix: Prefix, tokens: Tensor, program: Sequence[int]) -> Tensor:
        cache = prefix.cache
        x = self._embed(cache, tokens)
        mask = cache.mask(tokens.shape[1])
        for index in program:
            q, k, v = self.trunk[index].project(x)
            keys, values = cache.write(index, k, v)
            x = self.trunk[index].finish(x, q, keys, values, mask)
        cache.disown()
        return cast("Tensor", self._scores(x))

    # ---- ChoosesPrefix ---------------------------------------------------------------------------

    def prefix_tokens(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        may_go = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        may_go[:, -1] = False  # the state, which predicts slot 0
        return embeddings, may_go, ~may_go

    def keep_tokens(self, embeddings: Tensor, kept: Tensor) -> Tensor:
        return embeddings.gather(1, kept.unsqueeze(-1).expand(-1, -1, embeddings.shape[2]))
