"""What the compact backbone sees: an image as tokens, of patches and of the places of things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Keypoints(nn.Module):
    """Where things are: each of ``count`` heat maps gives the mean place of its softmax; all places
    make one token.

    Heat sums fine features, which see a small thing's colour undiluted, and coarse ones, which see
    more around it. Source: the spatial softmax of Levine et al. 2016 (arXiv 1504.00702).
    """

    def __init__(self, fine: int, coarse: int, count: int, width: int) -> None:
        super().__init__()
        self.fine = nn.Conv2d(fine, count, 1)
        self.coarse = nn.Conv2d(coarse, count, 1)
        self.project = nn.Linear(2 * count, width)
        for heat, channels in ((self.fine, fine), (self.coarse, coarse)):
            nn.init.normal_(heat.weight, std=0.2 * channels**-0.5)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Features (B, f, S, S) and (B, c, S / k, S / k) to a token (B, 1, d)."""
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
    """The auxiliary regression from the prefix embeddings, before the trunk: deep supervision of
    the camera stems.

    Through the trunk alone, the stems get next to no gradient until it carries what they see, and
    it carries nothing until they see something: hundreds of steps on a plateau. Only training uses
    this head.
    """

    def __init__(self, tokens: int, width: int, kept: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, kept)
        self.regress = nn.Sequential(
            nn.Linear(tokens * kept, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Prefix embeddings (B, P, d) to the regressed terms (B, E)."""
        return self.regress(self.narrow(embeddings).flatten(1))


class CameraStem(nn.Module):
    """Four convolutions that turn an image into tokens: ``grid ** 2`` patches, and the places of
    ``keypoints``.

    The instruction modulates the middle (FiLM), so what the words name can be looked for.

    The modulation sees every word at its place: a mean over words cannot tell "red on blue" from
    "blue on red", and a policy that got one never learnt to find the named cube.
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
        """Lay the weights out for inference (channels last is faster on a CPU) or for training.

        Optimisers copy the layout into their state, and LeRobot's checkpoints take contiguous
        tensors only.
        """
        layout = torch.contiguous_format if mode else torch.channels_last
        for convolution in (*self.convolutions, self.cells):
            weight = cast("nn.Conv2d", convolution).weight
            weight.data = weight.data.contiguous(memory_format=layout)
        return super().train(mode)

    def forward(self, image: Tensor, instruction: Tensor) -> Tensor:
        """Image (B, 3, S, S) in [-1, 1] and word codes (B, L * c) to tokens (B, grid ** 2 [+ 1],
        d).
        """
        films = self.film(instruction).split(self.film_sizes, dim=-1)
        x = fine = image
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x))
            if i in (1, 2):
                scale, shift = films[i - 1][..., None, None].chunk(2, dim=1)  # (B, C, 1, 1)
                x = x * (1 + scale) + shift
            x = F.silu(x)
            fine = x if i == 1 else fine
        tokens = self.cells(x).flatten(2).transpose(1, 2)
        return (
            tokens
            if self.keypoints is None
            else torch.cat([tokens, self.keypoints(fine, x)], dim=1)
        )
