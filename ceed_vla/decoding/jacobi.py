"""Parallel decoding of one block as a fixed point (Jacobi iteration), with exit rules.

    y_0 = argmax p(. | x),    y_i(j + 1) = argmax p(. | y_<i(j), x)    for all i > 0 at once

In a causal model the first slot that an iteration changes is itself right afterwards: everything
before it was a fixed point already. So every iteration proves at least one more token, the proven
ones are committed to the cache and never computed again, and the fixed point, in fewer than ``n``
iterations, is AR's greedy block.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.exits import ExitRule, Seen, ended, exit_rules, measure
from ceed_vla.decoding.finite import check_rows, row_sums, to_host
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest, after_stop
from ceed_vla.decoding.result import DecodeResult


@register_decoder("jacobi", "jacobi", "to the fixed point")
@torch.no_grad()
def decode_jacobi(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode a block from its guess until every row is at its fixed point or meets an exit rule.

    The first iteration computes the whole block, so its tail is a useful warm start; the next ones
    stop at the slots that are watched, unless the tail is to be fresh. Rows that are done stay as
    they are while the others go on. The only look at the host is the convergence test, once an
    iteration. Several blocks may be decoded behind one prefix: the cache is rolled back at the
    start. A frozen prefix costs no forward of its own: the first iteration reads it together with
    the guess behind it, keeps it, and proves the first free token.

    Raises:
        TokenError: No guess, or a guess or frozen tokens of another shape or with tokens outside
            the vocabulary.
        ConfigError: Executed steps or exit rules that do not fit the block.
        NotFiniteError: Scores of a running row are NaN or infinite.
    """
    started = last = request.clock()
    batch = prefix.logits.shape[0]
    n = backbone.block_length
    rules = exit_rules(request.config, ordered=request.ordered and request.stop is None)
    tokens, given, watched = request.begin(backbone, prefix)  # (B, n)
    best = prefix.logits.amax(-1, keepdim=True)
    # (B, 1), of all scores so far; the first ones travel with those of an iteration
    sums = row_sums(best, backbone)
    host = tokens.cpu().numpy().copy()  # (B, n), the state that the convergence test compares with
    measured = _first_measures(rules, prefix.logits, tokens[:, :1], watched, given)
    states = [tokens.clone()] if request.record_states else None
    # Without frozen tokens the prefix gives token 0; behind them the first free token takes a
    # forward.
    rows = Rows(batch, n, max(given, 1))
    if request.stop is not None:
        rows.end(host[:, 0] == request.stop, "stop", 0)

    def readable() -> np.ndarray:
        return (
            np.ones(batch, dtype=bool)
            if request.readable is None
            else request.readable(tokens).cpu().numpy()
        )

    last_slot = n if request.config.tail == "fresh" else watched
    window = request.config.window or n
    # slots [0, end) are computed
    end = min(n, max(given, 1) + window)
    forwards = 0
    while end > max(given, 1) and rows.running.any():
        start = prefix.cache.committed  # slots [0, start] are right in every running row
        first = max(start + 1, given)
        logits, best, new = jacobi_iteration(backbone, prefix, tokens, first, end, rows.running)
        forwards += 1
        sums = sums + row_sums(best, backbone)
        wanted = [
            measure(rule, logits[:, : watched - first], new[:, : watched - first]) for rule in rules
        ]
        # The one host synchronisation. `fresh` is (B, k).
        fresh, found, *values = to_host(new, sums, *(m for m in wanted if m is not None))
        check_rows(found, rows.running if forwards > 1 else None)
        for mine, tensor in zip(measured, wanted, strict=True):
            value = None if tensor is None else values.pop(0)
            if mine is not None and value is not None:
                mine[:, first - given :] = value

        rows.accept(host[:, first:end], fresh, first)
        moved = np.zeros((batch, watched), dtype=np.int64)
        moved[:, first:end] = np.abs(fresh - host[:, first:end])[:, : watched - first]
        host[:, first:end] = fresh
        if request.stop is not None:
            proven = np.arange(first, end) < rows.exact[:, None]  # (B, k)
            rows.end(((fresh == request.stop) & proven).any(1), "stop", forwards)
        stable = rows.exact >= watched
        if stable.any():
            rows.end(rows.exact >= n, "converged", forwards)
            rows.end(stable, "stable", forwards)
        now = request.clock()
        times = now - started, now - last
        seen = Seen(forwards, rows.exact, watched, moved, *times, readable)
        last = now
        for rule, mine in zip(rules, measured, strict=True):
            ends = ended(rule, seen, mine)  # half a chunk serves nobody
            rows.end(ends & readable() if np.any(ends) else ends, rule.reason, forwards)

        if states is not None:
            states.append(tokens.clone())
        if request.on_proven is not None:
            request.on_proven(tokens, int(rows.exact.min()), forwards)
        if rows.running.any():
            # The last right slot is an input of the next iteration; everything before it is final.
            prefix.cache.commit(int(rows.exact[rows.running].min()) - 1 - start)
        end = min(last_slot, prefix.cache.committed + 1 + window)

    if not forwards:
        check_rows(sums.cpu().numpy())
    if request.stop is not None:
        tokens, states = after_stop(request.stop, tokens, states)
    return rows.result(tokens, forwards, states, request.clock() - started)


