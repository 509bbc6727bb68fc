"""What a decoder returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class DecodeResult:
    """Decoded block and how it came about.

    Attributes:
        tokens: (B, n) int64.
        forwards: Model calls after the prefill, shared by all rows: block forwards (Jacobi) or
            single-token forwards (AR). The forward that verifies the fixed point is counted.
        iterations: (B,) int64 on the CPU, forwards until this row was done; it no longer changes
            then.
        layer_forwards: (B,) int64 on the CPU, layers that ran in these; None of a decoder means
            all.
        prefix_layers: (B,) int64 on the CPU, layers that the prefix ran through; None of a decoder
            means all.
        exit_reason: Why each row stopped.

            - "complete": AR decoded every token it was asked for.
            - "stop": the stop token of a variable-length vocabulary is proven; the rest of the
              block is filled with it. Rows of such a vocabulary that end otherwise have no proven
              stop token.
            - "converged": every token of the block is proven equal to greedy AR.
            - "stable": every token of the executed steps is proven, the tail not
                (``watch="executed"``).
            - "confidence": the watched slots are confident enough.
            - "max_iterations": the cap.
            - "deadline": the next iteration would have ended too late.
            - "near": drafted tokens counted as right that are only near.
            - "depths_agree", "depth_sure": exits of the first forward were enough.
            - "gap", "agreement", "few_changes", and what exit rules of other packages say.
        exact_tokens: (B,) int64 on the CPU, leading tokens proven equal to greedy AR (behind a
            frozen prefix: to its greedy continuation), at least 1, but where not all layers saw the
            prefix. Those behind are unchecked. "Proven" is up to floating-point
            ties, and for causal backbones.
        exact: (B,) bool on the CPU, ``exact_tokens == n``.
        states: With ``record_states`` the states y(0), y(1), ..., each (B, n); y(0) is the guess
            with the exact first token in it, the last one is `tokens`. For strict Jacobi this is
            the trajectory to train on; where the last forward only verified, the last two states
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
