"""Early-exit layers that learn together with a student (Splitformer, arXiv 2506.18035).

`ceed-vla exits` adds them to a frozen policy. Here the student's layers learn to serve them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ceed_vla.axes import AXES
from ceed_vla.backbones.capabilities import TrainsDepths, require
from ceed_vla.errors import ConfigError
from ceed_vla.fields import Checked, ranged
from ceed_vla.supervision import divergence


@dataclass
class JointExitsConfig(Checked, prefix="exits."):
    """Early-exit layers of a student.

    Attributes:
        layers: Depths that get an exit, in [1, number of layers - 1]; empty for none.
        kind: As in `ceed-vla exits`.
        weight: Weight of their loss: the mean divergence of the exits' predictions, on the fixed
            point and on the states, from the predictions of all layers on the fixed point.
    """

    layers: list[int] = ranged([], "[1, 4096]")
    kind: str = "linear"
    weight: float = ranged(1.0, "(0, 1e6]")


def attach_exits(policy: Any, config: JointExitsConfig) -> nn.ModuleDict | None:
    """Give a policy new exits, which learn; returns them, None without `layers`.

    Raises:
        ConfigError: The model cannot have these exits.
    """
    if not config.layers:
        return None
    if "depth" not in AXES:
        raise ConfigError("exits.layers needs the axis of depth, which is not installed.")
    make_exits = import_module("ceed_vla.axes.depth.exits").make_exits
    backbone = policy.backbone
    require(backbone, TrainsDepths, "exits.layers")
    backbone.exits = make_exits(backbone, config.layers, config.kind)
    dtypes = {p.dtype for own in backbone.exits.values() for p in own.parameters()}
    if dtypes != {torch.float32}:
        raise ConfigError(
            "Exits of kind layer would learn in half precision, which rounds updates away; set "
            "--exits.kind linear."
        )
    return nn.ModuleDict({str(depth): own for depth, own in backbone.exits.items()})


def exit_loss(
    backbone: Any, seen: Any, blocks: Sequence[Tensor], target: Tensor, live: Tensor, slots: Tensor
) -> Tensor:
    """Divergence of all exits' predictions on blocks (B, n) from a target (B, n, V), added over the
    `live` slots (B, n) and divided by `slots`, those of the whole batch.
    """
    trained = require(backbone, TrainsDepths, "exits.layers")
    found = [
        (divergence(target, logits) * live).sum() / slots.clamp(min=1)
        for depth in backbone.exits
        for logits in trained.packed_depth_logits(seen, blocks, depth)
    ]
    return torch.stack(found).mean()
