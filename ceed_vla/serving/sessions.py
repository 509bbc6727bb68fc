"""Warm starts of the sessions of one connection."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ceed_vla.serving.arrays import WireError
from ceed_vla.serving.predictor_types import PolicySpec, Request, Response
from ceed_vla.serving.protocols import Call

MOST_SESSIONS = 100  # of a connection; the oldest ones start cold again


@dataclass(frozen=True)
class _Last:
    tokens: NDArray[np.int64]  # (n,)
    executed_steps: int


class Sessions:
    """The last chunk of every session of a connection; they end with it.

    Args:
        spec: The policy's outputs.
    """

    def __init__(self, spec: PolicySpec) -> None:
        self._spec = spec
        self._last: OrderedDict[str, _Last] = OrderedDict()

    def warm(self, call: Call) -> Request:
        """The request, with the last chunk of its session as the warm start.

        Tokens that the client sends itself have precedence.

        Raises:
            WireError: Steps shall be frozen, but there is no chunk that they are copied from.
        """
        request = call.request
        last = self._last.get(call.session) if call.session else None
        if request.previous is None and last is None and request.frozen_steps:
            raise WireError(
                f"frozen_steps is {request.frozen_steps}, but there is no last chunk; send "
                "previous_tokens, or a session that has had an answer on this connection."
            )
        if request.previous is not None or last is None:
            return request
        shift = last.executed_steps if call.shift_steps is None else call.shift_steps
        return replace(request, previous=last.tokens, shift_steps=shift)

    def keep(self, call: Call, response: Response) -> None:
        """Remember the chunk of a call."""
        if not call.session or response.tokens is None:
            return
        executed = call.request.executed_steps or self._spec.n_action_steps
        self._last[call.session] = _Last(response.tokens, executed)
        self._last.move_to_end(call.session)
        if len(self._last) > MOST_SESSIONS:
            self._last.popitem(last=False)
