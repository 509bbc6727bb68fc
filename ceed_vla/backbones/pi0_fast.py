"""LeRobot's pi0-FAST (PaliGemma that writes FAST tokens) behind the `Backbone` protocol, with its weights unchanged.

    [cameras | prompt, right-padded | BOS]  bidirectional        --> slot 0
    "Action: " <FAST ids> "|"               causal, variable length

With the full vocabulary a token is any id of the text vocabulary, as LeRobot's own decoder chooses among all of
them: greedy and strict Jacobi decoding give its tokens for any weights, while guesses, and whatever a Jacobi iteration
writes behind a token that is not proven yet, are restricted to the ids that an action can hold. Restricted to actions,
nothing else has a score at all. That reads 1 % of the head, which distillation needs, and differs only where LeRobot
writes no action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy, PI0FastPytorch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from ceed_vla.backbones.base import Prefix, TrainableBackbone, check_features
from ceed_vla.backbones.pi0_fast_tokens import Pi0FastTokenizer
from ceed_vla.cache import TransformersCache
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.images import check_images


@dataclass
class Pi0FastEmbeddings:
    """What pi0-FAST decodes behind: embeddings (B, P, d), attention mask (B, P, P), and what is no padding (B, P)."""

    embeddings: Tensor
    attention: Tensor
    valid: Tensor

    def __getitem__(self, rows: Any) -> Pi0FastEmbeddings:
        return Pi0FastEmbeddings(self.embeddings[rows], self.attention[rows], self.valid[rows])


class Pi0FastCache(TransformersCache):
    """The cache of the language model, and which positions (B, P) of its prefix are no padding."""

    def __init__(self, valid: Tensor) -> None:
        super().__init__()
        self.valid = valid


class Pi0FastBackbone(TrainableBackbone):
    """pi0-FAST as a causal model over one block of text tokens.

    Args:
        model: LeRobot's model; its tokenizer is not used.
        tokenizer: What its tokens are.

    Raises:
        ConfigError: Tokens that the model does not score, or a block of fewer than 2 tokens.
    """

    ids: Tensor | None
    forbidden: Tensor | None

    def __init__(self, model: PI0FastPytorch, tokenizer: Pi0FastTokenizer) -> None:
        super().__init__()
        self.model = model
        self.config: PI0FastConfig = model.config
        self.block_length = tokenizer.block_length
        self.vocabulary_size = tokenizer.vocabulary_size
        self.augmented_images = tuple(k for k in self.config.image_features if ".empty_camera_" not in k)
        self._bos = tokenizer.text.bos
        words, ids = int(self._paligemma.lm_head.out_features), tokenizer.action_ids
        if self.block_length < 2 or tokenizer.scored not in (0, words) or int(ids.max()) >= words:
            raise ConfigError(
                f"Blocks of {self.block_length} tokens, {tokenizer.scored or 'some'} of them scored and with text ids "
                f"up to {int(ids.max())}, do not fit a model of {words} text ids; do tokenizer and weights belong "
                "together?"
            )
        self._referenced: list[str] = []
        full = bool(tokenizer.scored)
        ids = ids.to(self._paligemma.lm_head.weight.device)
        forbidden = torch.ones(words, dtype=torch.bool, device=ids.device).index_fill_(0, ids, False)  # (V,)
        self.register_buffer("ids", None if full else ids, persistent=False)
        self.register_buffer("forbidden", forbidden if full else None, persistent=False)

    def refer(self) -> None:
        """Freeze the weights: checkpoints leave them in the folder they were read from."""
        self.requires_grad_(False)
        self._referenced = list(self.state_dict())

    def referenced(self) -> list[str]:
        return self._referenced

    def distillation_parameters(self) -> list[str]:
        """The layers of the language model; its embeddings make the prefix, and its head may share them."""
        language_model = "model.paligemma_with_expert.paligemma.model.language_model."
        parts = (f"{language_model}layers.", f"{language_model}norm.")
        return [name for name, _ in self.named_parameters() if name.startswith(parts)]

    @property
    def _paligemma(self) -> Any:
        return self.model.paligemma_with_expert.paligemma

    @property
    def _language_model(self) -> Any:
        return self._paligemma.model.language_model

    # ---- prefix -------------------------------------------------------------------------------------------------

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        """Rows of a batch with cameras (B, 3, H, W) in [0, 1] and LeRobot's prompt tokens and mask (B, L)."""
        wanted: dict[str, tuple[int | None, ...]] = dict.fromkeys(self.augmented_images, (3, None, None))
        length = int(self.config.tokenizer_max_length)
        wanted |= {OBS_LANGUAGE_TOKENS: (length,), OBS_LANGUAGE_ATTENTION_MASK: (length,)}
        rows = check_features(
            batch, wanted, ids={OBS_LANGUAGE_TOKENS: int(self._paligemma.lm_head.out_features)}
        )
        check_images({camera: batch[camera] for camera in self.augmented_images})
        return rows

    def embed_prefix(self, batch: dict[str, Tensor]) -> Pi0FastEmbeddings:
        """Cameras, prompt and BOS as LeRobot's decoder embeds them."""
        # LeRobot's own method; it reads the configuration and the device only.
        images, image_masks = PI0FastPolicy._preprocess_images(cast("Any", self), batch)
        tokens, mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK].bool()
        bos = torch.full_like(tokens[:, :1], self._bos)
        embeddings, valid, attention, _, _ = self.model.embed_prefix_fast(
            images,
            image_masks,
            torch.cat([tokens, bos], dim=1),
            torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
        )
        return Pi0FastEmbeddings(embeddings.to(self._dtype), attention, valid)

    def prefill(self, observation: dict[str, Tensor]) -> Prefix[Pi0FastCache]:
        """Run the prefix of every row once."""
        return self.prefill_embeddings(self.embed_prefix(observation))

    def prefill_embeddings(self, prefix: Pi0FastEmbeddings) -> Prefix[Pi0FastCache]:
        """`prefill` from what `embed_prefix` made."""
        cache = Pi0FastCache(prefix.valid)
        logits = self._score(self._run_prefix(cache, prefix))
        return Prefix(logits=logits, cache=cache)

    def _run_prefix(self, cache: Pi0FastCache, prefix: Pi0FastEmbeddings) -> Tensor:
        """The last hidden vector (B, d) of the prefix, which fills `cache`."""
        positions = prefix.valid.cumsum(1) - 1  # padding repeats a position; nothing attends to it
        hidden = self._run(cache, prefix.embeddings, prefix.attention, positions)
        cache.seal_prefix(prefix.embeddings.shape[1])
        return hidden[:, -1]

    # ---- block --------------------------------------------------------------------------------------------------

    def block_logits(self, prefix: Prefix[Pi0FastCache], tokens: Tensor) -> Tensor:
        """Logits (B, k, V) of the successors of `tokens` (B, k); see `Backbone`.

        With the full vocabulary, ids that no action holds score -inf behind a token that is not the greedy one,
        as that is speculation. Behind greedy tokens every id keeps its score, so a fixed point is greedy.
        """
        cache = prefix.cache
        if not isinstance(cache, Pi0FastCache) or cache.committed + tokens.shape[1] > self.block_length:
            raise TokenError(
                f"{tokens.shape[1]} tokens after {cache.committed} in a {type(cache).__name__}: a block has "
                f"{self.block_length} tokens, behind a prefix that this backbone has run."
            )
        logits = self._score(self._run_block(cache, tokens))  # (B, k, V)
        if self.forbidden is not None and tokens.shape[1] > 1:
            wrong = logits[:, :-1].argmax(-1) != tokens[:, 1:]  # (B, k - 1)
            speculative = wrong.cumsum(1).bool()  # outputs 1 .. k - 1
            logits[:, 1:].masked_fill_(speculative.unsqueeze(-1) & self.forbidden, -torch.inf)
        return logits

    def _run_block(self, cache: Pi0FastCache, tokens: Tensor) -> Tensor:
        """Hidden vectors (B, k, d) of `tokens` (B, k) behind the committed ones."""
        past, k = cache.committed, tokens.shape[1]
        slots = torch.arange(past, past + k, device=tokens.device)
        positions = cache.valid.sum(1, keepdim=True) + slots  # (B, k)
        return self._run(cache, self._embed(tokens), self._attention(cache.valid, past + k, k), positions)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, k, d) of `tokens` (B, k)."""
        text = tokens if self.ids is None else self.ids[tokens]
        embedded: Tensor = self.model.paligemma_with_expert.embed_language_tokens(text)
        return embedded.to(self._dtype)

    @staticmethod
    def _attention(valid: Tensor, length: int, k: int) -> Tensor:
        """What the last `k` of `length` block tokens attend to (B, k, P + length) behind `valid` (B, P)."""
        causal = torch.ones(k, length, dtype=torch.bool, device=valid.device).tril(length - k)
        return torch.cat([valid[:, None].expand(-1, k, -1), causal.expand(len(valid), -1, -1)], dim=2)

    def _run(
        self, cache: Pi0FastCache | None, embeddings: Tensor, attention: Tensor, positions: Tensor
    ) -> Tensor:
        """Hidden vectors (B, t, d); appends the keys and values of `embeddings` (B, t, d) to `cache`."""
        (hidden, _), _ = self.model.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(attention, dtype=embeddings.dtype),
            position_ids=positions,
            past_key_values=None if cache is None else cache.begin(embeddings.shape[1]),
            inputs_embeds=[embeddings, None],
            use_cache=cache is not None,
            adarms_cond=[None, None],
        )
        return hidden

    def _score(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) after hidden vectors (..., d)."""
        head = self._paligemma.lm_head
        return head(hidden) if self.ids is None else F.linear(hidden, head.weight[self.ids])

    @property
    def _dtype(self) -> torch.dtype:
        """What LeRobot runs the language model in."""
        projection = self._language_model.layers[0].self_attn.q_proj
        return projection.weight.dtype

    # ---- training -----------------------------------------------------------------------------------------------

    def packed_logits(
        self, embeddings: Pi0FastEmbeddings, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Teacher-forced logits of several blocks behind one prefix, which runs once; see `TrainableBackbone`."""
        if self.training and self._language_model.gradient_checkpointing:
            return self._recomputed_logits(embeddings, blocks)
        cache = Pi0FastCache(embeddings.valid)
        state = self._run_prefix(cache, embeddings)  # (B, d)
        logits = []
        for block in blocks:
            hidden = self._run_block(cache, block[:, :-1])  # cuts the cache back to the prefix first
            logits.append(self._score(torch.cat([state.unsqueeze(1), hidden], dim=1)))  # (B, n, V)
        return state, logits

    def recompute_activations(self) -> None:
        self._language_model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    def _recomputed_logits(
        self, embeddings: Pi0FastEmbeddings, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """`packed_logits` without a cache, which layers that run twice would fill twice: the prefix runs every time."""
        valid, length = embeddings.valid, embeddings.valid.shape[1]
        state, logits = None, []
        for block in blocks or [valid.new_empty(len(valid), 1, dtype=torch.int64)]:
            k = block.shape[1] - 1
            text = self._embed(block[:, :-1])
            behind = self._attention(valid, k, k)  # (B, k, P + k)
            attention = torch.cat([F.pad(embeddings.attention.bool(), (0, k)), behind], dim=1)
            positions = F.pad(valid, (0, k), value=True).cumsum(1) - 1
            hidden = self._run(None, torch.cat([embeddings.embeddings, text], dim=1), attention, positions)
            state = hidden[:, length - 1]  # (B, d)
            logits.append(self._score(hidden[:, length - 1 :]))  # (B, n, V)
        return cast("Tensor", state), logits[: len(blocks)]
