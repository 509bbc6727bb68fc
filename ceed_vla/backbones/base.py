"""The protocol of a model: run the prefix once, then compute logits of block tokens behind it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from torch import Tensor, nn

from ceed_vla.backbones.features import check_features as check_features
from ceed_vla.cache import BlockCache
from ceed_vla.errors import CheckpointError, ConfigError, raised_as


@dataclass
class Prefix[C: BlockCache]:
    """A prefilled prefix."""

    logits: Tensor  # (B, V) of the first action token
    cache: C  # keys and values of the prefix; decoders write the block behind them
    dropped: int = field(default=0, kw_only=True)  # prefix tokens that did not run
    # exits' own layers that ran on it, besides those of the model
    more_layers: int = field(default=0, kw_only=True)
    # (B, d) hidden vector behind the last layer that predicts slot 0, if the model returns it
    state: Tensor | None = field(default=None, kw_only=True)

    def moved(self, cache: Any) -> Prefix[Any]:
        """The same prefix in another cache.

        Logits and state are copied, because compiled code reuses their memory.
        """
        state = None if self.state is None else self.state.clone()
        own = cast("Prefix[Any]", self)
        return replace(own, cache=cache, logits=self.logits.clone(), state=state)


class Backbone(Protocol):
    """A causal model over a block of action tokens.

    `ceed_vla.backbones.capabilities` has the optional capabilities of a model.

    Attributes:
        block_length: Tokens ``n`` of one block.
        vocabulary_size: Action values ``V`` of one token. Only these have logits.
        num_layers: Layers of a forward.
    """

    block_length: int
    vocabulary_size: int
    num_layers: int

    @abc.abstractmethod
    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        """Run the prefix of every row once."""

    @abc.abstractmethod
    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """Compute the logits of the successors of `tokens`.

        Args:
            prefix: From `prefill`.
            tokens: (B, k) in ``[0, V)``, in the block slots ``c .. c + k - 1`` with ``c =
                prefix.cache.committed``.

        Returns:
            Logits (B, k, V). Output ``i`` depends on the prefix, the committed tokens and
            ``tokens[:, :i + 1]`` only (causal), and predicts slot ``c + i + 1``. Keys and values
            are written to the cache but not committed.
        """


class TrainableBackbone(nn.Module, Backbone):
    """A `Backbone` of a policy, which also validates observations and can be trained.

    Attributes:
        auxiliary: Head of the grounding regression on the state vector of `packed_logits`, or None.
        early_auxiliary: Head of the same regression on the result of `embed_prefix`, which training
            adds; or None.
        augmented_images: Keys of image tensors (B, 3, H, W) in [0, 1] that training shifts and
            brightens.
        exits: Depth -> early-exit layer at that depth; not part of the weights.
        context: The module that scores prefix tokens, if any; not part of the weights.
        router: The module that chooses the layers of a chunk, if any; not part of the weights.
        referenced: Names of the weights that a checkpoint does not store, but reads from another
            folder.
        new_parts: Modules without pretrained weights, which learn beside low-rank adapters, too.
        compilable: The parts that `ceed_vla.compiled.engine` may compile: "prefill", and "block",
            which must also run on a `StaticCache`.
    """

    auxiliary: nn.Module | None
    early_auxiliary: nn.Module | None
    augmented_images: tuple[str, ...] = ()
    compilable: tuple[str, ...] = ()
    new_parts: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        # Set here, as class attributes would hide submodules of these names.
        self.auxiliary = None
        self.early_auxiliary = None
        # Modules in a dictionary or tuple are not registered as submodules.
        self.exits: dict[int, Any] = {}
        self.context: tuple[Any, ...] = ()
        self.router: tuple[Any, ...] = ()
        self.referenced: list[str] = []

    @abc.abstractmethod
    def check_observation(self, batch: Mapping[str, Any]) -> int:
        """Validate a preprocessed batch and return the number of its rows ``B``.

        Raises:
            ObservationError: A feature is missing or wrong.
        """

    @abc.abstractmethod
    def embed_prefix(self, batch: dict[str, Tensor]) -> Any:
        """Embed the prefix, before the layers that learn in distillation.

        Returns:
            A tensor (B, ...), or an object that can be indexed by rows, ``embeddings[rows]``.
        """

    @abc.abstractmethod
    def packed_logits(
        self, embeddings: Any, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute teacher-forced logits of several blocks behind one prefix, in one forward.

        Args:
            embeddings: The prefix, from `embed_prefix`.
            blocks: Blocks (B, n), which do not attend to each other.

        Returns:
            The hidden vector (B, d) that predicts slot 0, and for every block the logits (B, n, V)
            of its tokens 0..n-1.
        """

    def recompute_activations(self) -> None:
        """Turn on gradient checkpointing: store only the layers' inputs for the backward pass.

        Raises:
            ConfigError: The model does not support it.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot recompute activations; leave out "
            "--gradient_checkpointing."
        )

    def prefix_state(self, embeddings: Any) -> Tensor:
        """The hidden vector (B, d) that `packed_logits` returns, without any block."""
        return self.packed_logits(embeddings, [])[0]

    def distillation_parameters(self) -> list[str]:
        """Names of the parameters that distillation trains; all others belong to `embed_prefix`."""
        return [name for name, _ in self.named_parameters()]


def runs(model: nn.Module) -> AbstractContextManager[None]:
    """Re-raise errors from running the model as `CheckpointError`."""
    advice = (
        "the settings in config.json contradict each other, model and batch differ in device or "
        "dtype, or memory is short."
    )
    return raised_as(CheckpointError, f"{type(model).__name__} does not run", advice)
