"""Optional capabilities of a model: small protocols, checked where a decoder is chosen.

A model offers a capability if it has its methods and attributes. A decoder lists the capabilities
that it needs when it is registered; the error of `require` names a missing one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from ceed_vla.backbones.base import Prefix
from ceed_vla.errors import ConfigError


class ReadsDepths(Protocol):
    """Logits can be computed after the first layers of a forward."""

    def shallow_logits(self, prefix: Prefix, tokens: Tensor, depth: int) -> Tensor:
        """As `Backbone.block_logits`, through the first `depth` layers and their early-exit layer,
        or else the last norm.

        The cache of the other layers does not change. The tokens can be committed only after a pass
        through all layers.
        """

    def shallow_layers(self, depth: int) -> int:
        """Layers that run in `shallow_logits`: `depth`, and the exit's own layer if it has one."""


class ComparesDepths(Protocol):
    """One forward can compute logits at several depths."""

    def depth_logits(
        self, prefix: Prefix, tokens: Tensor, depths: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        """As `ReadsDepths.shallow_logits` at each of the ascending `depths`, in one forward.

        The exits must be linear.

        Returns:
            Logits (B, k, V) per depth, and the hidden vectors (B, k, d) at the last depth, from
            which `CutsPrefix.continue_block` continues.
        """


class ResumesLayers(Protocol):
    """A forward can run its first layers now and the remaining ones later.

    With ``prefix.cache.behind(a)``, the tokens follow a others whose first layers have run.
    """

    def first_layers(
        self, prefix: Prefix, tokens: Tensor, depth: int, depths: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the first `depth` layers on the next `tokens` (B, k).

        Returns:
            The hidden vectors (B, k, d) behind `depth`, and logits (B, k, V) at each of the
            ascending `depths`, none of which is larger. Their exits must be linear.
        """

    def last_layers(
        self, prefix: Prefix, hidden: Tensor, depth: int, depths: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the layers behind `depth` on the `hidden` vectors (B, k, d) of the next k tokens.

        Returns:
            Logits (B, k, V) as from `Backbone.block_logits`, and those at each of the ascending
            `depths`, all of which are larger than `depth`.
        """


class TrainsDepths(Protocol):
    """Exits can be trained."""

    def packed_depth_logits(
        self, embeddings: Any, blocks: Sequence[Tensor], depth: int
    ) -> list[Tensor]:
        """The logits of `TrainableBackbone.packed_logits`, at one depth."""


class HasExits(Protocol):
    """Early-exit layers can read the hidden vectors behind some layers.

    Attributes:
        exits: Depth -> early-exit layer at that depth; not part of the model's weights.
    """

    exits: Mapping[int, Any]

    def exit_parts(self) -> tuple[Sequence[nn.Module], nn.Module, int]:
        """The layers, the norm behind the last one, and the width ``d``."""


@dataclass
class CutPrefix(Prefix[Any]):
    """A prefix that ran through the first layers only; its logits are those of their exit.

    Attributes:
        depth: Number of these layers.
        hidden: (B, P, d) their output, the input of the next layer.
    """

    depth: int
    hidden: Tensor


class CutsPrefix(Protocol):
    """A prefix can run through the first layers, and through the remaining layers later."""

    def prefill_to(self, observation: dict[str, Tensor], depth: int) -> CutPrefix:
        """Run the prefix through the first `depth` layers."""

    def extend(self, prefix: CutPrefix) -> Prefix:
        """Run a cut prefix through the remaining layers; the cut prefix is invalid afterwards."""

    def continue_block(self, prefix: Prefix, hidden: Tensor, depth: int) -> Tensor:
        """Continue a forward that ended at `depth`, behind the extended prefix.

        Args:
            prefix: From `extend`.
            hidden: (B, k, d) hidden vectors of the forward at `depth`.
            depth: Layers that ran.

        Returns:
            Logits (B, k, V), as from `block_logits`.
        """


class RunsPrograms(Protocol):
    """Layers can be skipped or run several times."""

    def program_logits(self, prefix: Prefix, tokens: Tensor, program: Sequence[int]) -> Tensor:
        """As `Backbone.block_logits`, through the layers that `program` lists, counted from 0.

        The tokens cannot be committed.
        """


class RoutesPrograms(Protocol):
    """A router can choose the program of every chunk.

    Attributes:
        router: The router, if any; not part of the model's weights.
    """

    router: tuple[Any, ...]


class ChoosesPrefix(Protocol):
    """Some tokens of a prefix can be dropped.

    Attributes:
        context: The module that scores them, if any; not part of the model's weights.
    """

    context: tuple[Any, ...]

    def prefix_tokens(self, embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Split the prefix tokens into those that can be dropped and those that always run.

        Returns:
            The tokens (B, P, d) of `embed_prefix`; (B, P) bool, tokens that can be dropped, equally
            many per row; (B, P) bool, tokens that always run.
        """

    def keep_tokens(self, embeddings: Any, kept: Tensor) -> Any:
        """Reduce the result of `embed_prefix` to the tokens `kept` (B, K), ascending indices.

        Every token has the position that it has in the whole prefix.
        """

    def embed_prefix(self, batch: dict[str, Tensor]) -> Any:
        """See `TrainableBackbone.embed_prefix`."""

    def prefill_embeddings(self, embeddings: Any) -> Prefix:
        """`Backbone.prefill` from the result of `embed_prefix`."""

    def exit_parts(self) -> tuple[Sequence[nn.Module], nn.Module, int]:
        """See `HasExits.exit_parts`."""


class SplitsPrefix(Protocol):
    """A prefix of one row can be embedded in parts: every camera alone, then all together.

    Its tokens are in order, without padding, and attend to those before them.
    """

    def camera_tokens(self, camera: str, image: Tensor) -> Tensor:
        """Tokens (1, T, d) of a camera's image (1, 3, H, W), as the preprocessor returns it.

        The language backbone has a third argument, the words (1, W) that its stems read.
        """

    def join_prefix(self, ids: Tensor, state: Tensor, cameras: Sequence[Tensor]) -> Tensor:
        """Embeddings (1, P, d) of a prefix.

        Args:
            ids: (1, L) of the instruction or prompt, without padding.
            state: (1, D) normalised.
            cameras: What `camera_tokens` returned for every camera.
        """


class MakesLayers(Protocol):
    """New layers of the model's kind can be made, with another width."""

    tokens_per_step: int | None

    def new_layer(self, width: int) -> nn.Module:
        """A layer of x (B, T, width) and a mask (T, T), True where attention is allowed."""


class Compiled(Protocol):
    """The forwards are compiled."""

    def compile_now(self, prefix: Prefix) -> None:
        """Compile all code now, so that later chunks are not delayed by it."""


def check_linear(exits: Mapping[int, Any], depths: Sequence[int]) -> None:
    """Raise `ConfigError` unless all exits at `depths` are linear."""
    if any(depth in exits and exits[depth].layer is not None for depth in depths):
        raise ConfigError(
            "The exits are of kind layer; deer, sure, spec and del need linear ones. Use another "
            "decoder, or train kind linear."
        )


def offers(model: object, capability: type) -> bool:
    """Whether a model has all methods and attributes of a capability."""
    return not _missing(model, capability)


def check_whole_prefix(policy: Any, what: str) -> None:
    """Raise `ConfigError` if a policy decodes behind chosen prefix tokens, as it was distilled to,
    because `what` runs its whole prefix.
    """
    decoding = policy.config.decoding
    if ChoosesPrefix in decoding.decoder.needs:
        raise ConfigError(
            f"The policy decodes behind the prefix tokens that its scorer chooses "
            f"({decoding.method}), but {what} runs the whole prefix. Use a student of --kept_by "
            "places, or one without --kept."
        )


def require[C](model: object, capability: type[C], purpose: str) -> C:
    """Return `model`, typed as one with `capability`.

    Raises:
        ConfigError: The model does not offer it; the message names capability, method and
            `purpose`.
    """
    if missing := _missing(model, capability):
        raise ConfigError(
            f"{purpose} needs a model with the capability {capability.__name__}; a "
            f"{type(model).__name__} lacks {', '.join(missing)}. Choose another decoder or model."
        )
    return cast("C", model)


def _missing(model: object, capability: type) -> list[str]:
    """Names of a capability that a model lacks; a wrapper and its inner model must have each."""
    names = [*getattr(capability, "__annotations__", ()), *vars(capability)]
    public = [name for name in names if not name.startswith("_")]
    inner = vars(model).get("backbone") if capability is not Compiled else None
    parts = [model] if inner is None else [model, inner]
    return [name for name in public if not all(hasattr(part, name) for part in parts)]
