"""Early-exit layers: modules that read the hidden vectors behind the first layers, so that a
forward can end there (Balcony, LayerSkip).

All depths share the model's head. `ceed-vla exits` trains these modules on a frozen model and saves
them in a file of their own in the checkpoint. At a depth without one, the model's last norm reads
the hidden vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ceed_vla.axes.exit_file import described_exits
from ceed_vla.backbones.capabilities import HasExits, require
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import short
from ceed_vla.folders import EXITS as EXITS
from ceed_vla.weights import copy_weights


class DepthExit(nn.Module):
    """Maps hidden vectors (B, t, d) of one depth to the input of the head, with a norm.

    Args:
        norm: The model's last norm. It is copied in float32, because half precision would round
            away most of what an exit learns.

    Attributes:
        layer: The exit's own layer, which runs before the norm; None in most kinds.
    """

    kind = ""
    layer: nn.Module | None

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = deepcopy(norm).float()
        self.layer = None

    def check(self, committed: int) -> None:
        """Raise `ConfigError` if tokens are committed that the exit had to read."""
        if committed:
            raise ConfigError(
                f"An exit of kind {self.kind} has not seen the committed tokens; drafts need kind "
                "linear."
            )

    def see_prefix(self, x: Tensor, cache: Any) -> None:
        """Read the hidden vectors (B, P, d) of the prefix at this depth."""

    def read(self, x: Tensor, cache: Any, mask: Tensor | None, blocks: Sequence[Tensor]) -> Tensor:
        """Map hidden vectors (B, t, d) of the compact model to the input of its head.

        Args:
            x: (B, t, d) hidden vectors behind the layers of this depth.
            cache: Keys and values; None if `x` includes the prefix.
            mask: True where attention is allowed; None allows all positions.
            blocks: Embedded tokens (B, k, d) of the blocks, which the last vectors of `x` belong
                to.

        Returns:
            (B, t, d).
        """
        found: Tensor = self(x)
        return found

    def adjust(self, own: Tensor) -> Tensor:
        """Change the normalised vectors (B, t, d)."""
        return own

    def forward(self, x: Tensor, *more: Any) -> Any:
        """Replace the norm; the norms of some models take and return further values."""
        found = self.norm(x.to(next(self.parameters()).dtype), *more)
        own, *rest = found if isinstance(found, tuple) else (found,)
        own = self.adjust(own).to(x.dtype)
        return (own, *rest) if isinstance(found, tuple) else own


class LinearExit(DepthExit):
    """A norm and a residual linear layer, which is initialised with zeros."""

    kind = "linear"

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__(norm)
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.linear.to(next(norm.parameters()).device)

    def check(self, committed: int) -> None:
        """Accept committed tokens: a linear exit reads each token alone."""

    def adjust(self, own: Tensor) -> Tensor:
        return own + self.linear(own)


class LayerExit(DepthExit):
    """A layer and a norm.

    Args:
        norm: The model's last norm.
        layer: The model's layer that follows this depth; it is copied.
        slot: Index of its keys and values in the cache, behind those of the model's layers.
    """

    kind = "layer"

    def __init__(self, norm: nn.Module, layer: nn.Module, slot: int) -> None:
        super().__init__(norm)
        self.layer = deepcopy(layer)
        self.slot = slot
        attention = getattr(self.layer, "self_attn", None)
        if attention is not None:  # a layer of transformers: its index in the cache
            attention.layer_idx = slot

    def see_prefix(self, x: Tensor, cache: Any) -> None:
        layer: Any = self.layer
        _, k, v = layer.project(x)
        cache.write(self.slot, k, v)

    def read(self, x: Tensor, cache: Any, mask: Tensor | None, blocks: Sequence[Tensor]) -> Tensor:
        layer: Any = self.layer
        q, k, v = layer.project(x)
        if cache is not None:
            self.check(cache.committed + cache.ahead)
            k, v = cache.write(self.slot, k, v)
        found: Tensor = self(layer.finish(x, q, k, v, mask))
        return found


# Kind -> constructor: backbone, its layers, its last norm, width, depth, free slot of the cache.
MakeExit = Callable[[Any, Sequence[nn.Module], nn.Module, int, int, int], DepthExit]
KINDS: dict[str, MakeExit] = {
    "linear": lambda backbone, layers, norm, width, depth, slot: LinearExit(norm, width),
    "layer": lambda backbone, layers, norm, width, depth, slot: LayerExit(
        norm, layers[depth], slot
    ),
}


def make_exits(backbone: Any, depths: Sequence[int], kind: str) -> dict[int, DepthExit]:
    """Make new exits for a model from its last norm and the layer that follows each depth.

    Raises:
        ConfigError: The model supports no exits, or none of this kind or at these depths.
    """
    layers, norm, width = require(backbone, HasExits, "An exit").exit_parts()
    chosen = sorted(set(depths))
    if kind not in KINDS or not chosen or not 1 <= chosen[0] <= chosen[-1] < len(layers):
        raise ConfigError(
            f"The exits are of kind {short(kind)} behind layers {short(list(depths))}; the kind "
            f"must be one of {', '.join(KINDS)}, and the layers of this model in [1, "
            f"{len(layers) - 1}]."
        )
    attention = [
        {getattr(layer, "attention_type", None) for layer in layers[d - 1 : d + 1]} for d in chosen
    ]
    if kind == "layer" and any(len(found) > 1 for found in attention):
        raise ConfigError(
            "The kind is layer, but this model's layers have several attention types, so the "
            "exit's own layer could not read the prefix. Use kind linear."
        )
    return {
        depth: KINDS[kind](backbone, layers, norm, width, depth, slot).requires_grad_(True)
        for slot, depth in enumerate(chosen, start=len(layers))
    }


def save_exits(backbone: Any, folder: Path) -> None:
    """Write the exits of a backbone into a folder; without any, remove an earlier policy's."""
    exits: Mapping[int, DepthExit] = getattr(backbone, "exits", {})
    if not exits:
        (folder / EXITS).unlink(missing_ok=True)
        return
    about = {"kind": next(iter(exits.values())).kind, "depths": ",".join(map(str, exits))}
    tensors = {name: value.contiguous() for name, value in _modules(exits).state_dict().items()}
    save_file(tensors, folder / EXITS, metadata=about)


def load_exits(backbone: Any, folder: Path) -> None:
    """Attach the exits of a checkpoint folder to a backbone, if there are any.

    Raises:
        CheckpointError: The file is damaged, or belongs to another model.
    """
    file = folder / EXITS
    kind, depths = described_exits(folder)
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


def _modules(exits: Mapping[int, DepthExit]) -> nn.ModuleDict:
    return nn.ModuleDict({str(depth): module for depth, module in exits.items()})
