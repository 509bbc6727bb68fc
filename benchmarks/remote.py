"""What a request over loopback costs on top of the same decode in this process.

    python -m benchmarks.remote --chunks 300

One server process and one `Predictor` in this process decode the same random observations, with two
cameras of 224 px, in turns. The overhead is counted twice: as the difference of each pair, which
contains the noise of both decodes; and as the time of a remote request outside the policy itself:
encode, send, queue, decode the message, answer.
"""

from __future__ import annotations

import argparse
import gc
import time

import numpy as np

from benchmarks.served import serving
from ceed_vla.serving.client import PolicyClient
from ceed_vla.serving.predictor import Predictor, PredictorSettings, Request

WARM_UP = 10


def main() -> None:
    """Measure, and print p50, p95 and p99."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--policy", default="student", help="checkpoint")
    parser.add_argument("--chunks", type=int, default=300)
    parser.add_argument("--side", type=int, default=224, help="of the cameras [px]")
    parser.add_argument("--pause", type=float, default=0.02, help="before every request [s]")
    options = parser.parse_args()
    local = Predictor(PredictorSettings(options.policy, engine="auto"))
    gc.collect()
    gc.freeze()  # as the server does: collections would be counted as overhead
    random = np.random.default_rng(0)
    times: dict[str, list[float]] = {"in this process": [], "remote": [], "outside the policy": []}
    with serving(options.policy) as url, PolicyClient(url, timeout_s=120) as client:
        for number in range(options.chunks + WARM_UP):
            request = _request(number, local, random, options.side)
            ways = {"in this process": local.predict, "remote": client.predict}
            tokens = []
            for name in sorted(ways, reverse=number % 2 == 0):
                time.sleep(options.pause)
                started = time.perf_counter()
                response = ways[name](request)
                times[name].append(1e3 * (time.perf_counter() - started))
                assert response.error is None, response.error
                tokens.append(response.tokens)
                if name == "remote":
                    outside = times[name][-1] - 1e3 * response.seconds["total"]
                    times["outside the policy"].append(outside)
            assert np.array_equal(*tokens)
    pairs = {name: np.array(values[WARM_UP:]) for name, values in times.items()}
    pairs["difference of the pairs"] = pairs["remote"] - pairs["in this process"]
    for name, values in pairs.items():
        print(
            f"{name}: "
            + " / ".join(f"{v:.2f}" for v in np.percentile(values, (50, 95, 99)))
            + " ms"
        )


def _request(number: int, local: Predictor, random: np.random.Generator, side: int) -> Request:
    """A random observation; the policy resizes its images."""
    images = {
        name: random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        for name in local.spec.cameras
    }
    states = {
        name: random.normal(size=size).astype(np.float32)
        for name, size in local.spec.states.items()
    }
    return Request(number, {**images, **states}, local.spec.example_instruction)


if __name__ == "__main__":
    main()