def jacobi_iteration(
    backbone: Backbone, prefix: Prefix, tokens: Tensor, first: int, end: int, running: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the slots ``first .. end - 1`` of `tokens` (B, n) from all that are not committed,
    in place.

    Returns logits (B, k, V), their largest (B, k), and tokens (B, k) of those slots; rows that are
    done keep theirs.
    """
    start = prefix.cache.committed
    # of slots start + 1 .. end - 1
    logits = backbone.block_logits(prefix, tokens[:, start : end - 1])
    logits = logits[:, first - start - 1 :]  # (B, k, V)
    best, new = logits.max(-1)  # (B, k)
    if not running.all():
        new = torch.where(
            torch.from_numpy(running).to(new.device).unsqueeze(1), new, tokens[:, first:end]
        )
    tokens[:, first:end] = new
    return logits, best, new


class Rows:
    """What is known about every row of a block, on the host.

    Attributes:
        running: (B,) bool, rows without an exit reason.
        exact: (B,) leading tokens proven equal to greedy AR.
        iterations: (B,) iterations until the row ended.
        reasons: Exit reason of every row, None while it runs.
    """

    def __init__(self, batch: int, block_length: int, exact: int) -> None:
        self.block_length = block_length
        self.running = np.ones(batch, dtype=bool)
        self.exact: np.ndarray = np.full(batch, exact, dtype=np.int64)
        self.iterations = np.zeros(batch, dtype=np.int64)
        self.reasons: list[str | None] = [None] * batch

    def accept(self, old: np.ndarray, new: np.ndarray, first: int) -> None:
        """Prove tokens of the running rows: `new` (B, k) was computed from `old` (B, k), from slot
        `first` on.

        The first changed slot is right now, as all slots before it were; no change proves every
        slot. A window that ends before what a row has proven already takes nothing back.
        """
        changed = new != old  # (B, k)
        proven = np.where(changed.any(1), changed.argmax(1) + 1, new.shape[1])  # (B,)
        self.exact = np.where(self.running, np.maximum(self.exact, first + proven), self.exact)

    def end(self, rows: np.ndarray | bool, reason: str, iteration: int) -> None:
        """End those of `rows` (B,) bool that run. Behind a stop token there is nothing left to
        prove.
        """
        for row in np.flatnonzero(self.running & rows):
            self.reasons[row], self.iterations[row], self.running[row] = reason, iteration, False
            if reason == "stop":
                self.exact[row] = self.block_length

    def result(
        self, tokens: Tensor, forwards: int, states: list[Tensor] | None, seconds: float
    ) -> DecodeResult:
        return DecodeResult(
            tokens=tokens,
            forwards=forwards,
            iterations=torch.from_numpy(self.iterations),
            exit_reason=[reason or "converged" for reason in self.reasons],
            exact_tokens=torch.from_numpy(self.exact),
            exact=torch.from_numpy(self.exact >= self.block_length),
            states=states,
            seconds={"decode": seconds},
        )


def _first_measures(
    rules: list[ExitRule], logits: Tensor, tokens: Tensor, watched: int, given: int
) -> list[np.ndarray | None]:
    """What each rule measures in the watched slots behind the given ones (B, M - f).

    Slot 0 has the prefix's `logits` (B, V) and `tokens` (B, 1).
    """
    measured: list[np.ndarray | None] = []
    for rule in rules:
        slot = measure(rule, logits[:, None], tokens)  # (B, 1)
        values = None if slot is None else np.zeros((len(logits), watched - given))
        if slot is not None and values is not None and not given:
            values[:, :1] = slot.float().cpu().numpy()
        measured.append(values)
    return measured
