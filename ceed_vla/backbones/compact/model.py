r"""The default backbone: a small vision-language-action transformer, trained from scratch.

    cameras --stem--> 16 tokens each \
    words   --embed--> L tokens        }--> prefix (bidirectional) --> [state token]: action token 0
    state   --linear--> 1 token       /                                      |
                               block tokens 0..n-2 (causal) -----------------+--> tokens 1..n-1

Positions are learned: one embedding for every prefix position and one for every block slot, so that
one step of the decoder is a handful of kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ceed_vla.backbones.base import Prefix, TrainableBackbone
from ceed_vla.backbones.compact.capabilities import CompactCapabilities
from ceed_vla.backbones.compact.layer import Layer
from ceed_vla.backbones.compact.stem import WORD_CODE, EarlyReadout, make_stems, stem_image
from ceed_vla.backbones.features import check_features
from ceed_vla.cache import KVCache
from ceed_vla.errors import ConfigError
from ceed_vla.fields import short
from ceed_vla.images import check_model_images

if TYPE_CHECKING:
    from ceed_vla.backbones.config import PolicyShape

LANGUAGE_KEY = "observation.language.tokens"
STATE_KEY = "observation.state"
# Parts that distillation trains; the others compute the prefix embeddings, which student and
# teacher share.
DISTILLED = ("action_tokens", "slots", "layers", "final_norm", "head")


class CompactBackbone(CompactCapabilities, TrainableBackbone):
    """A small VLA model with the `Backbone` protocol; `CompactConfig` has its sizes.

    `CompactCapabilities` adds the optional capabilities.
    """

    compilable = ("prefill", "block")

    def __init__(self, shape: PolicyShape, config: Any) -> None:
        super().__init__()
        self.cameras = self.augmented_images = tuple(shape.cameras)
        self.image_size, self.max_words = config.image_size, config.max_instruction_words
        self.state_dim = shape.state_dim
        self.block_length = shape.block_length
        self.vocabulary_size = shape.vocabulary_size
        self.shape = shape
        width = config.width
        grid = config.image_grid
        self.num_layers = config.layers
        self._recompute = False
        tokens = grid**2 + bool(config.keypoints)  # of a camera
        self.prefix_length = self.max_words + len(self.cameras) * tokens + 1
        self.keep(config.kept_tokens)
        self.words = nn.Embedding(config.words, width)
        self.word_codes = nn.Embedding(config.words, WORD_CODE)
        self.stems = make_stems(config, len(self.cameras))
        self.state = nn.Linear(self.state_dim, width)
        self.prefix_positions = nn.Parameter(torch.zeros(self.prefix_length, width))
        self.action_tokens = nn.Embedding(self.vocabulary_size, width)
        self.slots = nn.Parameter(torch.zeros(self.block_length, width))
        self.layers = nn.ModuleList(
            Layer(width, config.heads, config.mlp_width) for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, self.vocabulary_size)
        if outputs := shape.auxiliary_dim:
            self.auxiliary = nn.Sequential(
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
            )
            if reduced := config.early_readout:
                self.early_auxiliary = EarlyReadout(
                    len(self.kept) or self.prefix_length, width, reduced, width, outputs
                )
        self._initialise()

    @property
    def trunk(self) -> list[Layer]:
        return cast("list[Layer]", list(self.layers))

    def _initialise(self) -> None:
        for embedding in (
            self.words.weight,
            self.prefix_positions,
            self.action_tokens.weight,
            self.slots,
        ):
            nn.init.normal_(embedding, std=0.5 if embedding is self.words.weight else 0.02)
        for layer in self.trunk:
            for linear in (layer.qkv, layer.gate_up):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for linear in (layer.out, layer.down):
                nn.init.normal_(
                    linear.weight, std=(linear.in_features * 2 * len(self.trunk)) ** -0.5
                )
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        """Validate a batch with cameras (B, 3, any, any) in [0, 1], a finite state (B, D) and words
        (B, L); return its rows.
        """
        wanted: dict[str, tuple[int | None, ...]] = {
            **dict.fromkeys(self.cameras, (3, None, None)),
            STATE_KEY: (self.state_dim,),
            LANGUAGE_KEY: (self.max_words,),
        }
        rows = check_features(
            batch, wanted, finite=[STATE_KEY], ids={LANGUAGE_KEY: self.words.num_embeddings}
        )
        check_model_images({camera: batch[camera] for camera in self.cameras})
        return rows

    def recompute_activations(self) -> None:
        self._recompute = True

    def distillation_parameters(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.partition(".")[0] in DISTILLED]

    def keep(self, tokens: Sequence[int]) -> None:
        """Keep only these prefix tokens, and the state, which is the last; with none, keep all."""
        last = self.prefix_length - 1
        if any(token >= last for token in tokens) or sorted(set(tokens)) != list(tokens):
            raise ConfigError(
                f"kept_tokens is {short(list(tokens))}; it must be some of 0..{last - 1}, in order."
            )
        self.kept = [*tokens, last] if tokens else []

    def embed_prefix(self, observation: dict[str, Tensor]) -> Tensor:
        """Embeddings (B, P, d) of the kept tokens of words, cameras and state, the state last."""
        words = observation[LANGUAGE_KEY]  # (B, L)
        instruction = self.word_codes(words).flatten(1)  # (B, L * c)
        tokens = [self.words(words)]  # (B, L, d)
        for camera, stem in zip(self.cameras, self.stems, strict=True):
            image = stem_image(observation[camera], self.image_size)
            tokens.append(stem(image, instruction))  # (B, grid ** 2 [+ 1], d)
        tokens.append(self.state(observation[STATE_KEY].clamp(-5, 5)).unsqueeze(1))  # (B, 1, d)
        embeddings = torch.cat(tokens, dim=1) + self.prefix_positions
        return embeddings[:, self.kept] if self.kept else embeddings

    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        return self.prefill_embeddings(self.embed_prefix(observation))

    def prefill_embeddings(self, embeddings: Tensor) -> Prefix:
        """`prefill` from embeddings (B, P, d) that `embed_prefix` made."""
        cache = self._cache(embeddings)
        x = self._run(embeddings, cache)
        cache.seal_prefix(embeddings.shape[1])
        return Prefix(logits=self._scores(x[:, -1]), cache=cache, state=x[:, -1])

    def _cache(self, embeddings: Tensor) -> KVCache:
        batch, length, width = embeddings.shape
        heads = self.trunk[0].heads
        sizes = (self.num_layers, batch, heads, length + self.block_length, width // heads)
        own = sum(depth_exit.layer is not None for depth_exit in self.exits.values())
        return KVCache(*sizes, device=embeddings.device, dtype=embeddings.dtype, exits=own)

    def _embed(self, cache: KVCache, tokens: Tensor) -> Tensor:
        """Embeddings (B, k, d) of the next `tokens` (B, k) of a block."""
        return self.action_tokens(tokens) + cache.rows(self.slots, tokens.shape[1])

    def _run(
        self,
        x: Tensor,
        cache: KVCache,
        mask: Tensor | None = None,
        depth: int | None = None,
        done: int = 0,
    ) -> Tensor:
        """Run x (B, t, d) through the first `depth` layers, without the first `done` ones.

        Keys and values are written behind those in the cache.
        """
        # A slice of the module list would be a new module.
        for index, layer in enumerate(islice(self.trunk, done, depth), done):
            q, k, v = layer.project(x)
            keys, values = cache.write(index, k, v)  # (B, H, T, d / H)
            x = layer.finish(x, q, keys, values, mask)
            if index + 1 in self.exits and not cache.prefix_length:
                self.exits[index + 1].see_prefix(x, cache)
        return x

    def _scores(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden vectors (..., d) behind the last layer."""
        return cast("Tensor", self.head(self.final_norm(x)))

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        cache = prefix.cache
        x = self._run(self._embed(cache, tokens), cache, cache.mask(tokens.shape[1]))
        return self._scores(x)

    def packed_logits(
        self, embeddings: Tensor, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """See `TrainableBackbone`.

        The blocks do not attend to each other and have the same positions, so each has the same
        logits as in `block_logits`.
        """
        x, _ = self._packed(embeddings, blocks, self.num_layers)
        return self._unpacked(self.final_norm(x), embeddings.shape[1])

    def _packed(
        self, embeddings: Tensor, blocks: Sequence[Tensor], depth: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden vectors (B, P + b * (n - 1), d) of a prefix and b blocks behind `depth` layers,
        and the embedded blocks (B, n - 1, d).
        """
        n = self.block_length
        length = embeddings.shape[1]
        inputs = [self.action_tokens(block[:, : n - 1]) + self.slots[: n - 1] for block in blocks]
        x = torch.cat([embeddings, *inputs], dim=1)
        mask = self._packed_mask(length, n - 1, len(blocks), x.device) if blocks else None
        recompute = self._recompute and self.training
        for layer in self.trunk[:depth]:
            x = checkpoint(layer, x, mask, use_reentrant=False) if recompute else layer(x, mask)
        return x, inputs

    def _unpacked(self, x: Tensor, prefix: int) -> tuple[Tensor, list[Tensor]]:
        """Split head inputs x (B, T, d), with `prefix` positions in front, into the hidden vector
        (B, d) that predicts slot 0 and the logits (B, n, V) of every block.
        """
        state = x[:, prefix - 1]  # (B, d)
        parts = x[:, prefix:].split(self.block_length - 1, dim=1)
        return state, [self.head(torch.cat([state.unsqueeze(1), part], dim=1)) for part in parts]

    @staticmethod
    def _packed_mask(prefix: int, block: int, count: int, device: torch.device) -> Tensor:
        """Attention mask (T, T), True where allowed.

        The prefix attends to all of itself. A block attends to the prefix and, causally, to itself.
        """
        own = torch.ones(block, block, dtype=torch.bool, device=device).tril()
        mask = torch.block_diag(
            torch.ones(prefix, prefix, dtype=torch.bool, device=device), *[own] * count
        )
        mask[:, :prefix] = True
        return mask
