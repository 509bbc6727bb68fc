"""Optional capabilities of the models of transformers; see `ceed_vla.backbones.capabilities`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ceed_vla.backbones.base import Prefix
from ceed_vla.backbones.capabilities import check_linear
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings, TransformersPrefix
from ceed_vla.cache import TransformersCache
from ceed_vla.errors import ConfigError


class TransformersCapabilities:
    """Mix-in of `TransformersBackbone`: reads depths, has exits, and chooses prefix tokens."""

    decoder: Any
    exits: dict[int, Any]
    num_layers: int
    score: Any
    prefill_embeddings: Any
    _own: Any
    _run: Any
    _block_hidden: Any
    _block_inputs: Any
    _block_scores: Any

    # ---- ReadsDepths, ComparesDepths, TrainsDepths -----------------------------------------------

    def shallow_logits(self, prefix: Prefix, tokens: Tensor, depth: int) -> Tensor:
        hidden = self._shallow_hidden(self._own(prefix), tokens, depth=depth)
        return cast("Tensor", self.score(hidden))

    def _shallow_hidden(self, prefix: TransformersPrefix, tokens: Tensor, *, depth: int) -> Tensor:
        """Hidden vectors (B, k, d) of the next `tokens` (B, k), behind the first `depth` layers and
        their exit.
        """
        if depth == self.num_layers:
            return cast("Tensor", self._block_hidden(prefix, tokens))
        embeds, inputs = self._block_inputs(prefix, tokens)
        reader = self.exits.get(depth)
        if reader is not None and isinstance(prefix.cache, TransformersCache):
            reader.check(prefix.cache.committed)
        with _first_layers(self.decoder, depth, reader):
            cache = prefix.cache.begin(tokens.shape[1], shallow=True)
            return cast("Tensor", self._run(embeds, cache, inputs))

    def shallow_layers(self, depth: int) -> int:
        reader = self.exits.get(depth)
        return depth + (reader is not None and reader.layer is not None)

    def depth_logits(
        self, prefix: Prefix, tokens: Tensor, depths: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        check_linear(self.exits, depths)
        found: list[Tensor] = []
        with _behind(self.decoder, [(depth, lambda x, **_: found.append(x)) for depth in depths]):
            self._shallow_hidden(self._own(prefix), tokens, depth=depths[-1])
        norms = (self.exits.get(depth, self.decoder.norm) for depth in depths)
        read = [norm(x) for norm, x in zip(norms, found, strict=True)]
        return [self.score(x[0] if isinstance(x, tuple) else x) for x in read], found[-1]

    def packed_depth_logits(
        self, embeddings: PrefixEmbeddings, blocks: Sequence[Tensor], depth: int
    ) -> list[Tensor]:
        prefix = self.prefill_embeddings(embeddings)
        forward = partial(self._shallow_hidden, depth=depth)
        return [self._block_scores(prefix, block, forward) for block in blocks]

    # ---- HasExits --------------------------------------------------------------------------------

    def exit_parts(self) -> tuple[Sequence[nn.Module], nn.Module, int]:
        return list(self.decoder.layers), self.decoder.norm, int(self.decoder.config.hidden_size)

    def exits_see_prefix(self) -> AbstractContextManager[None]:
        """A context in which the exits' own layers run on the prefix too, with the arguments of the
        layer before them.
        """
        own = [(depth, e.layer) for depth, e in self.exits.items() if e.layer is not None]
        return _behind(self.decoder, own)

    # ---- ChoosesPrefix ---------------------------------------------------------------------------

    def prefix_tokens(self, embeddings: PrefixEmbeddings) -> tuple[Tensor, Tensor, Tensor]:
        if embeddings.patches is None:
            raise ConfigError(
                f"{type(self).__name__} has no image patches to drop; leave out keep<K>."
            )
        return embeddings.embeds, embeddings.patches, embeddings.real & ~embeddings.patches

    def keep_tokens(self, embeddings: PrefixEmbeddings, kept: Tensor) -> PrefixEmbeddings:
        # All inputs have one entry per token (`PrefixEmbeddings.in_order`).
        inputs = {name: value.gather(1, kept) for name, value in embeddings.inputs.items()}
        rows = torch.arange(len(embeddings), device=kept.device).unsqueeze(1)
        real = embeddings.real.gather(1, kept)
        return PrefixEmbeddings(
            embeddings.embeds[rows, kept], real, embeddings.next_position, inputs
        )


@contextmanager
def _first_layers(decoder: Any, depth: int, own: Any) -> Iterator[None]:
    """Skip the layers behind the first `depth`; the exit of that depth follows, or else the final
    norm.
    """
    layers = cast("nn.ModuleList", decoder.layers)
    norm = decoder.norm
    decoder.layers = layers[:depth]
    if own is not None:
        decoder.norm = own
        if own.layer is not None:
            decoder.layers.append(own.layer)
    try:
        yield
    finally:
        decoder.layers, decoder.norm = layers, norm


@contextmanager
def _behind(decoder: Any, found: Sequence[tuple[int, Callable[..., Any]]]) -> Iterator[None]:
    """Call functions with intermediate hidden vectors of every forward.

    Args:
        decoder: The language model.
        found: Pairs of a depth and a function, which is called with the hidden vectors (B, t, d)
            behind that many layers, and the keyword arguments of the last of these layers.
    """

    def run(
        function: Callable[..., Any], _: nn.Module, __: Any, options: dict[str, Any], output: Any
    ) -> None:
        function(output[0] if isinstance(output, tuple) else output, **options)

    layers = cast("nn.ModuleList", decoder.layers)
    handles = [
        layers[depth - 1].register_forward_hook(partial(run, f), with_kwargs=True)
        for depth, f in found
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
