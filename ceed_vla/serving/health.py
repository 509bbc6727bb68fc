"""Whether a server can still answer, for load balancers and supervisors that ask ``/healthz``."""

from __future__ import annotations

from ceed_vla.serving.policy_thread import PolicyThread
from ceed_vla.serving.predictor import Predictor

STUCK_S = 30.0  # time of a request from which on the policy counts as stuck [s], ...
STUCK_CHUNKS = 20.0  # ... or this many usual times of a chunk, if that is more
FAILURES = 10  # unforeseen failures in a row after which the policy counts as broken


def problem(predictor: Predictor | None, thread: PolicyThread) -> str:
    """Why the policy cannot answer; "" if it can.

    A device that has failed makes every request fail, and a driver that hangs none return.
    """
    if predictor is None:
        return "the policy is not ready"
    busy = thread.busy_s
    if busy > max(STUCK_S, STUCK_CHUNKS * thread.chunk_s):
        return f"a request has been running for {busy:.0f} s"
    if predictor.failures >= FAILURES:
        return f"the last {predictor.failures} requests failed; the log has the error"
    return ""
