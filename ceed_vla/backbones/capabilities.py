"""What a model may offer beside `Backbone`: small protocols, checked where a decoder is chosen.

A model offers a capability by having its methods and attributes. A decoder names those that it
needs where it is registered; `require` says which one is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from ceed_vla.backbones.base import Prefix
from ceed_vla.errors import ConfigError


class ReadsDepths(Protocol):
    """The first layers of a forward can be read."""

    def shallow_logits(self, prefix: Prefix, tokens: Tensor, depth: int) -> Tensor:
        """As `Backbone.block_logits`, of the first `depth` layers and their exit, or else the last
        norm.

        The cache of the other layers is not touched, and nothing can be committed before a pass
        through all.
        """

    def shallow_layers(self, depth: int) -> int:
        """Layers that run in `shallow_logits`: `depth`, and an exit's own if it has one."""


class ComparesDepths(Protocol):
    """One forward can be read at several depths."""

    def depth_logits(
        self, prefix: Prefix, tokens: Tensor, depths: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        """As `ReadsDepths.shallow_logits` at each of the ascending `depths`, from one forward to
        the last one.

        Linear exits only. The second is what `CutsPrefix.continue_block` goes on with.
        """


class TrainsDepths(Protocol):
    """Exits can be trained."""

    def packed_depth_logits(
        self, embeddings: Any, blocks: Sequence[Tensor], depth: int
    ) -> list[Tensor]:
        """As the logits of `TrainableBackbone.packed_logits`, at a depth."""


class HasExits(Protocol):
    """Modules may read the hidden vectors behind some layers.

    Attributes:
        exits: Depth -> the module that reads it. They are no part of the model's weights.
    """

    exits: Mapping[int, Any]

    def exit_parts(self) -> tuple[Sequence[nn.Module], nn.Module, int]:
        """The layers, the norm behind the last one, and the width ``d``."""


@dataclass
class CutPrefix(Prefix[Any]):
    """A prefix that only the first layers have seen; its logits are those of their exit.

    Attributes:
        depth: How many layers.
        hidden: What they made of it (B, P, d), for the layers that follow.
    """

    depth: int
    hidden: Tensor


class CutsPrefix(Protocol):
    """A prefix can be run through the first layers alone, and through the others later."""

    def prefill_to(self, observation: dict[str, Tensor], depth: int) -> CutPrefix:
        """Run the prefix through the first `depth` layers."""

    def extend(self, prefix: CutPrefix) -> Prefix:
        """Run a cut prefix, which may not be used any more, through the other layers."""

    def continue_block(self, prefix: Prefix, hidden: Tensor, depth: int) -> Tensor:
        """What `block_logits` gives for the tokens of a forward that ended at `depth`, behind the
        extended prefix.
        """


class RunsPrograms(Protocol):
    """Layers can be left out, and run several times."""

    def program_logits(self, prefix: Prefix, tokens: Tensor, program: Sequence[int]) -> Tensor:
        """As `Backbone.block_logits`, through the layers of `program`, counted from 0, in its
        order; nothing of it can be committed.
        """


class ChoosesPrefix(Protocol):
    """Some tokens of a prefix can be left out.

    Attributes:
        context: The module that scores them, if there is one; no part of the model's weights.
    """

    context: tuple[Any, ...]

    def prefix_tokens(self, embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, P, d) of what `embed_prefix` made; which (B, P) may go, equally many a row;
        and which stay.
        """

    def keep_tokens(self, embeddings: Any, kept: Tensor) -> Any:
        """What `embed_prefix` made, of the tokens `kept` (B, K) alone, in order and each at its own
        position.
        """

    def embed_prefix(self, batch: dict[str, Tensor]) -> Any:
        """See `TrainableBackbone.embed_prefix`."""

    def prefill_embeddings(self, embeddings: Any) -> Prefix:
        """`Backbone.prefill` of what `embed_prefix` made."""

    def exit_parts(self) -> tuple[Sequence[nn.Module], nn.Module, int]:
        """See `HasExits.exit_parts`."""


class MakesLayers(Protocol):
    """New layers of the model's kind can be made, of another width."""

    tokens_per_step: int | None

    def new_layer(self, width: int) -> nn.Module:
        """A layer of x (B, T, width) with a mask (T, T), True where attention is allowed."""


class Compiled(Protocol):
    """The forwards are compiled."""

    def compile_now(self, prefix: Prefix) -> None:
        """Compile all that some chunk would wait for otherwise."""


def check_linear(exits: Mapping[int, Any], depths: Sequence[int]) -> None:
    """Raise `ConfigError` where an exit that is read beside others has a layer of its own."""
    if any(depth in exits and exits[depth].layer is not None for depth in depths):
        raise ConfigError(
            "Exits of kind layer are not read several at once, as deer and del do; train linear "
            "ones."
        )


def offers(model: object, capability: type) -> bool:
    """Whether a model has all that a capability consists of."""
    return not _missing(model, capability)


def require[C](model: object, capability: type[C], purpose: str) -> C:
    """The `model` as one with a `capability`.

    Raises:
        ConfigError: It does not offer that; the text names capability, method and `purpose`.
    """
    if missing := _missing(model, capability):
        raise ConfigError(
            f"{purpose} needs a model with the capability {capability.__name__}; a "
            f"{type(model).__name__} lacks {', '.join(missing)}. Choose another decoder or model."
        )
    return cast("C", model)


def _missing(model: object, capability: type) -> list[str]:
    """What a model lacks of a capability; one that wraps another offers what both have."""
    names = [*getattr(capability, "__annotations__", ()), *vars(capability)]
    public = [name for name in names if not name.startswith("_")]
    inner = vars(model).get("backbone") if capability is not Compiled else None
    parts = [model] if inner is None else [model, inner]
    return [name for name in public if not all(hasattr(part, name) for part in parts)]
