"""Write your own backbone in 80 lines.

`python examples/own_backbone.py` checks that it decodes exactly. It is then trained and distilled
like any other backbone:

    export PYTHONPATH=examples
    own="--discover_packages_path=own_backbone --env.type=none"
    ceed-vla train $own --policy.backbone.type=own --policy.auxiliary_scale "[]" \
        --grounding_steps 0 --rounds 0 --roots DATA --output_dir teacher
    ceed-vla distill $own --teacher.path teacher/checkpoints/final/pretrained_model \
        --trajectories.online=true --roots DATA --output_dir student
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceed_vla import CeedVLAPolicy
from ceed_vla.backbones.base import Prefix, TrainableBackbone
from ceed_vla.backbones.check import check_untrained
from ceed_vla.backbones.compact.words import InstructionWordsStep, build_vocabulary
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.backbones.features import check_features
from ceed_vla.cache import KVCache
from ceed_vla.checkpoints import resolve_checkpoint
from ceed_vla.configuration_ceed_vla import CeedVLAConfig

# ---- the backbone --------------------------------------------------------------------------------

STATE, WORDS = "observation.state", "observation.language.tokens"


class OwnBackbone(TrainableBackbone):
    def __init__(
        self, shape: PolicyShape, words: int, max_words: int, width: int, layers: int, heads: int
    ):
        super().__init__()
        self.block_length, self.vocabulary_size = shape.block_length, shape.vocabulary_size
        self.num_layers, self.heads = layers, heads
        self.augmented_images = tuple(shape.cameras)  # training shifts and brightens them
        self.vectors = {STATE: (shape.state_dim,), WORDS: (max_words,)}
        self.eye = nn.Sequential(
            nn.Conv2d(3, 32, 8, 8), nn.GELU(), nn.Conv2d(32, width, 4, 4), nn.Flatten(2)
        )
        self.words, self.state = nn.Embedding(words, width), nn.Linear(shape.state_dim, width)
        self.tokens = nn.Embedding(shape.vocabulary_size, width)
        self.places = nn.Parameter(0.02 * torch.randn(512, width))  # of the prefix
        self.slots = nn.Parameter(0.02 * torch.randn(shape.block_length, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, shape.vocabulary_size))

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        wanted = {**dict.fromkeys(self.augmented_images, (3, None, None)), **self.vectors}
        return check_features(batch, wanted, finite=[STATE])

    def embed_prefix(self, batch: dict[str, Tensor]) -> Tensor:  # (B, P, d)
        images = [self.eye(batch[camera]).transpose(1, 2) for camera in self.augmented_images]
        state = self.state(batch[STATE]).unsqueeze(1)
        x = torch.cat([self.words(batch[WORDS]), *images, state], dim=1)
        return x + self.places[: x.shape[1]]

    def run(self, x: Tensor, cache: KVCache | None = None) -> Tensor:  # (B, t, d)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            if cache is not None:
                k, v = cache.write(i, k, v)  # of all tokens so far: (B, H, T, d / H)
            t, total = q.shape[2], k.shape[2]
            causal = torch.ones(t, total, dtype=torch.bool, device=x.device).tril(total - t)
            seen = F.scaled_dot_product_attention(q, k, v, causal)
            x = x + layer.out(seen.transpose(1, 2).flatten(2))
            x = x + layer.mlp(x)
        return x

    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        x = self.embed_prefix(observation)
        capacity, size = x.shape[1] + self.block_length, x.shape[2] // self.heads
        layers, rows = len(self.layers), len(x)
        cache = KVCache(layers, rows, self.heads, capacity, size, device=x.device, dtype=x.dtype)
        logits = self.head(self.run(x, cache)[:, -1])
        cache.seal_prefix(x.shape[1])
        return Prefix(logits, cache)

    def embed_block(self, tokens: Tensor, start: int = 0) -> Tensor:  # (B, k) -> (B, k, d)
        return self.tokens(tokens) + self.slots[start : start + tokens.shape[1]]

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:  # (B, k) -> (B, k, V)
        block = self.embed_block(tokens, prefix.cache.committed)
        return self.head(self.run(block, prefix.cache))

    def packed_logits(
        self, embeddings: Tensor, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        prefix = embeddings.shape[1]
        state = self.run(embeddings)[:, -1]  # (B, d); without a cache, which autograd cannot use
        inputs = [torch.cat([embeddings, self.embed_block(b[:, :-1])], dim=1) for b in blocks]
        return state, [self.head(self.run(x)[:, prefix - 1 :]) for x in inputs]

    def distillation_parameters(self) -> list[str]:  # all but those of `embed_prefix`
        learn = ("tokens", "slots", "layers", "head")
        return [name for name, _ in self.named_parameters() if name.startswith(learn)]


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width))
        self.out = nn.Linear(width, width)
        wide = 3 * width
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width)
        )


@BackboneConfig.register_subclass("own")
@dataclass
class OwnConfig(BackboneConfig):
    words: int = 256
    max_words: int = 12
    width: int = 96
    layers: int = 3
    heads: int = 4

    def build(self, shape: PolicyShape) -> TrainableBackbone:
        return OwnBackbone(shape, **vars(self))

    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        return [InstructionWordsStep(build_vocabulary(instructions), self.max_words)]


# ---- check ---------------------------------------------------------------------------------------


if __name__ == "__main__":
    config = CeedVLAConfig.read(resolve_checkpoint("student"))
    config.backbone = OwnConfig()
    config.auxiliary_scale = []
    compared = check_untrained(CeedVLAPolicy(config).backbone, config, instruction_tokens=12)
    print(f"{compared} tokens by all routes: equal")
