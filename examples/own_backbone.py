"""Write your own backbone in 60 lines, and check that it decodes exactly: `python
examples/own_backbone.py`.

It is then trained and distilled as any other:

    export PYTHONPATH=examples own="--discover_packages_path=own_backbone --env.type=none" ceed-vla
    train $own --policy.backbone.type=own --policy.auxiliary_scale "[]" --grounding_steps 0 --rounds
    0 \
        --roots DATA --output_dir teacher
    ceed-vla distill $own --teacher.path teacher/checkpoints/final/pretrained_model
    --trajectories.online=true \
        --roots DATA --output_dir student

`OwnBackbone` is a plain causal transformer. What a decoder asks of it is in
`ceed_vla/backbones/base.py`: run the prefix once, then score block tokens behind it, keys and
values in a cache that can be cut. Whoever loads such a checkpoint must have imported the module
that registers its family; here, this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceed_vla import CeedVLAPolicy
from ceed_vla.backbones.base import Prefix, TrainableBackbone, check_features
from ceed_vla.backbones.check import check_untrained
from ceed_vla.backbones.compact.words import InstructionWordsStep, build_vocabulary
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
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
        self.num_layers = layers
        self.heads = heads
        self.max_words = max_words
        self.augmented_images = tuple(shape.cameras)  # training shifts and brightens them
        self.state_dim = shape.state_dim
        self.eye = nn.Sequential(
            nn.Conv2d(3, 32, 8, 8), nn.GELU(), nn.Conv2d(32, width, 4, 4), nn.Flatten(2)
        )
        self.words, self.state = nn.Embedding(words, width), nn.Linear(self.state_dim, width)
        self.tokens = nn.Embedding(shape.vocabulary_size, width)
        self.places = nn.Parameter(0.02 * torch.randn(512, width))  # of the prefix
        self.slots = nn.Parameter(0.02 * torch.randn(shape.block_length, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, shape.vocabulary_size))

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        cameras = dict.fromkeys(self.augmented_images, (3, None, None))
        return check_features(
            batch, {**cameras, STATE: (self.state_dim,), WORDS: (self.max_words,)}, [STATE]
        )

    def embed_prefix(self, batch: dict[str, Tensor]) -> Tensor:  # (B, P, d)
        images = [self.eye(batch[camera]).transpose(1, 2) for camera in self.augmented_images]
        x = torch.cat(
            [self.words(batch[WORDS]), *images, self.state(batch[STATE]).unsqueeze(1)], dim=1
        )
        return x + self.places[: x.shape[1]]

    # (B, t, d)
    def run(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            if cache is not None:
                k, v = cache.write(i, k, v)  # all so far: (B, H, T, d / H)
            t = q.shape[2]
            total = k.shape[2]
            causal = torch.ones(t, total, dtype=torch.bool, device=x.device).tril(total - t)
            x = x + layer.out(
                F.scaled_dot_product_attention(q, k, v, causal).transpose(1, 2).flatten(2)
            )
            x = x + layer.mlp(x)
        return x

    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        x = self.embed_prefix(observation)
        width = self.slots.shape[1]
        sizes = (
            len(self.layers),
            len(x),
            self.heads,
            x.shape[1] + self.block_length,
            width // self.heads,
        )
        cache = KVCache(*sizes, device=x.device, dtype=x.dtype)
        logits = self.head(self.run(x, cache)[:, -1])
        cache.seal_prefix(x.shape[1])
        return Prefix(logits, cache)

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:  # (B, k) -> (B, k, V)
        start = prefix.cache.committed
        slots = self.slots[start : start + tokens.shape[1]]
        return self.head(self.run(self.tokens(tokens) + slots, prefix.cache))

    def packed_logits(
        self, embeddings: Tensor, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        # without a block; autograd and a cache do not go together
        hidden = [self.run(embeddings)[:, -1:]]
        for block in blocks:
            x = torch.cat(
                [embeddings, self.tokens(block[:, :-1]) + self.slots[: block.shape[1] - 1]], dim=1
            )
            hidden.append(self.run(x)[:, embeddings.shape[1] - 1 :])
        return hidden[0][:, 0], [self.head(x) for x in hidden[1:]]

    def distillation_parameters(self) -> list[str]:  # the others make `embed_prefix`
        return [
            n
            for n, _ in self.named_parameters()
            if n.startswith(("tokens", "slots", "layers", "head"))
        ]


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


# ---- used as any other ---------------------------------------------------------------------------


if __name__ == "__main__":
    config = CeedVLAConfig.read(resolve_checkpoint("student"))
    config.backbone = OwnConfig()
    config.auxiliary_scale = []
    compared = check_untrained(CeedVLAPolicy(config).backbone, config, instruction_tokens=12)
    print(f"{compared} tokens by all routes: equal")
