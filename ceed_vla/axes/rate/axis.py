"""Registration of the rate axis: exits of kind "coarse"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceed_vla.axes.base import Axis
from ceed_vla.axes.depth.exits import KINDS, LinearExit
from ceed_vla.axes.rate.coarse import CoarseBranch
from ceed_vla.backbones.capabilities import MakesLayers, require
from ceed_vla.errors import ConfigError


class CoarseExit(LinearExit):
    """A linear exit; a branch with one token per control step adds to its input."""

    kind = "coarse"

    def __init__(
        self, norm: nn.Module, width: int, make_branch: Callable[[], CoarseBranch]
    ) -> None:
        super().__init__(norm, width)
        self.branch = make_branch().to(next(norm.parameters()))

    def check(self, committed: int) -> None:
        super(LinearExit, self).check(committed)  # the branch reads whole steps

    def read(self, x: Tensor, cache: Any, mask: Tensor | None, blocks: Sequence[Tensor]) -> Tensor:
        if cache is not None:
            self.check(cache.committed + cache.ahead)
        if blocks:
            added = torch.cat([self.branch(block) for block in blocks], dim=1)
            x = x + F.pad(added, (0, 0, x.shape[1] - added.shape[1], 0))
        return super().read(x, cache, mask, blocks)


def make_coarse(
    backbone: Any, layers: Sequence[nn.Module], norm: nn.Module, width: int, depth: int, slot: int
) -> CoarseExit:
    """Make an exit whose branch has half the width, so that the branch costs about as much per
    chunk as the exit's linear layer.

    Raises:
        ConfigError: The model makes no layers, or its tokens do not belong to steps.
    """
    maker = require(backbone, MakesLayers, "An exit of kind coarse")
    if maker.tokens_per_step is None:
        raise ConfigError(
            "Exits of kind coarse pool the tokens of a step, but tokens of variable length do not "
            "belong to steps; train kind linear."
        )
    inner = max(width // 2, 1)
    step = maker.tokens_per_step
    return CoarseExit(norm, width, lambda: CoarseBranch(maker.new_layer(inner), inner, width, step))


KINDS["coarse"] = make_coarse
AXIS = Axis("rate")
