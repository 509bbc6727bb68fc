"""An export against torch in closed loop: equal tokens, and milliseconds in turns.

    python -m benchmarks.exported --policy student --export outputs/export --chunks 500

Every observation is decoded by both engines with every decoder, with and without frozen steps; the
student's early exit drives the arm.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

import ceed_vla
import ceed_vla.sim.tabletop  # registers ceed_vla/Tabletop-v0
from ceed_vla.edge import EdgePolicy
from ceed_vla.scheduling import place_torch, torch_pinned
from ceed_vla.sim.environment import observation_batch

DECODERS = ("ar", "ar_h", "jacobi", "jacobi_h", "ceed", "cap1")
TASKS = ("push_cube", "cube_in_bin", "cube_on_plate", "stack_cubes")
LONGEST = 25  # chunks of an episode
PAUSE_S = 0.01  # before a decode: idle threads of the other engine may spin for milliseconds
FROZEN = 2  # steps


def arrays_of(batch: dict[str, Any], edge: EdgePolicy) -> dict[str, NDArray[Any]]:
    """The observation of a batch of one row, as an export reads it."""
    images = {
        camera: np.ascontiguousarray(
            (batch[camera][0] * 255).round().byte().permute(1, 2, 0).numpy()
        )
        for camera in edge.settings.images.cameras
    }
    state = edge.settings.state.name
    return {**images, state: batch[state][0].numpy()}


class Comparison:
    """Decodes observations with both engines.

    Attributes:
        different: Names of the decoders, with frozen steps, whose results differed, to counts.
        compared: Results compared.
        seconds: (engine, decoder, part) -> times [s]; part "prefill", "decode" or "total".
    """

    def __init__(self, policy: str, export: str, threads: int) -> None:
        place_torch(threads)
        self.policy, self.preprocess, _ = ceed_vla.load(policy)
        self.edge = EdgePolicy(export, threads=threads)
        self.reset()

    def reset(self) -> None:
        """Forget all results."""
        self.different: dict[str, int] = defaultdict(int)
        self.compared = 0
        self.seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)

    def observe(self, observation: Any, instruction: str, previous: NDArray[Any] | None) -> Any:
        """Compare all decoders on one observation; returns the result of "ceed"."""
        raw_batch = observation_batch([observation], [instruction])
        raw = arrays_of(raw_batch, self.edge)
        chosen = None
        for decoder in DECODERS:
            for frozen in (0, FROZEN) if previous is not None else (0,):
                time.sleep(PAUSE_S)
                started = time.perf_counter()
                with torch_pinned():
                    wanted = self.policy.decode(
                        self.preprocess(raw_batch),
                        decoder,
                        previous=None if previous is None else torch.from_numpy(previous),
                        frozen_steps=frozen,
                    )
                torchs = time.perf_counter() - started
                time.sleep(PAUSE_S)
                started = time.perf_counter()
                found = self.edge.decode(
                    raw, instruction, decoder, previous=previous, frozen_steps=frozen
                )
                exports = time.perf_counter() - started
                self._compare(f"{decoder}, {frozen} steps frozen", wanted, found)
                if not frozen:
                    self._time("torch", decoder, wanted, torchs)
                    self._time("export", decoder, found, exports)
                if decoder == "ceed" and not frozen:
                    chosen = found
        return chosen

    def _compare(self, name: str, wanted: Any, found: Any) -> None:
        self.compared += 1
        equal = (
            np.array_equal(wanted.tokens.numpy(), found.tokens)
            and np.array_equal(wanted.actions.numpy(), found.actions)
            and (wanted.forwards, wanted.exit_reason) == (found.forwards, found.exit_reason)
            and wanted.exact_tokens.tolist() == found.exact_tokens.tolist()
        )
        if not equal:
            self.different[name] += 1

    def _time(self, engine: str, decoder: str, result: Any, total: float) -> None:
        for part, seconds in (*result.seconds.items(), ("total", total)):
            self.seconds[engine, decoder, part].append(seconds)


def run(comparison: Comparison, chunks: int, seed: int) -> Iterator[int]:
    """Drive episodes from `seed` on until `chunks` observations are compared; yields the count."""
    done = 0
    while done < chunks:
        env = gymnasium.make("ceed_vla/Tabletop-v0", task=TASKS[seed % len(TASKS)])
        observation, info = env.reset(seed=seed)
        seed += 1
        previous = None
        ended = False
        if not done:  # the first decodes of torch are slow
            comparison.observe(observation, info["instruction"], None)
            comparison.reset()
        for _ in range(min(LONGEST, chunks - done)):
            result = comparison.observe(observation, info["instruction"], previous)
            previous = result.tokens
            done += 1
            yield done
            for action in result.actions[0][: comparison.edge.settings.n_action_steps]:
                observation, _, terminated, truncated, _ = env.step(action)
                ended = terminated or truncated
                if ended:
                    break
            if ended:
                break
        env.close()


def report(comparison: Comparison) -> str:
    """The table of times, and what differed."""
    lines = ["| decoder | engine | prefill p50 | decode p50 | total p50 / p95 / p99 [ms] |"]
    lines.append("| -- | -- | -- | -- | -- |")
    for decoder in DECODERS:
        for engine in ("torch", "export"):
            p50 = {
                part: 1e3 * float(np.median(comparison.seconds[engine, decoder, part]))
                for part in ("prefill", "decode")
            }
            total = np.percentile(comparison.seconds[engine, decoder, "total"], [50, 95, 99]) * 1e3
            shown = " / ".join(f"{value:.1f}" for value in total)
            lines.append(
                f"| `{decoder}` | {engine} | {p50['prefill']:.1f} | {p50['decode']:.1f} | {shown} |"
            )
    wrong = sum(comparison.different.values())
    lines.append(f"{comparison.compared - wrong} of {comparison.compared} results equal")
    lines += [f"different: {name}: {count}" for name, count in comparison.different.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="An export against torch in closed loop.")
    parser.add_argument("--policy", default="student", help="checkpoint")
    parser.add_argument("--export", required=True, help="folder of its export")
    parser.add_argument("--chunks", type=int, default=500, help="observations")
    parser.add_argument("--seed", type=int, default=40000, help="of the first episode")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    options = parser.parse_args()
    comparison = Comparison(options.policy, options.export, options.threads)
    for done in run(comparison, options.chunks, options.seed):
        print(f"\r{done} of {options.chunks} observations", end="", flush=True)
    print(f"\n{report(comparison)}")


if __name__ == "__main__":
    main()
