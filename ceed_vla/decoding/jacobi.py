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
from ceed_vla.decoding.exits import ExitRules, Rows, window_mass
from ceed_vla.decoding.guesses import check_guess
from ceed_vla.decoding.result import DecodeResult


@torch.no_grad()
def decode_jacobi(
    backbone: Backbone,
    prefix: Prefix,
    guess: Tensor,
    config: DecodingConfig,
    *,
    action_dim: int,
    gripper_dims: tuple[int, ...] = (),
    record_states: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeResult:
    """Decode a block from `guess` until every row meets an exit rule of `config`.

    The first iteration computes the whole block, so its tail is a useful warm start; the next ones stop at
    the slots that must converge. Rows that are done are frozen while the others go on. The only look at the
    host is the convergence test, once an iteration. Several blocks may be decoded behind one prefix: the
    cache is rolled back at the start.

    Args:
        backbone: The model.
        prefix: From ``backbone.prefill``.
        guess: First state (B, n) int64; slot 0 is ignored, the prefix knows it.
        config: Exit rules; `DecodingConfig.strict` ones give greedy AR. Its `method` and `guess` are not
            read.
        action_dim: Tokens ``A`` of one step.
        gripper_dims: Dimensions whose tolerance is always 0.
        record_states: Keep every state.
        clock: Time in seconds, for the deadline.

    Returns:
        Tokens and what happened; `DecodeResult` explains the exit reasons.

    Raises:
        TokenError: A guess of another shape or with tokens outside the vocabulary.
        ConfigError: Executed steps or tolerances that do not fit the block.
    """
    started = iteration_started = clock()
    batch, n = prefix.logits.shape[0], backbone.block_length
    check_guess(guess, batch, n, backbone.vocabulary_size)
    rules = ExitRules.of(config, n, action_dim, gripper_dims)
    rows = Rows(rules, batch)
    prefix.cache.roll_back()

    tokens = guess.to(prefix.logits.device, copy=True)  # (B, n)
    tokens[:, 0] = prefix.logits.argmax(-1)
    host = tokens.cpu().numpy().copy()  # (B, n), the state that the convergence test compares with
    certainty = _first_certainty(rules, prefix.logits)  # (B, M), or None
    states = [tokens.clone()] if record_states else None

    end, forwards = n, 0  # slots [0, end) are computed
    while end > 1 and rows.any_running:
        start = prefix.cache.committed  # slots [0, start] are right in every running row
        logits, new = jacobi_iteration(backbone, prefix, tokens, end, rows)  # slots start + 1 .. end - 1
        forwards += 1
        fresh = _to_host(rules, logits, new, certainty, start)  # (B, k), the one host synchronisation
        rows.update(forwards, host[:, start + 1 : end], fresh, start + 1, certainty)
        host[:, start + 1 : end] = fresh
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
        end = rules.must_converge

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
    backbone: Backbone, prefix: Prefix, tokens: Tensor, end: int, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Recompute all slots of `tokens` (B, n) after the committed ones and before `end`, at once and in place.

    Returns:
        Logits (B, k, V) and tokens (B, k) of those slots; rows that are done keep theirs.
    """
    start = prefix.cache.committed
    logits = backbone.block_logits(prefix, tokens[:, start : end - 1])  # (B, k, V)
    new = logits.argmax(-1)  # (B, k)
    if not rows.all_running:
        running = torch.from_numpy(rows.running).to(new.device).unsqueeze(1)  # (B, 1)
        new = torch.where(running, new, tokens[:, start + 1 : end])
    tokens[:, start + 1 : end] = new
    return logits, new


def _first_certainty(rules: ExitRules, logits: Tensor) -> np.ndarray | None:
    """(B, M) window mass of every watched slot, slot 0 from the prefix logits (B, V); None if not needed."""
    if rules.confidence is None:
        return None
    certainty = np.zeros((logits.shape[0], rules.must_converge))
    certainty[:, :1] = window_mass(logits[:, None], logits.argmax(-1)[:, None]).cpu().numpy()
    return certainty


def _to_host(
    rules: ExitRules, logits: Tensor, new: Tensor, certainty: np.ndarray | None, start: int
) -> np.ndarray:
    """New tokens (B, k) on the host, in one copy with the watched ones' window mass, kept in `certainty`."""
    if certainty is None:
        return new.cpu().numpy()
    k, watched = new.shape[1], rules.must_converge - 1 - start
    mass = window_mass(logits[:, :watched], new[:, :watched])  # (B, watched)
    both = torch.cat([new.double(), mass.double()], dim=1).cpu().numpy()  # (B, k + watched)
    certainty[:, start + 1 :] = both[:, k:]
    return both[:, :k].astype(np.int64)
