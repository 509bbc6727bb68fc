"""Chunks per second of a server that several clients ask at once.

python -m benchmarks.several_clients --clients 8 --max_batch 8 --engine eager
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.served import serving
from ceed_vla.serving.client import PolicyClient
from ceed_vla.serving.predictor_types import Request


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--policy", default="student", help="checkpoint")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=40, help="of every client")
    parser.add_argument("--max_batch", type=int, default=1)
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    flags = {name: getattr(options, name) for name in ("max_batch", "engine", "threads")}
    times: list[float] = []
    with (
        serving(options.policy, max_connections=options.clients + 1, **flags) as url,
        ThreadPoolExecutor(options.clients) as pool,
    ):
        with PolicyClient(url, connect_s=120.0) as client:  # until the policy is loaded
            client.predict(_request(client, 0))
        began = time.perf_counter()
        asked = [pool.submit(_ask, url, options.chunks, i) for i in range(options.clients)]
        for client_times in asked:
            times += client_times.result()
        seconds = time.perf_counter() - began
    half, most = np.percentile(times, (50, 99))
    print(
        f"{options.clients} clients, {options.engine}, max_batch {options.max_batch}: "
        f"{len(times) / seconds:.1f} chunks per second, {1e3 * half:.0f} ms p50, "
        f"{1e3 * most:.0f} ms p99"
    )


def _ask(url: str, chunks: int, place: int) -> list[float]:
    """Times of the chunks that a client asks for [s]."""
    times = []
    with PolicyClient(url, timeout_s=60.0) as client:
        for number in range(chunks):
            request = _request(client, 1000 * place + number)
            started = time.perf_counter()
            client.predict(request)
            times.append(time.perf_counter() - started)
    return times


def _request(client: PolicyClient, seed: int) -> Request:
    random = np.random.default_rng(seed)
    spec = client.spec
    images = {
        name: random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for name, (_, height, width) in spec.cameras.items()
    }
    states = {
        name: random.normal(size=size).astype(np.float32) for name, size in spec.states.items()
    }
    return Request(seed, {**images, **states}, spec.example_instruction)


if __name__ == "__main__":
    main()
