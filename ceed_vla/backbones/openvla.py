r"""OpenVLA: vision towers, a projector and a Llama, behind the `Backbone` protocol, with published weights.

    <s>   --embed-------------------> \
    image --towers, projector------->  inputs_embeds (B, P, d) --Llama--> cache, action token 0
    words, empty token 29871 --embed> /                            |
                              action ids 31999 - bin --embed-------+----> action tokens 1..n-1

Only the action ids have scores: the last ``V`` before the padding of the vocabulary, counted downwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ceed_vla.backbones.base import Prefix, TrainableBackbone, check_features, check_left_padding, runs
from ceed_vla.backbones.openvla_folder import Architecture
from ceed_vla.backbones.openvla_vision import Projector, VisionTowers
from ceed_vla.cache import TransformersCache
from ceed_vla.errors import CheckpointError, ConfigError, TokenError

IDS_KEY, MASK_KEY = "observation.openvla.input_ids", "observation.openvla.attention_mask"
PIXELS_KEY = "observation.openvla.pixel_values"


@dataclass
class OpenVLAEmbeddings:
    """What the language model reads before the block.

    Attributes:
        embeds: (B, P, d).
        real: (B, P) bool, False on the padding, which is on the left.
    """

    embeds: Tensor
    real: Tensor

    def __getitem__(self, rows: Tensor) -> OpenVLAEmbeddings:
        return OpenVLAEmbeddings(self.embeds[rows], self.real[rows])


@dataclass
class OpenVLAPrefix(Prefix[TransformersCache]):
    """A prefix in the cache.

    Attributes:
        hidden: (B, d), the last hidden vector, which predicts slot 0.
        real: (B, P) bool, or None without padding.
        lengths: (B, 1), tokens of every row without its padding.
    """

    hidden: Tensor
    real: Tensor | None
    lengths: Tensor


class OpenVLABackbone(TrainableBackbone):
    """An OpenVLA model; weights are whatever `openvla_folder.load_weights` puts in.

    Args:
        architecture: The published configuration.
        block_length: Tokens ``n`` of a block; published models write one action, fine-tuned ones several.
        bins: Action ids ``V``.
        dtype: Name of the weights' type.
    """

    def __init__(self, architecture: Architecture, block_length: int, bins: int, dtype: str) -> None:
        super().__init__()
        self.block_length, self.vocabulary_size, self.words = block_length, bins, architecture.words
        settings = dict(architecture.text)
        self.dtype = getattr(torch, dtype)
        with no_init_weights():
            try:
                config = AutoConfig.for_model(settings.pop("model_type"), **settings)
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, trust_remote_code=False)
            except Exception as error:  # transformers and torch each raise their own kinds
                reason = " ".join(str(error).split())[:200]
                raise CheckpointError(
                    f"text_config in config.json does not describe a model ({reason})."
                ) from error
            self.language_model = cast("PreTrainedModel", model)
            self.language_model.tie_weights()
            self.vision_backbone = VisionTowers(architecture).to(self.dtype)
            width = self.vision_backbone.width
            self.projector = Projector(width, config.hidden_size, architecture.fused).to(self.dtype)
        self._longest = _causal_positions(config)
        self._rows = int(config.vocab_size)
        self._referenced: list[str] = []

    def refer_to(self, names: Sequence[str]) -> None:
        """Freeze the named weights: checkpoints leave them in the folder they were read from."""
        self._referenced = list(names)
        frozen = set(names)
        for name, parameter in self.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)

    def referenced(self) -> list[str]:
        return self._referenced

    def distillation_parameters(self) -> list[str]:
        """The language model but for its embeddings, which make the prefix."""
        words = "language_model.model.embed_tokens."
        names = [name for name, _ in self.named_parameters()]
        return [n for n in names if n.startswith("language_model.") and not n.startswith(words)]

    # ---- prefix -------------------------------------------------------------------------------------------------

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        """Rows ``B`` of a batch with ids (B, L), their mask with padding on the left, and pixels (B, C, S, S)."""
        channels = 3 if self.vision_backbone.fused_featurizer is None else 6
        shapes: dict[str, tuple[int | None, ...]] = {
            PIXELS_KEY: (channels, None, None),
            IDS_KEY: (None,),
            MASK_KEY: (None,),
        }
        rows = check_features(batch, shapes, finite=[PIXELS_KEY], ids={IDS_KEY: self._rows})
        check_left_padding(batch, IDS_KEY, MASK_KEY)
        return rows

    def embed_prefix(self, batch: dict[str, Tensor]) -> OpenVLAEmbeddings:
        """Word embeddings with the image patches behind the first word of every row."""
        ids, real = batch[IDS_KEY], batch[MASK_KEY].bool()
        patches = self.projector(self.vision_backbone(batch[PIXELS_KEY].to(self.dtype)))  # (B, p, d)
        words = self._embed(ids)  # (B, L, d)
        first = real.long().argmax(dim=1).tolist()
        rows = [
            torch.cat([w[: i + 1], p, w[i + 1 :]]) for w, p, i in zip(words, patches, first, strict=True)
        ]  # each (P, d)
        padding = F.pad(
            real, (0, patches.shape[1]), value=True
        )  # on the left, so patches may count at the end
        return OpenVLAEmbeddings(torch.stack(rows), padding)

    def _embed(self, ids: Tensor) -> Tensor:
        return cast("Tensor", self.language_model.get_input_embeddings()(ids))

    def prefill(self, observation: dict[str, Tensor]) -> OpenVLAPrefix:
        """Run the prefix of every row once; rows may have prompts of different lengths."""
        return self.prefill_embeddings(self.embed_prefix(observation))

    def prefill_embeddings(self, embeddings: OpenVLAEmbeddings) -> OpenVLAPrefix:
        """`prefill` from what `embed_prefix` made."""
        cache, real = TransformersCache(), embeddings.real
        if self._longest is not None and real.shape[1] + self.block_length > self._longest:
            raise ConfigError(
                f"The prompt has {real.shape[1]} positions and the block {self.block_length}; behind "
                f"{self._longest} (max_position_embeddings) this model's rope_scaling changes all positions with every "
                "further one, so keys and values cannot be kept. Use a model with another rope_scaling."
            )
        padded = not bool(real.all())
        inputs = (
            {"attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
            if padded
            else {}
        )
        hidden = self._run(embeddings.embeds, cache, **inputs)[:, -1]  # (B, d)
        cache.seal_prefix(real.shape[1])
        lengths = real.sum(1, keepdim=True)  # (B, 1)
        return OpenVLAPrefix(self._head(hidden), cache, hidden, real if padded else None, lengths)

    # ---- block --------------------------------------------------------------------------------------------------

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """Logits (B, k, V) of the successors of `tokens` (B, k); see `Backbone`."""
        if not isinstance(prefix, OpenVLAPrefix):
            raise TokenError(
                f"The prefix is a {type(prefix).__name__}; OpenVLABackbone continues its own only."
            )
        return self._head(self._block_hidden(prefix, tokens))

    def _block_hidden(self, prefix: OpenVLAPrefix, tokens: Tensor) -> Tensor:
        """Hidden vectors (B, k, d) behind the committed tokens."""
        committed, k = prefix.cache.committed, tokens.shape[1]
        if committed + k > self.block_length:
            raise TokenError(
                f"{k} tokens after {committed} committed ones exceed the block of {self.block_length}."
            )
        inputs = {}
        if prefix.real is not None:
            offsets = torch.arange(committed, committed + k, device=tokens.device)
            inputs["position_ids"] = prefix.lengths + offsets  # (B, k)
            inputs["attention_mask"] = F.pad(prefix.real.long(), (0, committed + k), value=1)
        return self._run(self._embed(self.words - 1 - tokens), prefix.cache, **inputs)

    def _run(self, embeds: Tensor, cache: TransformersCache, **inputs: Tensor) -> Tensor:
        """Hidden vectors (B, t, d) of embeddings (B, t, d), whose keys and values go into the cache."""
        trunk = cast("nn.Module", self.language_model.model)
        past = cache.begin(embeds.shape[1])
        with runs(self.language_model):
            output = trunk(inputs_embeds=embeds, past_key_values=past, use_cache=True, **inputs)
        return cast("Tensor", output.last_hidden_state)

    def _head(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of bins 0..V-1, which are the ids words - 1 down to words - V."""
        head = cast("nn.Linear", self.language_model.get_output_embeddings())
        ids = slice(self.words - self.vocabulary_size, self.words)
        bias = None if head.bias is None else head.bias[ids]
        return F.linear(hidden, head.weight[ids], bias).flip(-1)

    # ---- training -----------------------------------------------------------------------------------------------

    def packed_logits(
        self, embeddings: OpenVLAEmbeddings, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Teacher-forced logits of several blocks behind one prefix, which runs once; see `TrainableBackbone`."""
        if self.training and self.language_model.is_gradient_checkpointing:
            return self._recomputed_logits(embeddings, blocks)
        prefix = self.prefill_embeddings(embeddings)
        logits = []
        for block in blocks:
            prefix.cache.roll_back()
            hidden = [prefix.hidden.unsqueeze(1)]
            if block.shape[1] > 1:
                hidden.append(self._block_hidden(prefix, block[:, :-1]))
            logits.append(self._head(torch.cat(hidden, dim=1)))  # (B, n, V)
        return prefix.hidden, logits

    def recompute_activations(self) -> None:
        self.language_model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    def _recomputed_logits(
        self, embeddings: OpenVLAEmbeddings, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """`packed_logits` without a cache, which layers that run twice would fill twice: the prefix runs every time."""
        trunk, length = cast("nn.Module", self.language_model.model), embeddings.real.shape[1]
        state, logits = None, []
        for block in blocks or [embeddings.real.new_empty(len(embeddings.real), 1, dtype=torch.int64)]:
            inputs = torch.cat([embeddings.embeds, self._embed(self.words - 1 - block[:, :-1])], dim=1)
            real = F.pad(embeddings.real, (0, block.shape[1] - 1), value=True)
            masks = {"attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
            hidden = trunk(inputs_embeds=inputs, use_cache=False, **masks).last_hidden_state[:, length - 1 :]
            state = hidden[:, 0]  # (B, d)
            logits.append(self._head(hidden))  # (B, n, V)
        return cast("Tensor", state), logits[: len(blocks)]


def _causal_positions(config: Any) -> int | None:
    """Positions up to which a rotary embedding does not depend on how many there are; None if it never does."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return int(config.max_position_embeddings) if kind in ("dynamic", "longrope") else None
