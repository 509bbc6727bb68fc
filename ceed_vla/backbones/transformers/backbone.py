r"""What the models of transformers share: a language model that continues a prefix of embeddings on
a cache.

    PrefixEmbeddings (B, P, d) --decoder--> cache, hidden (B, d) --score--> action token 0
                                                |
    tokens (B, k) --embed_tokens--> (B, k, d) --+--decoder--> (B, k, d) --score--> their successors
    (B, k, V)

A family says how an observation becomes `PrefixEmbeddings`, and where decoder and head are.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ceed_vla.backbones.base import Prefix, TrainableBackbone, check_depth, runs
from ceed_vla.backbones.exits import DepthExit, check_linear
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings, TransformersPrefix
from ceed_vla.cache import TransformersCache
from ceed_vla.errors import CheckpointError, ConfigError, ObservationError, TokenError
from ceed_vla.weights import copy_weights, weight_files


class TransformersBackbone(TrainableBackbone):
    """A language model of transformers behind the `Backbone` protocol.

    `action_ids` (V,) are the vocabulary ids of the tokens; None where a token is any id.
    """

    compilable = ("block",)
    action_ids: Tensor | None
    # weights that a published folder may lack, with those that they then equal
    copies: Mapping[str, str] = {}

    def __init__(self, block_length: int, vocabulary_size: int, action_ids: Tensor | None) -> None:
        super().__init__()
        self.block_length, self.vocabulary_size = block_length, vocabulary_size
        self.register_buffer("action_ids", action_ids, persistent=False)

    @property
    def pretrained(self) -> PreTrainedModel:
        """The model with its head."""
        return cast("PreTrainedModel", self.language_model)

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head; its layers are ``decoder.layers``."""
        return cast("nn.Module", cast("Any", self.language_model).model)

    @property
    def num_layers(self) -> int:  # type: ignore[override]
        return len(cast("nn.ModuleList", self.decoder.layers))

    @abc.abstractmethod
    def embed_prefix(self, batch: dict[str, Tensor]) -> PrefixEmbeddings:
        """What the language model reads before the block."""

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, k, d) of action tokens (B, k)."""
        ids = tokens if self.action_ids is None else self.action_ids[tokens]
        return cast("Tensor", cast("PreTrainedModel", self.decoder).get_input_embeddings()(ids))

    def score(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of the action tokens behind hidden vectors (..., d)."""
        head = cast("nn.Linear", self.pretrained.get_output_embeddings())
        if self.action_ids is None:
            return head(hidden)  # type: ignore[no-any-return]
        bias = None if head.bias is None else head.bias[self.action_ids]
        return F.linear(hidden, head.weight[self.action_ids], bias)

    def prefill(self, observation: dict[str, Tensor]) -> TransformersPrefix:
        """Run the prefix of every row once; rows may have prompts of different lengths."""
        return self.prefill_embeddings(self.embed_prefix(observation))

    def prefix_tokens(self, embeddings: PrefixEmbeddings) -> tuple[Tensor, Tensor, Tensor]:
        if embeddings.patches is None:
            raise ConfigError(
                f"{type(self).__name__} marks no image patches, so all run; leave out keep<K>."
            )
        return embeddings.embeds, embeddings.patches, embeddings.real & ~embeddings.patches

    def keep_tokens(self, embeddings: PrefixEmbeddings, kept: Tensor) -> PrefixEmbeddings:
        # those of `in_order`
        inputs = {name: value.gather(1, kept) for name, value in embeddings.inputs.items()}
        rows = torch.arange(len(embeddings), device=kept.device).unsqueeze(1)
        real = embeddings.real.gather(1, kept)
        return PrefixEmbeddings(
            embeddings.embeds[rows, kept], real, embeddings.next_position, inputs
        )

    def prefill_embeddings(self, embeddings: PrefixEmbeddings) -> TransformersPrefix:
        """`prefill` from what `embed_prefix` made."""
        cache = TransformersCache()
        real = embeddings.real
        # some rotary embeddings depend on how many positions there are
        config: Any = self.decoder.config
        rope = getattr(config, "rope_parameters", None) or {}
        kind = rope.get("rope_type")
        length = real.shape[1]
        most = config.max_position_embeddings
        # which only changes once, where there is more than it was trained on first
        if kind == "longrope":
            most = rope.get("original_max_position_embeddings") or most
        changes = kind == "dynamic" or (kind == "longrope" and length <= most)
        if changes and length + self.block_length > most:
            raise ConfigError(
                f"The prompt has {length} positions and the block {self.block_length}; behind "
                f"{most} this model's rope_scaling ({kind}) changes all positions, so keys and "
                "values cannot be kept. Use another model."
            )
        # The exits' own layers see the prefix too, with what the layer before is called with.
        with _behind(
            self.decoder,
            [(depth, e.layer) for depth, e in self.exits.items() if e.layer is not None],
        ):
            # (B, d)
            hidden = self._run(embeddings.embeds, cache.begin(real.shape[1]), embeddings.inputs)[
                :, -1
            ]
        cache.seal_prefix(real.shape[1])
        padding = None if bool(real.all()) else real
        return TransformersPrefix(
            self.score(hidden), cache, hidden, padding, embeddings.next_position
        )

    def block_logits(self, prefix: Prefix, tokens: Tensor, depth: int | None = None) -> Tensor:
        if not isinstance(prefix, TransformersPrefix):
            raise TokenError(
                f"The prefix is a {type(prefix).__name__}; {type(self).__name__} continues its own "
                "only."
            )
        return self.score(self._block_hidden(prefix, tokens, check_depth(depth, self.num_layers)))

    def depth_logits(
        self, prefix: Prefix, tokens: Tensor, depths: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        check_linear(self.exits, depths)
        kept: list[Tensor] = []
        with _behind(self.decoder, [(depth, lambda x, **_: kept.append(x)) for depth in depths]):
            self._block_hidden(cast("TransformersPrefix", prefix), tokens, depths[-1])
        norms = (self.exits.get(depth, cast("nn.Module", self.decoder.norm)) for depth in depths)
        read = [norm(x) for norm, x in zip(norms, kept, strict=True)]
        return [self.score(x[0] if isinstance(x, tuple) else x) for x in read], kept[-1]

    def _block_hidden(
        self, prefix: TransformersPrefix, tokens: Tensor, depth: int | None = None
    ) -> Tensor:
        """Hidden vectors (B, k, d) behind the committed tokens, from the first `depth` layers."""
        cache = prefix.cache
        k = tokens.shape[1]
        # The number of committed tokens would be a constant of a compiled forward.
        if isinstance(cache, TransformersCache) and cache.committed + k > self.block_length:
            raise TokenError(
                f"{k} tokens after {cache.committed} committed exceed the block of "
                f"{self.block_length}."
            )
        # (B, k)
        inputs = {"position_ids": prefix.next_position.unsqueeze(1) + cache.slots(k, tokens.device)}
        if prefix.real is not None:
            inputs["attention_mask"] = cache.real(prefix.real, k)
        embeds = self.embed_tokens(tokens)
        if depth is None or depth == self.num_layers:
            return self._run(embeds, cache.begin(k), inputs)
        own = self.exits.get(depth)
        if own is not None and isinstance(cache, TransformersCache):
            own.check(cache.committed)
        with _first_layers(self.decoder, depth, own):
            return self._run(embeds, cache.begin(k, shallow=True), inputs)

    def _run(self, embeds: Tensor, cache: Any, inputs: dict[str, Any]) -> Tensor:
        """Hidden vectors (B, t, d) of embeddings (B, t, d), whose keys and values are appended to
        the cache.
        """
        with runs(self.pretrained):
            output = self.decoder(
                inputs_embeds=embeds, past_key_values=cache, use_cache=cache is not None, **inputs
            )
        return cast("Tensor", output.last_hidden_state)

    def packed_logits(
        self, embeddings: PrefixEmbeddings, blocks: Sequence[Tensor], depth: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        if self.training and self.pretrained.is_gradient_checkpointing and depth is None:
            return self._packed_without_cache(embeddings, blocks)
        prefix = self.prefill_embeddings(embeddings)
        logits = []
        for block in blocks:
            prefix.cache.roll_back()
            hidden = [prefix.hidden.unsqueeze(1)]
            if block.shape[1] > 1:
                hidden.append(self._block_hidden(prefix, block[:, :-1], depth))
            logits.append(self.score(torch.cat(hidden, dim=1)))  # (B, n, V)
        return prefix.hidden, logits

    def _packed_without_cache(
        self, embeddings: PrefixEmbeddings, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The same where layers run again in the backward pass, which would fill a cache twice."""
        length = embeddings.embeds.shape[1]
        logits = []
        for block in blocks or [embeddings.real.new_empty(len(embeddings), 1, dtype=torch.int64)]:
            inputs = embeddings.joined(self.embed_tokens(block[:, :-1]))
            # (B, n, d)
            hidden = self._run(inputs.pop("inputs_embeds"), None, inputs)[:, length - 1 :]
            logits.append(self.score(hidden))
        return hidden[:, 0], logits[: len(blocks)]

    def exit_parts(self) -> tuple[Sequence[nn.Module], nn.Module, int]:
        model = cast("Any", self.decoder)
        return list(model.layers), model.norm, int(model.config.hidden_size)

    def recompute_activations(self) -> None:
        if not self.pretrained.supports_gradient_checkpointing:
            super().recompute_activations()
        self.pretrained.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    def distillation_parameters(self) -> list[str]:
        """The language model's layers and an untied head. Embeddings make the prefix, and stay."""
        frozen = {id(p) for p in self.pretrained.get_input_embeddings().parameters()}
        learns = {id(p) for p in self.decoder.parameters()}
        learns |= {id(p) for p in self.pretrained.get_output_embeddings().parameters()}
        return [name for name, p in self.named_parameters() if id(p) in learns - frozen]

    def own_name(self, published: str) -> str:
        """The name here of a published weight; empty for one that is not read."""
        return published

    @torch.no_grad()
    def fill(self, folder: Path, *, new: bool, reference: bool) -> None:
        """Read all weights of a published folder, of a `new` model or by `reference`: these stay
        there.

        `CheckpointError` for weights that are missing or unknown; see `copy_weights`.
        """
        if not (new or reference):
            return
        own = self.state_dict()
        files = weight_files(folder)
        missing, unknown = copy_weights(
            self, files, self.own_name, lambda name: not self.own_name(name)
        )
        for name, source in self.copies.items():
            if name in missing and source not in missing:
                own[name].copy_(own[source])
                missing.remove(name)
        for problem, names in (("lacks", missing), ("has", unknown)):
            if names:
                raise CheckpointError(
                    f"{folder} {problem} {len(names)} weights (the first is {names[0]}), by what "
                    "config.json describes; a shard is missing, or configuration and weights "
                    "belong to different models."
                )
        if reference:
            self.refer()

    def refer(self) -> None:
        """Freeze the weights: checkpoints leave them in the folder they were read from."""
        self.requires_grad_(False)
        self.referenced = list(self.state_dict())


def check_left_padding(batch: Mapping[str, Any], ids: str, mask: str) -> None:
    """Raise `ObservationError` unless the mask of prompts (B, L) marks padding on the left."""
    marks = batch[mask]
    if marks.shape != batch[ids].shape or not bool(marks[:, -1].all()):
        raise ObservationError(
            f"{mask} {tuple(marks.shape)} does not mark left padding of {tuple(batch[ids].shape)} "
            "ids: every prompt must end in the last column."
        )


@contextmanager
def _first_layers(decoder: nn.Module, depth: int, own: DepthExit | None) -> Iterator[None]:
    """Leave out the layers behind the first `depth`; the exit of that depth follows these, or else
    the final norm.
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
def _behind(decoder: nn.Module, found: Sequence[tuple[int, Callable[..., Any]]]) -> Iterator[None]:
    """Call each function with the hidden vectors (B, t, d) behind so many layers, and the options
    of the last one.
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
