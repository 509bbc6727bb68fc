"""Latency of a chunk at batch 1: all decoders on the same closed-loop observations, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sim.decoders import Row
from sim.environment import Bundle, EnvPool
from sim.rollout import Chunk, PolicyRunner, drive

WARM_UP = 3
Observations = list[tuple[dict[str, Any], str]]  # consecutive replans of one episode: observation, instruction


@dataclass
class Samples:
    """What one decoder needed, one entry a chunk; times in [s]."""

    total: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)  # (n,)


def collect_observations(
    runner: PolicyRunner,
    pool: EnvPool,
    episodes: Iterable[tuple[int, str]],
    executed_steps: int,
    chunks: int,
    largest_share: float = 0.25,
) -> list[Observations]:
    """Observations at the replans of closed-loop episodes, one list an episode.

    The `runner` drives episodes of (seed, task) in the first environment of the pool until there are enough `chunks`.
    One episode gives at most `largest_share` of them, so that a stuck one cannot dominate.
    """
    collected: list[Observations] = []
    wanted = chunks
    longest = max(1, int(chunks * largest_share))
    for seed, task in episodes:
        most = min(wanted, longest)
        replans = islice(drive(runner, pool, seed, executed_steps, task), most)
        collected.append([(replan.observation, replan.instruction) for replan in replans])
        wanted -= len(collected[-1])
        if wanted <= 0:
            break
    return collected


def measure(
    rows: Sequence[Row],
    bundles: Mapping[str, Bundle],
    episodes: Sequence[Observations],
    executed_steps: int,
    on_chunk: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Time every row on every observation; samples by row name.

    Each row's warm start is its own chunk for the observation before, as in its own closed loop. The rows
    take turns on each observation, in rotating order, so that slow phases of the machine hit all of them.
    """
    samples = {row.name: Samples() for row in rows}
    runners = {row.name: make_runner(row, bundles, executed_steps) for row in rows}
    for runner in runners.values():
        for observation, instruction in [episodes[0][0]] * WARM_UP:
            runner.decode([observation], [instruction], [None])
    turn = 0
    for episode in episodes:
        previous: dict[str, Tensor | None] = {}
        for observation, instruction in episode:
            turn += 1
            for row in (*rows[turn % len(rows) :], *rows[: turn % len(rows)]):
                started = time.perf_counter()
                chunk = runners[row.name].decode([observation], [instruction], [previous.get(row.name)])[0]
                _append(samples[row.name], chunk, time.perf_counter() - started)
                previous[row.name] = chunk.warm_start
            on_chunk()
    return samples


def make_runner(row: Row, bundles: Mapping[str, Bundle], executed_steps: int) -> PolicyRunner:
    """The runner of a row; random guesses differ from chunk to chunk and are the same in every run."""
    generator = torch.Generator().manual_seed(row.decoding.seed)
    return PolicyRunner(bundles[row.model], row.decoding, generator, executed_steps)


def summarise(samples: Samples, reference: Samples, executed_tokens: int, executed_steps: int) -> dict[str, Any]:
    """Entries of ``report.json`` that come from timing: latencies [ms], control rate [Hz], speed-ups and agreement.

    The `reference` is the same model's full autoregressive decoder on the same observations; the leading
    `executed_tokens` are compared.
    """
    own, other = (torch.stack(s.tokens)[:, :executed_tokens] for s in (samples, reference))  # (chunks, h * A)
    latency = percentiles(samples.total)
    return {
        "latency_ms": latency,
        "decode_ms": percentiles(samples.decode),
        "prefill_ms": percentiles(samples.prefill),
        "control_rate_hz": round(1000 * executed_steps / latency["p50"], 1),
        "speedup_vs_ar": round(float(np.median(reference.total) / np.median(samples.total)), 3),
        "decode_speedup_vs_ar": round(float(np.median(reference.decode) / np.median(samples.decode)), 3),
        "ar_agreement": float((own == other).double().mean()),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in [ms]."""
    values = 1000 * np.percentile(seconds, (50, 95, 99))
    return {name: round(float(value), 3) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


def _append(samples: Samples, chunk: Chunk, total: float) -> None:
    samples.total.append(total)
    samples.prefill.append(chunk.seconds["prefill"])
    samples.decode.append(chunk.seconds["decode"])
    samples.tokens.append(chunk.tokens)
