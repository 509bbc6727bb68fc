"""Any transformers ``LlamaForCausalLM`` as a backbone: the prefix is token ids, actions are part of its
vocabulary.

The oracle of the exactness tests (transformers' own ``generate()`` runs on the same weights), and the pattern
for language-model VLAs: everything that is particular to transformers' cache stays in `TransformersCache`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ceed_vla.backbones.base import Prefix
from ceed_vla.cache import TransformersCache
from ceed_vla.errors import ConfigError, ObservationError, TokenError

PREFIX_KEY = "prefix_ids"


class LlamaBackbone(nn.Module):
    """A Llama language model behind the `Backbone` protocol.

    Args:
        model: The language model.
        block_length: Tokens ``n`` of a block.
        num_actions: Action values ``V``: the last ids of the vocabulary, in ascending order.
        action_ids: (V,) vocabulary ids of the action values instead, for instance OpenVLA's descending order.

    Raises:
        ConfigError: Action ids that the vocabulary lacks or that repeat.
    """

    action_ids: Tensor

    def __init__(
        self,
        model: LlamaForCausalLM,
        block_length: int,
        num_actions: int = 256,
        action_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        words = int(model.config.vocab_size)
        if action_ids is None:
            action_ids = torch.arange(words - num_actions, words)
        if block_length < 1 or action_ids.ndim != 1 or len(action_ids) < 1:
            raise ConfigError(
                f"block_length is {block_length} with {action_ids.numel()} action ids; "
                "both must be at least 1."
            )
        ids = action_ids.tolist()
        if min(ids) < 0 or max(ids) >= words or len(set(ids)) < len(ids):
            raise ConfigError(
                f"The action ids must be different ids in [0, {words - 1}], the vocabulary of the model."
            )
        self.model = model
        self.block_length = block_length
        self.vocabulary_size = len(action_ids)
        self.register_buffer("action_ids", action_ids.long().to(model.device), persistent=False)

    def prefill(self, observation: dict[str, Tensor]) -> Prefix[TransformersCache]:
        """Run ``observation["prefix_ids"]`` (B, P), ids of the whole vocabulary without padding.

        Raises:
            ObservationError: No prefix, or an empty one.
        """
        ids = observation.get(PREFIX_KEY)
        if ids is None or ids.ndim != 2 or ids.shape[1] < 1:
            raise ObservationError(
                f"observation[{PREFIX_KEY!r}] is {'missing' if ids is None else tuple(ids.shape)}; "
                "expected (B, P) token ids with P >= 1."
            )
        cache = TransformersCache()
        logits = self._score(cache, ids)[:, -1]  # (B, V)
        cache.seal_prefix(ids.shape[1])
        return Prefix(logits=logits, cache=cache)

    def block_logits(self, prefix: Prefix[TransformersCache], tokens: Tensor) -> Tensor:
        """Logits (B, k, V) of the successors of `tokens` (B, k); see `Backbone`."""
        cache = prefix.cache
        if not isinstance(cache, TransformersCache):
            raise TokenError(
                f"The prefix has a {type(cache).__name__}; LlamaBackbone continues its own prefixes only."
            )
        if cache.committed + tokens.shape[1] > self.block_length:
            raise TokenError(
                f"{tokens.shape[1]} tokens after {cache.committed} committed ones "
                f"exceed the block of {self.block_length}."
            )
        return self._score(cache, self.action_ids[tokens])

    def _score(self, cache: TransformersCache, ids: Tensor) -> Tensor:
        """Scores (B, t, V) of the action values after each of `ids` (B, t); appends them to the cache."""
        output = self.model.model(input_ids=ids, past_key_values=cache.begin(ids.shape[1]), use_cache=True)
        head = self.model.lm_head
        bias = None if head.bias is None else head.bias[self.action_ids]
        return F.linear(output.last_hidden_state, head.weight[self.action_ids], bias)
