"""Inference workers whose policy is loaded, for tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ceed_vla.ros_nodes.robot.inference import InferenceWorker
from ceed_vla.ros_nodes.robot.local_policy import local_policy


def load_error(worker: InferenceWorker, timeout: float = 120.0) -> str | None:
    """Start the worker and wait until its policy is loaded; return the error if that fails."""
    worker.begin()
    end = time.monotonic() + timeout
    while not worker.ready and worker.failed is None:
        assert time.monotonic() < end, "the policy is not loaded"
        time.sleep(0.005)
    return worker.failed


@contextmanager
def running(checkpoint: str | Path, **options: Any) -> Iterator[InferenceWorker]:
    """A worker with a loaded policy, which ends with the block."""
    with closing(InferenceWorker(local_policy(checkpoint, **options))) as worker:
        assert load_error(worker) is None
        yield worker


def process_of(worker: InferenceWorker) -> int:
    """Wait for the process of mode "process" and return its id."""
    policy: Any = worker._policy
    while policy._process is None:
        time.sleep(0.005)
    return int(policy._process.pid)
