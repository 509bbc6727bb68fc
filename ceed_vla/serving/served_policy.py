"""What a `Predictor` needs of a policy, whichever engine runs it. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ceed_vla.serving.predictor_types import Request


@dataclass(frozen=True)
class DecodeOptions:
    """How one chunk is decoded; see `ceed_vla.modeling_ceed_vla.CeedVLAPolicy.decode`.

    Attributes:
        decoding: The decoding; None for policies with only one way to decode.
        executed_steps: Steps executed before the next replan; None: as the checkpoint declares.
        frozen_steps: Steps at the start, copied from the previous chunk.
        deadline_s: Time limit for the block after the prefill [s]; None: no limit.
        on_proven: Receives tokens, the number of those that are certain, and the forwards.
    """

    decoding: Any = None
    executed_steps: int | None = None
    frozen_steps: int = 0
    deadline_s: float | None = None
    on_proven: Callable[[Any, int, int], None] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a policy's ``decode_behind``."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True)
class Decoded:
    """One decoded chunk; see `ceed_vla.serving.predictor_types.Response`."""

    actions: NDArray[np.float32]  # (m, A)
    tokens: NDArray[np.int64] | None = None  # (n,)
    forwards: int = 0
    exit_reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # "prefill", "decode" [s]


class ServedPolicy(Protocol):
    """A loaded policy."""

    @property
    def engine(self) -> str:
        """Name of the engine."""

    @property
    def vocabulary(self) -> set[str]:
        """Words of its instructions; empty if it accepts any word."""

    @property
    def tokens_per_step(self) -> int | None:
        """None for policies without tokens, and for tokens of variable length, which can be neither
        frozen nor counted in steps.
        """

    @property
    def chunk_steps(self) -> int | None:
        """Steps of a chunk; None if only a chunk shows them."""

    @property
    def n_action_steps(self) -> int | None:
        """Steps that are executed by default; None: all."""

    @property
    def decodings(self) -> Collection[str]:
        """The checkpoint's own names for decoders."""

    def decoding_config(self, name: str) -> Any:
        """The decoding that a name specifies; None for policies with only one way to decode.

        Raises:
            ConfigError: The name is unknown, or the engine does not run it.
        """

    def read(self, request: Request) -> Any:
        """Convert a request to the policy's inputs.

        Raises:
            ObservationError: Features are missing or wrong.
            InstructionError: The policy does not accept the instruction.
        """

    def compile(self, request: Request, decoding: Any) -> None:
        """Compile what decoding a request needs, if the engine compiles."""

    def decode(self, inputs: Any, request: Request, options: DecodeOptions) -> Decoded:
        """Decode one chunk of `inputs`, behind the tokens of `request`."""

    @property
    def joins(self) -> bool:
        """Whether `decode_together` can be called."""

    def shape_of(self, inputs: Any) -> Hashable:
        """What inputs must share to be decoded together."""

    def decode_together(
        self, inputs: Sequence[Any], requests: Sequence[Request], options: DecodeOptions
    ) -> list[Decoded]:
        """Decode several chunks at once, as `decode` does each; all requests have the same frozen
        and executed steps.

        Raises:
            Exception: Of any type, if one of them cannot be decoded.
        """

    def actions(self, tokens: Any) -> NDArray[np.float32]:
        """Actions (m, A) of the tokens that `on_proven` received."""
