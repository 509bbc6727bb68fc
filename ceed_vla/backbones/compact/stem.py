"""Camera stem of the compact backbone: an image becomes tokens of patches and of keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceed_vla.errors import ConfigError
from ceed_vla.fields import short

WORD_CODE = 16  # width of the word embedding that modulates the camera stems


class Keypoints(nn.Module):
    """Positions of objects: the mean position of the softmax of each of ``count`` heat maps, all in
    one token.

    A heat map is the sum of fine features, which resolve the colour of a small object, and coarse
    features, which cover more of its surroundings. Source: the spatial softmax of Levine et al.
    2016 (arXiv 1504.00702).
    """

    def __init__(self, fine: int, coarse: int, count: int, width: int) -> None:
        super().__init__()
        self.fine = nn.Conv2d(fine, count, 1)
        self.coarse = nn.Conv2d(coarse, count, 1)
        self.project = nn.Linear(2 * count, width)
        for heat, channels in ((self.fine, fine), (self.coarse, coarse)):
            nn.init.normal_(heat.weight, std=0.2 * channels**-0.5)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Map features (B, f, S, S) and (B, c, S / k, S / k) to a token (B, 1, d)."""
        side = fine.shape[-1]
        heat = self.fine(fine) + F.interpolate(
            self.coarse(coarse), size=(side, side), mode="bilinear"
        )
        heat = (10 * heat.flatten(2).float()).softmax(-1)  # (B, K, S * S)
        axis = torch.linspace(-1, 1, side, device=fine.device)
        # (S * S, 2)
        places = torch.stack([axis.repeat(side), axis.repeat_interleave(side)], dim=-1)
        return self.project((heat @ places).flatten(1)).unsqueeze(1)


class EarlyReadout(nn.Module):
    """Auxiliary regression from the prefix embeddings, before the trunk: deep supervision of the
    camera stems.

    Through the trunk alone, the stems have almost no gradient until the trunk uses their features,
    and the trunk has no use for untrained features: the loss stays on a plateau for hundreds of
    steps. Only training uses this head.
    """

    def __init__(self, tokens: int, width: int, reduced: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, reduced)
        self.regress = nn.Sequential(
            nn.Linear(tokens * reduced, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map prefix embeddings (B, P, d) to the regressed terms (B, E)."""
        return self.regress(self.narrow(embeddings).flatten(1))


class CameraStem(nn.Module):
    """Four convolutions that turn an image into tokens: ``grid ** 2`` patches, and ``keypoints``.

    The instruction modulates the middle layers (FiLM), so that they can search for the named
    object. The modulation reads every word at its position: a mean over words cannot distinguish
    "red on blue" from "blue on red", and a policy with one never learned to find the named cube.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grid: int,
        keypoints: int,
        image_size: int,
        width: int,
        instruction_width: int,
    ) -> None:
        super().__init__()
        (_, c2, c3, c4), steps = (
            channels,
            zip((3, *channels[:3]), channels, (2, 2, 2, 1), strict=True),
        )
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=stride, padding=1) for a, b, stride in steps
        )
        self.norms = nn.ModuleList([nn.GroupNorm(4, c) for c in channels])
        self.film = nn.Linear(instruction_width, 2 * (c2 + c3))
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        self.film_sizes = [2 * c2, 2 * c3]
        cell = image_size // (8 * grid)
        self.cells = nn.Conv2d(c4, width, cell, stride=cell)
        self.keypoints = Keypoints(c2, c4, keypoints, width) if keypoints else None

    def train(self, mode: bool = True) -> CameraStem:
        """Set the memory layout of the weights for training or inference.

        Inference uses channels-last, which is faster on a CPU. Training uses contiguous tensors, as
        optimisers copy the layout into their state and LeRobot's checkpoints need contiguous ones.
        """
        layout = torch.contiguous_format if mode else torch.channels_last
        for convolution in (*self.convolutions, self.cells):
            weight = cast("nn.Conv2d", convolution).weight
            weight.data = weight.data.contiguous(memory_format=layout)
        return super().train(mode)

    def forward(self, image: Tensor, instruction: Tensor) -> Tensor:
        """Map an image (B, 3, S, S) in [-1, 1] and word codes (B, L * c) to tokens (B, grid ** 2 [+
        1], d).
        """
        fine, coarse = self.features(image, instruction)
        tokens = self.cells(coarse).flatten(2).transpose(1, 2)
        if self.keypoints is None:
            return cast("Tensor", tokens)
        return torch.cat([tokens, self.keypoints(fine, coarse)], dim=1)

    def features(self, image: Tensor, instruction: Tensor) -> tuple[Tensor, Tensor]:
        """Feature maps (B, c2, S / 4, S / 4) and (B, c4, S / 8, S / 8) of an image."""
        films = self.film(instruction).split(self.film_sizes, dim=-1)
        x = fine = image
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x))
            if i in (1, 2):
                scale, shift = films[i - 1][..., None, None].chunk(2, dim=1)  # (B, C, 1, 1)
                x = x * (1 + scale) + shift
            x = F.silu(x)
            fine = x if i == 1 else fine
        return fine, x


def check_stem(config: Any, prefix: str = "") -> None:
    """Raise `ConfigError` unless the sizes of camera stems fit together; see `CompactConfig`."""
    channels = config.stem_channels
    if len(channels) != 4 or any(count % 4 for count in channels):
        raise ConfigError(
            f"{prefix}stem_channels is {short(channels)}; it must be exactly 4 numbers, each a "
            "multiple of 4."
        )
    if config.image_size % (8 * config.image_grid):
        raise ConfigError(
            f"{prefix}image_size {config.image_size} is not a multiple of 8 * image_grid = "
            f"{8 * config.image_grid}; the stem halves the image three times and then cuts it into "
            "the grid."
        )


def stem_numbers(config: Any) -> int:
    """A lower bound on the number of weights of a camera's stem."""
    channels = config.stem_channels
    cell = config.image_size // (8 * config.image_grid)
    own = channels[3] * cell**2 * config.width
    return int(own + 9 * sum(a * b for a, b in pairwise(channels)))


def make_stems(config: Any, cameras: int) -> nn.ModuleList:
    """The stems of a compact policy, one for each of its `cameras`; see `CompactConfig`."""
    return nn.ModuleList(
        CameraStem(
            config.stem_channels,
            config.image_grid,
            config.keypoints,
            config.image_size,
            config.width,
            config.max_instruction_words * WORD_CODE,
        )
        for _ in range(cameras)
    )


def stem_image(image: Tensor, size: int) -> Tensor:
    """An image (B, 3, H, W) in [0, 1] as a stem reads it: (B, 3, size, size) in [-1, 1]."""
    if image.shape[-2:] != (size, size):
        image = F.interpolate(image, size=(size, size), mode="bilinear", antialias=True)
    return image * 2 - 1
