"""Measurements of a teacher: localisation of objects, and tokens on held-out episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ceed_vla.errors import ConfigError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.training.summary import HeldOut, Summary, mean_forwards, token_accuracy


def check_localisation(errors: Mapping[str, float], gate: float, steps: int) -> None:
    """Raise `ConfigError` unless a policy localises objects.

    Args:
        errors: Median errors [m] after grounding, by object.
        gate: Largest error [m] that passes.
        steps: Grounding steps that were taken, for the message.
    """
    over = {name: error for name, error in errors.items() if not error <= gate}
    if over:
        worst = max(over, key=lambda name: over[name])
        raise ConfigError(
            f"After {steps} grounding steps the median error of {worst} is "
            f"{100 * over[worst]:.1f} cm; {len(over)} of {len(errors)} are over "
            f"--grounding_gate={gate:g} m. A policy that does not localise objects cannot learn "
            "from actions. Continue with --resume=true and more --grounding_steps, set more "
            "--grounding_roots, or measure with `ceed-vla grounding`."
        )


def add_token_accuracy(
    summary: Summary,
    held: HeldOut,
    policy: CeedVLAPolicy,
    forward: Any,
    batches: Callable[[], Iterator[dict[str, Any]]],
) -> None:
    """Add the token accuracy of a policy on held-out episodes to a summary.

    Args:
        summary: It receives the values and a line.
        held: The held-out frames.
        policy: See `token_accuracy`.
        forward: See `token_accuracy`.
        batches: Returns an iterator of the frames' preprocessed batches.
    """
    found = token_accuracy(policy, forward, batches())
    summary.measured |= found
    summary.lines.append(
        f"Token accuracy {found['held_out_token_accuracy']:.3f} on {held}, with correct previous "
        f"tokens; {found['constant_token_accuracy']:.3f} for the most frequent token of every slot"
    )


def add_forwards(summary: Summary, policy: CeedVLAPolicy, batch: dict[str, Any]) -> None:
    """Add the forwards of a chunk, token by token and with strict Jacobi decoding, to a summary."""
    strict = mean_forwards(policy, batch, "jacobi")
    summary.measured["jacobi_forwards"] = strict
    summary.lines.append(
        f"Forwards a chunk: {policy.config.block_length - 1} token by token, {strict:.1f} with "
        "strict Jacobi"
    )
