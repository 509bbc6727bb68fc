"""What a decoder returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class DecodeResult:
    """A decoded block, and how decoding went; results of `ceed_vla.edge` hold arrays of numpy.

    Attributes:
        tokens: (B, n) int64.
        forwards: Model calls after the prefill, shared by all rows: block forwards (Jacobi) or
            single-token forwards (AR). The forward that verifies the fixed point is counted.
        iterations: (B,) int64 on the CPU, forwards until this row ended; its tokens do not change
            afterwards.
        layer_forwards: (B,) int64 on the CPU, layers that ran in these forwards; a decoder that
            returns None ran all.
        prefix_layers: (B,) int64 on the CPU, layers that the prefix ran through; a decoder that
            returns None ran all.
        exit_reason: Why each row stopped.

            - "complete": AR decoded every requested token.
            - "stop": the stop token of a variable-length vocabulary is proven; the rest of the
              block is filled with it. Rows of such a vocabulary that end otherwise have no proven
              stop token.
            - "converged": every token of the block is proven equal to greedy AR (after ``keep<K>``:
              behind the prefix tokens that ran).
            - "stable": every token of the executed steps is proven, but not the tail
                (``watch="executed"``).
            - "confidence": the watched slots are confident enough.
            - "max_iterations": the cap.
            - "deadline": the next iteration would have ended too late.
            - "near": drafted tokens were accepted that are only near the right ones.
            - "depths_agree", "depth_sure", "program_sure": the first forward, through some of the
              layers, sufficed.
            - "gap", "agreement", "few_changes", and the reasons of other packages' exit rules.
        exact_tokens: (B,) int64 on the CPU, leading tokens proven equal to greedy AR (behind frozen
            tokens: to their greedy continuation). At least 1, unless the prefix ran through a part
            of the layers. Later tokens are unchecked. "Proven" holds for causal backbones, up to
            floating-point ties.
        exact: (B,) bool on the CPU, ``exact_tokens == n``.
        states: With ``record_states`` the states y(0), y(1), ..., each (B, n); y(0) is the guess
            with the exact first token in slot 0, the last state is `tokens`. For strict Jacobi this
            is the trajectory to train on; where the last forward only verified, the last two states
            are equal.
        actions: (B, m, A) in the tokenizer's units, filled by the policy.
        seconds: Times "prefill" and "decode" [s], filled by the policy.
    """

    tokens: Tensor
    forwards: int
    iterations: Tensor
    exit_reason: list[str]
    exact_tokens: Tensor
    exact: Tensor
    layer_forwards: Tensor | None = None
    prefix_layers: Tensor | None = None
    states: list[Tensor] | None = None
    actions: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
