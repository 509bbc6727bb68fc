"""Parallel decoding of one block as a fixed point (Jacobi iteration), with exit rules.

    y_0 = argmax p(. | x),    y_i(j + 1) = argmax p(. | y_<i(j), x)    for all i > 0 at once

In a causal model the first slot that an iteration changes is itself right afterwards: everything before it
was a fixed point already. So every iteration proves at least one more token, the proven ones are committed to
the cache and never computed again, and the fixed point, reached in fewer than ``n`` iterations, is the greedy
autoregressive block.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.exits import ExitRules, Rows, after_stop, window_mass
from ceed_vla.decoding.finite import check_rows, with_sums
from ceed_vla.decoding.frozen import frozen_length
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.tensors import check_tokens


@torch.no_grad()
def decode_jacobi(
    backbone: Backbone,
    prefix: Prefix,
    guess: Tensor,
    config: DecodingConfig,
    *,
    action_dim: int,
    gripper_dims: tuple[int, ...] = (),
    frozen: Tensor | None = None,
    stop: int | None = None,
    record_states: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeResult:
    """Decode a block from `guess` until every row meets an exit rule of `config`.

    The first iteration computes the whole block, so its tail is a useful warm start; the next ones stop at
    the slots that must converge. Rows that are done stay as they are while the others go on. The only look at
    the host is the convergence test, once an iteration. Several blocks may be decoded behind one prefix: the
    cache is rolled back at the start.

    A frozen prefix costs no forward of its own: the first iteration reads it together with the guess behind
    it, keeps it, and proves the first free token.

    Args:
        backbone: The model.
        prefix: From ``backbone.prefill``.
        guess: First state (B, n) int64; slot 0 is ignored, as the prefix knows it, and so are frozen slots.
        config: Exit rules; `DecodingConfig.strict` ones give greedy AR. Its `method` and `guess` are not
            read.
        action_dim: Tokens ``A`` of one step.
        gripper_dims: Dimensions whose tolerance is always 0.
        frozen: (B, k * A) int64, given tokens of the first ``k`` steps; see `ceed_vla.decoding.frozen`.
        stop: Token that ends a row of a variable-length vocabulary as soon as it is proven. Executed steps
            are then not read, as every step needs every token.
        record_states: Keep every state.
        clock: Time in seconds, for the deadline.

    Returns:
        Tokens and what happened; `DecodeResult` explains the exit reasons.

    Raises:
        TokenError: A guess or frozen tokens of another shape or with tokens outside the vocabulary.
        ConfigError: Executed steps or tolerances that do not fit the block.
        NotFiniteError: Scores of a running row are NaN or infinite.
    """
    started = iteration_started = clock()
    batch, n = prefix.logits.shape[0], backbone.block_length
    check_tokens(guess, "The guess", (batch, n), backbone.vocabulary_size)
    given = frozen_length(frozen, batch, n, action_dim, backbone.vocabulary_size)
    rules = ExitRules.of(config, n, action_dim, gripper_dims, given, stop)
    rows = Rows(rules, batch)
    prefix.cache.roll_back()

    tokens = guess.to(prefix.logits.device, torch.int64, copy=True)  # (B, n)
    if frozen is not None and given:
        tokens[:, :given] = frozen
    best, first_tokens = prefix.logits.max(-1, keepdim=True)  # (B, 1)
    if not given:
        tokens[:, :1] = first_tokens
    both = with_sums(tokens, best, backbone).cpu().numpy()
    check_rows(both[:, n])
    host = both[:, :n].astype(np.int64)  # (B, n), the state that the convergence test compares with
    certainty = _first_certainty(rules, prefix.logits)  # (B, M), or None
    states = [tokens.clone()] if record_states else None

    rows.stop_at_once(host[:, 0])

    window = config.window or n
    end, forwards = min(n, max(given, 1) + window), 0  # slots [0, end) are computed
    while end > max(given, 1) and rows.any_running:
        start = prefix.cache.committed  # slots [0, start] are right in every running row
        first = max(start + 1, given)
        logits, best, new = jacobi_iteration(
            backbone, prefix, tokens, first, end, rows
        )  # slots first .. end - 1
        forwards += 1
        watched = _watched_mass(rules, logits, new, first)  # (B, watched), or none
        both = with_sums(new, best, backbone, *watched).cpu().numpy()  # the one host synchronisation
        fresh, sums = both[:, : new.shape[1]].astype(np.int64), both[:, new.shape[1]]
        check_rows(sums, rows.running)
        if certainty is not None:
            certainty[:, first:] = both[:, new.shape[1] + 1 :]
        rows.update(forwards, host[:, first:end], fresh, first, certainty)
        host[:, first:end] = fresh
        if states is not None:
            states.append(tokens.clone())
        if rows.any_running:
            # The last right slot is an input of the next iteration; everything before it is final.
            prefix.cache.commit(rows.least_exact() - 1 - start)
        if config.deadline_s is not None:
            now = clock()
            if now + (now - iteration_started) - started > config.deadline_s:
                rows.stop("deadline", forwards)
            iteration_started = now
        end = min(rules.must_converge, prefix.cache.committed + 1 + window)

    if stop is not None:
        tokens, *ended = after_stop(tokens, stop, *(states or ()))
        states = ended if record_states else None
    return DecodeResult(
        tokens=tokens,
        forwards=forwards,
        iterations=torch.from_numpy(rows.iterations),
        exit_reason=[reason or "converged" for reason in rows.reasons],
        exact_tokens=torch.from_numpy(rows.exact),
        exact=torch.from_numpy(rows.exact >= n),
        states=states,
        seconds={"decode": clock() - started},
    )


def jacobi_iteration(
    backbone: Backbone, prefix: Prefix, tokens: Tensor, first: int, end: int, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the slots ``first .. end - 1`` of `tokens` (B, n) from all that are not committed, in place.

    Returns:
        Logits (B, k, V), their largest (B, k), and tokens (B, k) of those slots; rows that are done keep theirs.
    """
    start = prefix.cache.committed
    logits = backbone.block_logits(prefix, tokens[:, start : end - 1])  # of slots start + 1 .. end - 1
    logits = logits[:, first - start - 1 :]  # (B, k, V)
    best, new = logits.max(-1)  # (B, k)
    if not rows.all_running:
        running = torch.from_numpy(rows.running).to(new.device).unsqueeze(1)  # (B, 1)
        new = torch.where(running, new, tokens[:, first:end])
    tokens[:, first:end] = new
    return logits, best, new


def _first_certainty(rules: ExitRules, logits: Tensor) -> np.ndarray | None:
    """(B, M) window mass of the slots before `M`: 1 where frozen, slot 0 from the prefix (B, V); None if not needed."""
    if rules.confidence is None:
        return None
    certainty = np.zeros((logits.shape[0], rules.must_converge))
    if rules.frozen:
        certainty[:, : rules.frozen] = 1.0
        return certainty
    certainty[:, :1] = window_mass(logits[:, None], logits.argmax(-1)[:, None]).cpu().numpy()
    return certainty


def _watched_mass(rules: ExitRules, logits: Tensor, new: Tensor, first: int) -> tuple[Tensor, ...]:
    """The window mass (B, watched) of the watched ones of the new tokens (B, k), if a rule needs it."""
    if rules.confidence is None:
        return ()
    watched = rules.must_converge - first
    return (window_mass(logits[:, :watched], new[:, :watched]),)
