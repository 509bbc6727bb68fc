"""Exits: what reads the hidden vectors behind the first layers, so that a forward may end there
(Balcony, LayerSkip).

The head is shared, and the weights of the base stay as they are: exits are modules of their own, in
a file of their own beside the checkpoint. `ceed-vla exits` trains them. A depth without one is read
by the last norm, as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import short
from ceed_vla.files import regular
from ceed_vla.folders import EXITS as EXITS
from ceed_vla.weights import copy_weights, opened

KINDS = ("linear", "layer", "coarse")


class DepthExit(nn.Module):
    """Hidden vectors (B, t, d) of some depth, as the head reads them; its `kind` is one of
    `KINDS`.
    """

    def __init__(
        self, kind: str, norm: nn.Module, width: int, layer: nn.Module | None, slot: int
    ) -> None:
        super().__init__()
        # In float32, as half precision would round most of what it learns away.
        self.kind = kind
        self.norm = deepcopy(norm).float()
        # For kind "layer": one of its own, which the backbone runs before this, and where its keys
        # and values are, behind those of the base's layers.
        self.layer = deepcopy(layer)
        self.slot = slot
        self.branch: nn.Module | None = None  # a `CoarseBranch`, for kind "coarse"
        self.linear = nn.Linear(width, width, bias=False) if layer is None else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)  # at first it is the last norm
            self.linear.to(next(norm.parameters()).device)

    def check(self, committed: int) -> None:
        """Raise `ConfigError` where it would have to see committed tokens, of which it kept
        nothing.
        """
        if self.kind != "linear" and committed:
            raise ConfigError(
                f"An exit of kind {self.kind} has not seen the committed tokens; drafts need kind "
                "linear."
            )

    def beside(self, x: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        """Hidden vectors (B, t, d), which end with those of `blocks` (B, k, d), with what the
        branch makes of these.
        """
        if self.branch is None or not blocks:
            return x
        added = torch.cat([self.branch(block) for block in blocks], dim=1)
        return x + F.pad(added, (0, 0, x.shape[1] - added.shape[1], 0))

    def forward(self, x: Tensor, *more: Any) -> Any:
        """As the norm in whose place it stands; some take and give more."""
        found = self.norm(x.to(next(self.parameters()).dtype), *more)
        own, *rest = found if isinstance(found, tuple) else (found,)
        own = (own if self.linear is None else own + self.linear(own)).to(x.dtype)
        return (own, *rest) if isinstance(found, tuple) else own


def make_exits(backbone: Any, depths: Sequence[int], kind: str) -> dict[int, DepthExit]:
    """New exits of a `TrainableBackbone`, which start from its last norm and the layer that follows
    each depth; `ConfigError` for a kind or depths that there cannot be.
    """
    layers, norm, width = backbone.exit_parts()
    chosen = sorted(set(depths))
    if kind not in KINDS or not chosen or not 1 <= chosen[0] <= chosen[-1] < len(layers):
        raise ConfigError(
            f"Exits of kind {short(kind)} behind layers {short(list(depths))}: the kinds are "
            f"{', '.join(KINDS)}, the layers of this model in [1, {len(layers) - 1}]."
        )
    kinds = [
        {getattr(layer, "attention_type", None) for layer in layers[d - 1 : d + 1]} for d in chosen
    ]
    if kind == "layer" and any(len(found) > 1 for found in kinds):
        raise ConfigError(
            "Here layers attend in several ways; an exit's own would not see the prefix. Use "
            "linear."
        )
    exits = {}
    for slot, depth in enumerate(chosen, start=len(layers)):
        depth_exit = DepthExit(kind, norm, width, layers[depth] if kind == "layer" else None, slot)
        if kind == "coarse":
            depth_exit.branch = backbone.coarse_branch().to(next(norm.parameters()))
        exits[depth] = depth_exit.requires_grad_(True)
        attention = getattr(depth_exit.layer, "self_attn", None)
        if attention is not None:  # of transformers: its place in the cache
            attention.layer_idx = depth_exit.slot
    return exits


def check_linear(exits: Mapping[int, DepthExit], depths: Sequence[int]) -> None:
    """Raise `ConfigError` where an exit that is read beside others has a layer of its own."""
    if any(depth in exits and exits[depth].layer is not None for depth in depths):
        raise ConfigError(
            "Exits of kind layer are not read several at once, as deer and del do; train linear "
            "ones."
        )


def save_exits(backbone: Any, folder: Path) -> None:
    """Write the exits of a backbone; without any, remove those of another policy."""
    exits: dict[int, DepthExit] = backbone.exits
    if not exits:
        (folder / EXITS).unlink(missing_ok=True)
    else:
        kind = next(iter(exits.values())).kind
        tensors = {name: value.contiguous() for name, value in _modules(exits).state_dict().items()}
        save_file(
            tensors, folder / EXITS, metadata={"kind": kind, "depths": ",".join(map(str, exits))}
        )


def described_exits(folder: Path) -> tuple[str, list[int]]:
    """Kind and depths of a checkpoint folder's exits, ("", []) without any; `CheckpointError` for a
    damaged file.
    """
    file = folder / EXITS
    if not file.exists(follow_symlinks=False):
        return "", []
    with opened(regular(file)) as tensors:
        said = tensors.metadata() or {}
    depths = said.get("depths", "").split(",")
    if not all(depth.isascii() and depth.isdecimal() and len(depth) < 6 for depth in depths):
        raise CheckpointError(
            f"{file} says depths {short(said.get('depths'))}; copy the checkpoint again."
        )
    return said.get("kind", ""), [int(depth) for depth in depths]


def load_exits(backbone: Any, folder: Path) -> None:
    """Attach the exits of a checkpoint's folder, if there are any; `CheckpointError` for another
    model's, or damage.
    """
    file, (kind, depths) = folder / EXITS, described_exits(folder)
    if not depths:
        return
    try:
        exits = make_exits(backbone, depths, kind)
    except ConfigError as error:
        raise CheckpointError(f"{file} does not belong to this model: {error}") from error
    missing, unknown = copy_weights(_modules(exits), [file])
    if missing or unknown:
        raise CheckpointError(
            f"{file} does not belong to this model: {short([*missing, *unknown])}."
        )
    backbone.exits = {depth: module.eval().requires_grad_(False) for depth, module in exits.items()}


def _modules(exits: dict[int, DepthExit]) -> nn.ModuleDict:
    return nn.ModuleDict({str(depth): module for depth, module in exits.items()})
