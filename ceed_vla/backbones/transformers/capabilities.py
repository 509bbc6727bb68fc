"""Optional capabilities of the models of transformers; see `ceed_vla.backbones.capabilities`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ceed_vla.backbones.base import Prefix
from ceed_vla.backbones.capabilities import check_linear
from ceed_vla.backbones.transformers.prefix import (
    PrefixEmbeddings,
    TransformersCutPrefix,
    TransformersPrefix,
)
from ceed_vla.cache import TransformersCache
from ceed_vla.errors import ConfigError


class TransformersCapabilities:
    """Mix-in of `TransformersBackbone`: reads depths, has exits, cuts and chooses prefixes,
    and runs programs.
    """

    decoder: Any
    exits: dict[int, Any]
    num_layers: int
    score: Any
    embed_prefix: Any
    embed_tokens: Any
    prefill_embeddings: Any
    _own: Any
    _run: Any
    _block_hidden: Any
    _block_inputs: Any
    _block_scores: Any

    # ---- ReadsDepths, ComparesDepths -------------------------------------------------------------

    def shallow_logits(self, prefix: Prefix, tokens: Tensor, depth: int) -> Tensor:
        hidden = self._shallow_hidden(self._own(prefix), tokens, depth=depth)
        return cast("Tensor", self.score(hidden))

    def _shallow_hidden(self, prefix: TransformersPrefix, tokens: Tensor, *, depth: int) -> Tensor:
        """Hidden vectors (B, k, d) of the next `tokens` (B, k), behind the first `depth` layers and
        their exit.
        """
        if depth == self.num_layers:
            return cast("Tensor", self._block_hidden(prefix, tokens))
        reader = self.exits.get(depth)
        if reader is not None and isinstance(prefix.cache, TransformersCache):
            reader.check(prefix.cache.committed)
        return self._first(prefix, tokens, depth, reader)

    def _first(
        self, prefix: TransformersPrefix, tokens: Tensor, depth: int, reader: Any = None
    ) -> Tensor:
        """Hidden vectors (B, k, d) of the next `tokens` (B, k) behind the first `depth` layers and
        the exit `reader`, or else the last norm.
        """
        inputs = self._block_inputs(prefix, tokens.shape[1])
        embeds = self.embed_tokens(tokens)
        with _first_layers(self.decoder, depth, reader):
            cache = prefix.cache.begin(tokens.shape[1], shallow=True)
            return cast("Tensor", self._run(embeds, cache, inputs))

    def shallow_layers(self, depth: int) -> int:
        reader = self.exits.get(depth)
        return depth + (reader is not None and reader.layer is not None)

    def depth_logits(
        self, prefix: Prefix, tokens: Tensor, depths: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        hidden, logits = self.first_layers(prefix, tokens, depths[-1], depths)
        return logits, hidden

    # ---- ResumesLayers, CutsPrefix ---------------------------------------------------------------

    def first_layers(
        self, prefix: Prefix, tokens: Tensor, depth: int, depths: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        check_linear(self.exits, depths)
        with self._read_behind(depths) as logits:
            found: list[Tensor] = []
            with _behind(self.decoder, [(depth, lambda x, **_: found.append(x))]):
                self._first(self._own(prefix), tokens, depth)
        return found[0], logits

    def last_layers(
        self, prefix: Prefix, hidden: Tensor, depth: int, depths: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        check_linear(self.exits, depths)
        own, k = self._own(prefix), hidden.shape[1]
        inputs = self._block_inputs(own, k)
        with self._read_behind(depths) as logits:
            x = self._last(hidden, own.cache.begin_rest(k, depth, self.num_layers), inputs, depth)
        return self.score(x), logits

    def _last(self, hidden: Tensor, cache: Any, inputs: dict[str, Any], depth: int) -> Tensor:
        """Run hidden vectors (B, t, d) through the layers behind `depth`, and the last norm."""
        with _last_layers(self.decoder, depth, hidden):
            return cast("Tensor", self._run(hidden, cache, inputs))

    @contextmanager
    def _read_behind(self, depths: Sequence[int]) -> Iterator[list[Tensor]]:
        """A context that appends the logits (B, t, V) at each of the ascending `depths`."""
        logits: list[Tensor] = []

        def read(depth: int, x: Tensor, **_: Any) -> None:
            found = self.exits.get(depth, self.decoder.norm)(x)
            logits.append(self.score(found[0] if isinstance(found, tuple) else found))

        with _behind(self.decoder, [(depth, partial(read, depth)) for depth in depths]):
            yield logits

    def prefill_to(self, observation: dict[str, Tensor], depth: int) -> TransformersCutPrefix:
        embeddings: PrefixEmbeddings = self.embed_prefix(observation)
        length = embeddings.real.shape[1]
        cache = TransformersCache()
        found: list[Tensor] = []
        with (
            self._read_behind([depth]) as logits,
            _behind(self.decoder, [(depth, lambda x, **_: found.append(x))]),
            _first_layers(self.decoder, depth, None),
        ):
            self._run(embeddings.embeds, cache.begin(length, shallow=True), embeddings.inputs)
        cache.seal_prefix(length, shallow=True)
        return TransformersCutPrefix(
            logits=logits[0][:, -1],
            cache=cache,
            depth=depth,
            hidden=found[0],
            state=found[0][:, -1],
            real=None if bool(embeddings.real.all()) else embeddings.real,
            next_position=embeddings.next_position,
            inputs=embeddings.inputs,
        )

    def extend(self, prefix: TransformersCutPrefix) -> TransformersPrefix:
        cache, length = prefix.cache, prefix.hidden.shape[1]
        cache.unseal()
        rest = cache.begin_rest(length, prefix.depth, self.num_layers)
        hidden = self._last(prefix.hidden, rest, prefix.inputs, prefix.depth)[:, -1]
        cache.seal_prefix(length)
        return TransformersPrefix(
            self.score(hidden), cache, prefix.real, prefix.next_position, state=hidden
        )

    def continue_block(self, prefix: Prefix, hidden: Tensor, depth: int) -> Tensor:
        return self.last_layers(prefix, hidden, depth)[0]

    # ---- RunsPrograms ----------------------------------------------------------------------------

    def program_logits(self, prefix: Prefix, tokens: Tensor, program: Sequence[int]) -> Tensor:
        own, k = self._own(prefix), tokens.shape[1]
        inputs, embeds = self._block_inputs(own, k), self.embed_tokens(tokens)
        with _input_alone(self.decoder) as found:  # some models scale embeddings
            self._run(embeds, own.cache.begin(k, shallow=True), inputs)
        for first, end in _runs_of_layers(program):
            x = found[-1]
            cache = own.cache.begin_rest(k, first, self.num_layers)
            with (
                _behind(self.decoder, [(end, lambda y, **_: found.append(y))]),
                _first_layers(self.decoder, end, None),
            ):
                normed = self._last(x, cache, inputs, first)
        own.cache.disown()
        return cast("Tensor", self.score(normed))

    # ---- TrainsDepths ----------------------------------------------------------------------------

    def packed_depth_logits(
        self, embeddings: PrefixEmbeddings, blocks: Sequence[Tensor], depth: int
    ) -> list[Tensor]:
        prefix = self._prefix_read_at(embeddings, depth)
        forward = partial(self._shallow_hidden, depth=depth)
        return [self._block_scores(prefix, block, forward) for block in blocks]

    def _prefix_read_at(self, embeddings: PrefixEmbeddings, depth: int) -> TransformersPrefix:
        """The prefix whose state is that of the exit behind `depth` layers, as in `prefill_to`; of
        all layers without an exit there, or with one that has a layer of its own.
        """
        own = self.exits.get(depth)
        if own is None or own.layer is not None:
            return cast("TransformersPrefix", self.prefill_embeddings(embeddings))
        last: list[Tensor] = []  # (B, 1, d)
        with _behind(self.decoder, [(depth, lambda x, **_: last.append(x[:, -1:]))]):
            prefix = self.prefill_embeddings(embeddings)
        read = own(last[0])
        return replace(prefix, state=(read[0] if isinstance(read, tuple) else read)[:, 0])

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


def _runs_of_layers(program: Sequence[int]) -> list[tuple[int, int]]:
    """First layer and end of every longest run of a program in which layers follow one another."""
    starts = [0, *(i for i in range(1, len(program)) if program[i] != program[i - 1] + 1)]
    ends = [*starts[1:], len(program)]
    return [(program[start], program[end - 1] + 1) for start, end in zip(starts, ends, strict=True)]


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
def _input_alone(decoder: Any) -> Iterator[list[Tensor]]:
    """Run no layer; the list gets what the first layer would have read (B, t, d)."""
    found: list[Tensor] = []

    def take(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments[0])

    layers = cast("nn.ModuleList", decoder.layers)
    handle = decoder.norm.register_forward_pre_hook(take)
    decoder.layers = layers[:0]
    try:
        yield found
    finally:
        handle.remove()
        decoder.layers = layers


@contextmanager
def _last_layers(decoder: Any, depth: int, hidden: Tensor) -> Iterator[None]:
    """Skip the first `depth` layers; the one behind them reads `hidden` (B, t, d).

    All layers keep their places, by which some models choose masks, or add features of images
    behind a layer.
    """
    layers = cast("nn.ModuleList", decoder.layers)

    def check(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Pass `hidden` on where the model changed it: as the entry of a tuple that it expected, or
        before its first layer.
        """
        named = "hidden_states" in options
        read = options["hidden_states"] if named else arguments[0]
        if depth and read.shape == hidden.shape:  # perhaps with features of images
            return None
        if named:
            return arguments, {**options, "hidden_states": hidden}
        return (hidden, *arguments[1:]), options

    own = [vars(layer).get("forward") for layer in layers[:depth]]
    for layer in layers[:depth]:
        layer.forward = lambda *_, **__: hidden
    handle = layers[depth].register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for layer, forward in zip(layers[:depth], own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


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
