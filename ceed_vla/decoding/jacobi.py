"""Jacobi decoding with torch: the decoder ``jacobi``, and the forwards of its block.

`ceed_vla.decoding.loop` has the iteration itself, which runs on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.exit_tracker import ExitTracker
from ceed_vla.decoding.exits import ExitRule
from ceed_vla.decoding.finite import check_rows
from ceed_vla.decoding.host import result_of, row_sums, to_host
from ceed_vla.decoding.loop import Computed, JacobiBlock, Span, iterate
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.errors import ConfigError, raised_as


@torch.no_grad()
def decode_jacobi(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode a block from its guess until every row is at its fixed point or meets an exit rule.

    See `ceed_vla.decoding.loop.iterate`. Several blocks can be decoded behind one prefix, which is
    rolled back at the start.

    Raises:
        TokenError: The guess is missing, or it or the frozen tokens have another shape or tokens
            outside the vocabulary.
        ConfigError: Executed steps or exit rules do not fit the block.
        NotFiniteError: The logits of a running row are NaN or infinite.
    """
    request = request.begun()
    tokens, frozen, watched = request.begin(backbone, prefix)  # (B, n) y(0), the guess
    block = JacobiBlock(
        tokens.cpu().numpy().copy(),
        request.config,
        frozen=frozen,
        watched=watched,
        stop=request.stop,
    )
    if request.settled is not None:
        block.settle(request.settled.numpy())
    exits = ExitTracker(
        request, block.rows, watched, frozen, readable=lambda: request.rows_readable(tokens)
    )
    forwards = TorchForwards(backbone, prefix, tokens, exits.rules, watched)
    exits.begin(forwards.measure_slot_0(frozen=bool(frozen)))
    observers, recorder = request.observers(tokens)
    iterate(block, forwards, exits, observers)
    if not block.forwards:
        check_rows(forwards.prefix_sums().cpu().numpy())
    tokens, states = request.finished(tokens, recorder.states if recorder else None)
    return result_of(block.rows, tokens, block.forwards, states)


class TorchForwards:
    """The `Forwards` of a block on a torch backbone.

    Args:
        backbone: The model.
        prefix: The prefix; its cache holds the committed tokens, which are not read again.
        tokens: (B, n) int64 on the prefix's device, the state, changed in place.
        rules: Exit rules, which measure the watched slots.
        watched: End ``M`` of the watched slots.
    """

    def __init__(
        self,
        backbone: Backbone,
        prefix: Prefix,
        tokens: Tensor,
        rules: Sequence[ExitRule],
        watched: int,
    ) -> None:
        self.backbone = backbone
        self.prefix = prefix
        self.tokens = tokens
        self.rules = rules
        self.watched = watched
        # Of logits that are not checked yet: initially the prefix's.
        self._unchecked: Tensor | int = self.prefix_sums()

    def prefix_sums(self) -> Tensor:
        """The `row_sums` (B, 1) of the prefix's logits."""
        return row_sums(self.prefix.logits.amax(-1, keepdim=True))

    @property
    def committed(self) -> int:
        return self.prefix.cache.committed

    def commit(self, count: int) -> None:
        self.prefix.cache.commit(count)

    def iterate(self, span: Span, running: np.ndarray) -> Computed:
        logits, best, new = jacobi_iteration(self.backbone, self.prefix, self.tokens, span, running)
        width = max(self.watched - span.start, 0)
        found = (measure(rule, logits[:, :width], new[:, :width]) for rule in self.rules)
        values = [value for value in found if value is not None]  # (B, w) each
        fresh, sums, *measured = to_host(new, self._unchecked + row_sums(best), *values)
        self._unchecked = 0
        return Computed(fresh, sums, measured)

    def measure_slot_0(self, frozen: bool) -> list[np.ndarray | None]:
        """Per rule the measurement (B, 1) of slot 0, from the prefix; None if it measures nothing,
        and 0 without a transfer if the slot is `frozen`.
        """
        logits = self.prefix.logits[:, None]
        found = [measure(rule, logits, self.tokens[:, :1]) for rule in self.rules]
        if frozen:
            return [None if slot is None else np.zeros(slot.shape) for slot in found]
        return [None if slot is None else slot.float().cpu().numpy() for slot in found]


def jacobi_iteration(
    backbone: Backbone, prefix: Prefix, tokens: Tensor, span: Span, running: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the k slots of `span` from the tokens in front of each, in place.

    Args:
        backbone: The model.
        prefix: The prefix; its cache holds the committed tokens, which are not read again.
        tokens: (B, n) the state; the slots of `span` are overwritten in running rows.
        span: The slots to compute.
        running: (B,) bool, rows whose tokens may change.

    Returns:
        Logits (B, k, V) of the slots, the largest logit (B, k) of each, and their tokens (B, k).
    """
    committed = prefix.cache.committed
    logits = backbone.block_logits(prefix, tokens[:, committed : span.end - 1])
    logits = logits[:, span.start - committed - 1 :]  # (B, k, V)
    best, new = logits.max(-1)  # (B, k)
    if not running.all():
        mask = torch.from_numpy(running).to(new.device).unsqueeze(1)
        new = torch.where(mask, new, tokens[:, span.start : span.end])
    tokens[:, span.start : span.end] = new
    return logits, best, new


def measure(rule: ExitRule, logits: Tensor, tokens: Tensor) -> Tensor | None:
    """Call ``rule.measure``.

    Args:
        rule: The rule.
        logits: (B, k, V) of k slots.
        tokens: (B, k) their tokens.

    Returns:
        The values (B, k), or None.

    Raises:
        ConfigError: The rule fails, or returns anything else.
    """
    with raised_as(
        ConfigError, f"The exit rule {type(rule).__name__} does not work: measure", "correct it."
    ):
        measured = rule.measure(logits, tokens)
        if measured is None:
            return None
        if not isinstance(measured, Tensor) or measured.shape != tokens.shape:
            raise TypeError(
                f"it returned {type(measured).__name__}, not a tensor {tuple(tokens.shape)}"
            )
    return measured
