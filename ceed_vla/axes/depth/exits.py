"""Exits: modules that read the hidden vectors behind the first layers, so that a forward may end
there (Balcony, LayerSkip).

The head is shared, and the weights of the base stay as they are: exits are saved in a file of their
own beside the checkpoint. `ceed-vla exits` trains them. A depth without one is read by the last
norm, as it is.
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
    """Reads hidden vectors (B, t, d) of some depth as the head wants them, by a norm.

    Args:
        norm: The model's last norm, which is copied; in float32, as half precision would round
            most of what an exit learns away.

    Attributes:
        layer: A layer of its own, which runs before the norm; None in most kinds.
    """

    kind = ""
    layer: nn.Module | None

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = deepcopy(norm).float()
        self.layer = None

    def check(self, committed: int) -> None:
        """Raise `ConfigError` for committed tokens, where the exit would have had to see them."""
        if committed:
            raise ConfigError(
                f"An exit of kind {self.kind} has not seen the committed tokens; drafts need kind "
                "linear."
            )

    def see_prefix(self, x: Tensor, cache: Any) -> None:
        """Called with the hidden vectors (B, P, d) of the prefix at this depth."""

    def read(self, x: Tensor, cache: Any, mask: Tensor | None, blocks: Sequence[Tensor]) -> Tensor:
        """Hidden vectors (B, t, d) of the compact model as its head reads them.

        Args:
            x: Behind the layers of this depth.
            cache: Where keys and values are, or None where the prefix is in `x`.
            mask: Which positions may be attended to; None for all.
            blocks: Embedded tokens (B, k, d), which belong to the last vectors of `x`.
        """
        found: Tensor = self(x)
        return found

    def adjust(self, own: Tensor) -> Tensor:
        """What becomes of normalised vectors (B, t, d)."""
        return own

    def forward(self, x: Tensor, *more: Any) -> Any:
        """As the norm in whose place it stands; some norms take and return more."""
        found = self.norm(x.to(next(self.parameters()).dtype), *more)
        own, *rest = found if isinstance(found, tuple) else (found,)
        own = self.adjust(own).to(x.dtype)
        return (own, *rest) if isinstance(found, tuple) else own


class LinearExit(DepthExit):
    """A norm and a residual linear layer, at first zero."""

    kind = "linear"

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__(norm)
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.linear.to(next(norm.parameters()).device)

    def check(self, committed: int) -> None:
        """It reads each token alone."""

    def adjust(self, own: Tensor) -> Tensor:
        return own + self.linear(own)


class LayerExit(DepthExit):
    """A layer of its own and a norm.

    Args:
        norm: The model's last norm.
        layer: The layer that follows this depth, which is copied.
        slot: Where its keys and values are, behind those of the base's layers.
    """

    kind = "layer"

    def __init__(self, norm: nn.Module, layer: nn.Module, slot: int) -> None:
        super().__init__(norm)
        self.layer = deepcopy(layer)
        self.slot = slot
        attention = getattr(self.layer, "self_attn", None)
        if attention is not None:  # of transformers: its place in the cache
            attention.layer_idx = slot

    def see_prefix(self, x: Tensor, cache: Any) -> None:
        layer: Any = self.layer
        _, k, v = layer.project(x)
        cache.write(self.slot, k, v)

    def read(self, x: Tensor, cache: Any, mask: Tensor | None, blocks: Sequence[Tensor]) -> Tensor:
        layer: Any = self.layer
        q, k, v = layer.project(x)
        if cache is not None:
            self.check(cache.committed)
            k, v = cache.write(self.slot, k, v)
        found: Tensor = self(layer.finish(x, q, k, v, mask))
        return found


# Kind -> makes one, of a backbone, its layers, its last norm, its width, a depth and a free slot.
MakeExit = Callable[[Any, Sequence[nn.Module], nn.Module, int, int, int], DepthExit]
KINDS: dict[str, MakeExit] = {
    "linear": lambda backbone, layers, norm, width, depth, slot: LinearExit(norm, width),
    "layer": lambda backbone, layers, norm, width, depth, slot: LayerExit(
        norm, layers[depth], slot
    ),
}


def make_exits(backbone: Any, depths: Sequence[int], kind: str) -> dict[int, DepthExit]:
    """New exits of a model, which start from its last norm and the layer that follows each depth.

    Raises:
        ConfigError: The model has no exits, or none of this kind or at these depths.
    """
    layers, norm, width = require(backbone, HasExits, "An exit").exit_parts()
    chosen = sorted(set(depths))
    if kind not in KINDS or not chosen or not 1 <= chosen[0] <= chosen[-1] < len(layers):
        raise ConfigError(
            f"Exits of kind {short(kind)} behind layers {short(list(depths))}: the kinds are "
            f"{', '.join(KINDS)}, the layers of this model in [1, {len(layers) - 1}]."
        )
    attention = [
        {getattr(layer, "attention_type", None) for layer in layers[d - 1 : d + 1]} for d in chosen
    ]
    if kind == "layer" and any(len(found) > 1 for found in attention):
        raise ConfigError(
            "Here layers attend in several ways; an exit's own would not see the prefix. Use "
            "linear."
        )
    return {
        depth: KINDS[kind](backbone, layers, norm, width, depth, slot).requires_grad_(True)
        for slot, depth in enumerate(chosen, start=len(layers))
    }


def save_exits(backbone: Any, folder: Path) -> None:
    """Write the exits of a backbone; without any, remove those of another policy."""
    exits: Mapping[int, DepthExit] = getattr(backbone, "exits", {})
    if not exits:
        (folder / EXITS).unlink(missing_ok=True)
        return
    about = {"kind": next(iter(exits.values())).kind, "depths": ",".join(map(str, exits))}
    tensors = {name: value.contiguous() for name, value in _modules(exits).state_dict().items()}
    save_file(tensors, folder / EXITS, metadata=about)


def load_exits(backbone: Any, folder: Path) -> None:
    """Attach the exits of a checkpoint's folder, if there are any.

    Raises:
        CheckpointError: They are another model's, or damaged.
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
