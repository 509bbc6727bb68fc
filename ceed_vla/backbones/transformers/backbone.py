r"""Base of the models of transformers: a language model that continues a prefix of embeddings with
a cache.

    PrefixEmbeddings (B, P, d) --decoder--> cache, hidden (B, d) --score--> action token 0
                                                |
    tokens (B, k) --embed_tokens--> (B, k, d) --+--decoder--> (B, k, d) --score--> (B, k, V)

A family defines how an observation becomes `PrefixEmbeddings`, and where decoder and head are.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ceed_vla.backbones.base import Prefix, TrainableBackbone, runs
from ceed_vla.backbones.transformers.capabilities import TransformersCapabilities
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings, TransformersPrefix
from ceed_vla.cache import TransformersCache
from ceed_vla.errors import CheckpointError, ConfigError, ObservationError, TokenError
from ceed_vla.weights import copy_weights, weight_files


class TransformersBackbone(TransformersCapabilities, TrainableBackbone):
    """A language model of transformers with the `Backbone` protocol.

    Attributes:
        action_ids: (V,) vocabulary ids of the action tokens; None if a token can be any id.
        copies: Weights that a published folder may lack -> the weights that they then equal.
    """

    compilable = ("block",)
    action_ids: Tensor | None
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
        """Embed everything that the language model reads before the block."""

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, k, d) of action tokens (B, k)."""
        ids = tokens if self.action_ids is None else self.action_ids[tokens]
        return cast("Tensor", cast("PreTrainedModel", self.decoder).get_input_embeddings()(ids))

    def score(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the action tokens from hidden vectors (..., d)."""
        if self.action_ids is None:
            head = cast("nn.Linear", self.pretrained.get_output_embeddings())
            return head(hidden)  # type: ignore[no-any-return]
        return F.linear(hidden, *self.head_rows())

    def head_rows(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, d) and bias (V,) of the action tokens in the head."""
        head = cast("nn.Linear", self.pretrained.get_output_embeddings())
        ids = slice(None) if self.action_ids is None else self.action_ids
        return head.weight[ids], None if head.bias is None else head.bias[ids]

    def prefill(self, observation: dict[str, Tensor]) -> TransformersPrefix:
        """Run the prefix of every row once; rows may have prompts of different lengths."""
        return self.prefill_embeddings(self.embed_prefix(observation))

    def prefill_embeddings(self, embeddings: PrefixEmbeddings) -> TransformersPrefix:
        """`prefill` from the result of `embed_prefix`."""
        cache = TransformersCache()
        real = embeddings.real
        # Some rotary embeddings depend on the number of positions.
        config: Any = self.decoder.config
        rope = getattr(config, "rope_parameters", None) or {}
        kind = rope.get("rope_type")
        length = real.shape[1]
        most = config.max_position_embeddings
        # "longrope" changes once, behind the length of the original training.
        if kind == "longrope":
            most = rope.get("original_max_position_embeddings") or most
        changes = kind == "dynamic" or (kind == "longrope" and length <= most)
        if changes and length + self.block_length > most:
            raise ConfigError(
                f"The prompt has {length} positions and the block {self.block_length}; behind "
                f"{most} this model's rope_scaling ({kind}) changes all positions, so a cache is "
                "invalid. Use another model."
            )
        with self.exits_see_prefix():
            x = self._run(embeddings.embeds, cache.begin(real.shape[1]), embeddings.inputs)
        hidden = x[:, -1]  # (B, d)
        cache.seal_prefix(real.shape[1])
        padding = None if bool(real.all()) else real
        return TransformersPrefix(
            self.score(hidden),
            cache,
            padding,
            embeddings.next_position,
            state=hidden,
            more_layers=sum(own.layer is not None for own in self.exits.values()),
        )

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        return self.score(self._block_hidden(self._own(prefix), tokens))

    def _block_hidden(self, prefix: TransformersPrefix, tokens: Tensor) -> Tensor:
        """Hidden vectors (B, k, d) of the next `tokens` (B, k) of a block."""
        k = tokens.shape[1]
        inputs = self._block_inputs(prefix, k)
        return self._run(self.embed_tokens(tokens), prefix.cache.begin(k), inputs)

    def _own(self, prefix: Prefix) -> TransformersPrefix:
        """Return the prefix; `TokenError` if it belongs to another model."""
        if not isinstance(prefix, TransformersPrefix):
            raise TokenError(
                f"The prefix is a {type(prefix).__name__}; it must come from the prefill of this "
                f"{type(self).__name__}."
            )
        return prefix

    def _block_inputs(self, prefix: TransformersPrefix, k: int) -> dict[str, Any]:
        """Arguments of the language model, besides embeddings, for the next `k` block tokens."""
        cache = prefix.cache
        # Compiled code would treat the number of committed tokens as a constant.
        if (
            isinstance(cache, TransformersCache)
            and cache.committed + cache.ahead + k > self.block_length
        ):
            raise TokenError(
                f"{k} tokens after {cache.committed + cache.ahead} others exceed the block of "
                f"{self.block_length}."
            )
        device = prefix.next_position.device
        positions = prefix.next_position.unsqueeze(1) + cache.slots(k, device)  # (B, k)
        inputs: dict[str, Any] = {"position_ids": positions}
        if prefix.real is not None:
            inputs["attention_mask"] = cache.real(prefix.real, k)
        return inputs

    def _run(self, embeds: Tensor, cache: Any, inputs: dict[str, Any]) -> Tensor:
        """Run the language model; keys and values are appended to the cache.

        Args:
            embeds: (B, t, d).
            cache: A cache of transformers, or None.
            inputs: The other arguments.

        Returns:
            Hidden vectors (B, t, d).
        """
        with runs(self.pretrained):
            output = self.decoder(
                inputs_embeds=embeds, past_key_values=cache, use_cache=cache is not None, **inputs
            )
        return cast("Tensor", output.last_hidden_state)

    def packed_logits(
        self, embeddings: PrefixEmbeddings, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        if self.training and self.pretrained.is_gradient_checkpointing:
            return self._packed_without_cache(embeddings, blocks)
        prefix = self.prefill_embeddings(embeddings)
        return cast("Tensor", prefix.state), [
            self._block_scores(prefix, block, self._block_hidden) for block in blocks
        ]

    def _block_scores(
        self,
        prefix: TransformersPrefix,
        block: Tensor,
        forward: Callable[[TransformersPrefix, Tensor], Tensor],
    ) -> Tensor:
        """Logits (B, n, V) of a `block` (B, n).

        The prefix predicts slot 0; the hidden vectors that `forward` computes from the tokens
        predict the other slots.
        """
        prefix.cache.roll_back()
        hidden = [cast("Tensor", prefix.state).unsqueeze(1)]
        if block.shape[1] > 1:
            hidden.append(forward(prefix, block[:, :-1]))
        return self.score(torch.cat(hidden, dim=1))

    def _packed_without_cache(
        self, embeddings: PrefixEmbeddings, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """As `packed_logits`, without a cache: gradient checkpointing would fill it twice."""
        length = embeddings.embeds.shape[1]
        logits = []
        for block in blocks or [embeddings.real.new_empty(len(embeddings), 1, dtype=torch.int64)]:
            inputs = embeddings.joined(self.embed_tokens(block[:, :-1]))
            # (B, n, d)
            hidden = self._run(inputs.pop("inputs_embeds"), None, inputs)[:, length - 1 :]
            logits.append(self.score(hidden))
        return hidden[:, 0], logits[: len(blocks)]

    def recompute_activations(self) -> None:
        if not self.pretrained.supports_gradient_checkpointing:
            super().recompute_activations()
        self.pretrained.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    def distillation_parameters(self) -> list[str]:
        """The language model's layers and an untied head, without the embeddings of the prefix."""
        frozen = {id(p) for p in self.pretrained.get_input_embeddings().parameters()}
        learns = {id(p) for p in self.decoder.parameters()}
        learns |= {id(p) for p in self.pretrained.get_output_embeddings().parameters()}
        return [name for name, p in self.named_parameters() if id(p) in learns - frozen]

    def own_name(self, published: str) -> str:
        """The name of a published weight in this module; empty if it is not read."""
        return published

    @torch.no_grad()
    def fill(self, folder: Path, *, new: bool, reference: bool) -> None:
        """Read all weights from a published folder.

        Args:
            folder: The folder.
            new: Whether the model is new, so that it has no weights yet.
            reference: Whether checkpoints refer to the weights instead of storing them.

        Raises:
            CheckpointError: Weights are missing or unknown; see `copy_weights`.
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
                    f"{folder} {problem} {len(names)} weights (the first is {names[0]}) compared "
                    "with config.json; a shard is missing, or configuration and weights belong to "
                    "different models. Copy the folder again."
                )
        if reference:
            self.refer()

    def refer(self) -> None:
        """Freeze the weights; checkpoints refer to the folder that they were read from."""
        self.requires_grad_(False)
        self.referenced = list(self.state_dict())


def check_left_padding(batch: Mapping[str, Any], ids: str, mask: str) -> None:
    """Raise `ObservationError` unless the mask of prompts (B, L) marks padding on the left."""
    marks = batch[mask]
    if marks.shape != batch[ids].shape or not bool(marks[:, -1].all()):
        raise ObservationError(
            f"{mask} {tuple(marks.shape)} does not mark left padding of {tuple(batch[ids].shape)} "
            "ids; every prompt must end in the last column. Use the checkpoint's preprocessor."
        )
