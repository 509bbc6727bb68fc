"""What a decoder and a policy need from a model: run the prefix once, then score block tokens
behind it.
"""

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
    """A prefix that has been run."""

    logits: Tensor  # scores (B, V) of the first action token
    cache: C  # keys and values of the prefix; decoders write the block behind them
    dropped: int = field(default=0, kw_only=True)  # tokens that were left out of it

    def moved(self, cache: Any) -> Prefix[Any]:
        """The same in another cache, with logits that no later run of compiled code overwrites."""
        return replace(cast("Prefix[Any]", self), cache=cache, logits=self.logits.clone())


class Backbone(Protocol):
    """A causal model over a block of action tokens.

    What else a model may offer is in `ceed_vla.backbones.capabilities`.

    Attributes:
        block_length: Tokens ``n`` of one block.
        vocabulary_size: Action values ``V`` of one token. No other token has a score.
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
        """Score the successors of `tokens`.

        Args:
            prefix: From `prefill`.
            tokens: (B, k) in ``[0, V)``, in the block slots ``c .. c + k - 1`` with ``c =
                prefix.cache.committed``.

        Returns:
            Logits (B, k, V). Output ``i`` depends on the prefix, the committed tokens and
            ``tokens[:, :i + 1]`` only (causal), and predicts slot ``c + i + 1``. The cache gets
            keys and values uncommitted.
        """


class TrainableBackbone(nn.Module, Backbone):
    """A `Backbone` of a policy: it also knows what it observes, and how it learns.

    Attributes:
        auxiliary: Head of the grounding regression on the state of `packed_logits`; None where
            there is none.
        early_auxiliary: Head of the same regression on what `embed_prefix` returns, which training
            adds; or None.
        augmented_images: Keys of image tensors (B, 3, H, W) in [0, 1] that training shifts and
            brightens.
        exits: Depth -> module that reads the hidden vectors behind it; no part of the weights.
        context: The module that chooses prefix tokens, if there is one; no part of the weights.
        referenced: Names of the weights that a checkpoint leaves in the folder they were read from.
        compilable: What `ceed_vla.compiled.engine` may compile, of "prefill" and "block", which
            runs on a `StaticCache` too.
    """

    auxiliary: nn.Module | None
    early_auxiliary: nn.Module | None
    augmented_images: tuple[str, ...] = ()
    compilable: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        # Attributes of the class would hide submodules.
        self.auxiliary = None
        self.early_auxiliary = None
        # Modules in a dictionary or tuple are not registered.
        self.exits: dict[int, Any] = {}
        self.context: tuple[Any, ...] = ()
        self.referenced: list[str] = []

    @abc.abstractmethod
    def check_observation(self, batch: Mapping[str, Any]) -> int:
        """Check a pre-processed batch and return its rows ``B``; `ObservationError` for a missing
        or wrong feature.
        """

    @abc.abstractmethod
    def embed_prefix(self, batch: dict[str, Tensor]) -> Any:
        """What the block is decoded behind, before the layers that learn in distillation: a tensor
        (B, ...), or an object that rows can be taken of, ``embeddings[rows]``.
        """

    @abc.abstractmethod
    def packed_logits(
        self, embeddings: Any, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Teacher-forced logits of `blocks` (B, n) behind one prefix of `embed_prefix`; they do not
        see each other.

        Returns the hidden vector (B, d) that predicts slot 0, and for every block logits (B, n, V)
        that predict its own tokens 0..n-1.
        """

    def recompute_activations(self) -> None:
        """Keep only the layers' inputs for the backward pass (gradient checkpointing);
        `ConfigError` where none can.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot recompute activations; leave out "
            "--gradient_checkpointing."
        )

    def prefix_state(self, embeddings: Any) -> Tensor:
        """The hidden vector (B, d) of `packed_logits`, without any block."""
        return self.packed_logits(embeddings, [])[0]

    def distillation_parameters(self) -> list[str]:
        """Names of the parameters that learn in distillation; the others make `embed_prefix`."""
        return [name for name, _ in self.named_parameters()]


def runs(model: nn.Module) -> AbstractContextManager[None]:
    """Re-raise errors from running the model as `CheckpointError`."""
    advice = (
        "contradict each other, model and batch have other devices or types, or memory is short."
    )
    return raised_as(
        CheckpointError,
        f"{type(model).__name__} does not run",
        f"the settings in config.json {advice}",
    )
