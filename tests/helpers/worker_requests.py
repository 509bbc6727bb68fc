"""Requests to an inference worker that runs the shipped student, and its answers."""

from __future__ import annotations

import time

import numpy as np

from ceed_vla.ros_nodes.robot.inference import InferenceWorker
from ceed_vla.serving.predictor import Request, Response

FRONT = "observation.images.front"
WRIST = "observation.images.wrist"
STATE = "observation.state"
INSTRUCTION = "put the red cube in the bin"


def observation(seed: int = 0, side: int = 96) -> dict[str, np.ndarray]:
    """Random images (side, side, 3) and a random state (14,)."""
    rng = np.random.default_rng(seed)
    images = {key: rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for key in (FRONT, WRIST)}
    return {**images, STATE: rng.normal(size=14).astype(np.float32)}


def wait(worker: InferenceWorker, timeout: float = 60.0) -> Response:
    """Wait for the next answer, at most `timeout` [s]."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if (response := worker.poll()) is not None:
            return response
        time.sleep(0.005)
    raise TimeoutError("no answer")


def ask(worker: InferenceWorker, request: Request) -> Response:
    """Send a request, which the worker must accept, and return the answer."""
    assert worker.submit(request)
    return wait(worker)
