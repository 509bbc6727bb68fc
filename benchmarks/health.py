"""What a server still answers while its policy decodes a long chunk.

    python -m benchmarks.health --seconds 0.5

A client asks for a chunk, whose decoding is repeated for `--seconds`, as if the model were so
large. Until its answer comes, `/healthz` is asked every 50 ms, and a second client connects once.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from ceed_vla.serving.client import PolicyClient
from ceed_vla.serving.openpi import OpenPi
from ceed_vla.serving.predictor import Predictor, PredictorSettings, Request
from ceed_vla.serving.server import Limits, PolicyServer

EVERY = 0.05  # [s]


def main() -> None:
    """Record, and print one line per answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--policy", default="student", help="checkpoint")
    parser.add_argument("--seconds", type=float, default=0.5, help="of decoding a chunk [s]")
    options = parser.parse_args()
    settings = PredictorSettings(options.policy, engine="auto", warmup=1)
    short = Predictor(settings)

    def decode_for(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            short.predict(_request(short))

    predictor = Predictor(replace(settings, delay_s=options.seconds), wait=decode_for)
    names = (*predictor.spec.cameras, *predictor.spec.states)
    protocol = OpenPi({name: name for name in names}, {}, {})
    server = PolicyServer(lambda: predictor, protocol, Limits(10**7, 10, 1000.0))
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    loops: queue.SimpleQueue[asyncio.AbstractEventLoop] = queue.SimpleQueue()

    async def run() -> None:
        loops.put(asyncio.get_running_loop())
        await server.run("127.0.0.1", 0, ports.put)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        record(ports.get(), predictor)
    finally:
        loops.get().call_soon_threadsafe(server.stop)
        thread.join()


def record(port: int, predictor: Predictor) -> None:
    """Print what answers when, beside one request."""
    with PolicyClient(f"ws://127.0.0.1:{port}") as client, ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        asked = pool.submit(client.predict, _request(predictor))
        connected = False
        while not asked.done():
            sent = time.monotonic()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
                tell(began, sent, f"GET /healthz {answer.status} {answer.read().decode().strip()}")
            if not connected and sent - began > 2 * EVERY:
                connected = True
                sent = time.monotonic()
                with PolicyClient(f"ws://127.0.0.1:{port}") as other:
                    tell(began, sent, f"another client has the greeting ({other.spec.checkpoint})")
            time.sleep(EVERY)
        response = asked.result()
        total = 1e3 * response.seconds["total"]
        tell(began, began, f"the chunk of {total:.0f} ms has come ({response.exit_reason})")


def _request(predictor: Predictor) -> Request:
    """A blank observation."""
    spec = predictor.spec
    images = {name: np.zeros((h, w, 3), np.uint8) for name, (_, h, w) in spec.cameras.items()}
    states = {name: np.zeros(size, np.float32) for name, size in spec.states.items()}
    return Request(1, {**images, **states}, spec.example_instruction)


def tell(began: float, sent: float, what: str) -> None:
    now = time.monotonic()
    print(f"{1e3 * (now - began):6.0f} ms  {what}, after {1e3 * (now - sent):.1f} ms")


if __name__ == "__main__":
    main()
