"""Messages of vla-eval's live episodes, for a policy whose chunks are numbered."""

from __future__ import annotations

from typing import Any

import numpy as np

from ceed_vla.serving.arrays import packed
from ceed_vla.serving.predictor_types import PolicySpec
from ceed_vla.serving.vla_eval import VlaEval
from tests.helpers.local_server import STATE

M = 8  # steps of a chunk
H = 4  # of those, the ones after which the next call is due
SPEC = PolicySpec("chunks", "ceed_vla", {}, {STATE: 1}, 1, M, H, 0.0)
PROTOCOL = VlaEval({STATE: STATE}, {"server": "test"}, {})
LIVE, SYNC = {"mode": "live"}, {"mode": "sync"}


def message(kind: str, payload: Any, seq: int = 1) -> bytes:
    return packed({"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}, str)


def observed(seq: int, instruction: str = "lift", state: Any = (0.0,), held: Any = False) -> bytes:
    payload = {STATE: np.array(state), "task_description": instruction, "held": held}
    return message("observation", payload, seq)


def chunk(number: int) -> np.ndarray:
    """Chunk 3 has the actions 3.0, 3.1, ..., 3.7."""
    return (number + 0.1 * np.arange(M, dtype=np.float32))[:, None]
