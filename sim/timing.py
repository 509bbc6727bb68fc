"""Latency of a chunk at batch 1: all decoders on the same closed-loop observations, interleaved."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ceed_vla.compiled.engine import CompiledBackbone
from ceed_vla.scheduling import torch_pinned
from ceed_vla.sim.decoders import Row
from ceed_vla.sim.environment import Bundle, EnvPool, observation_batch
from ceed_vla.sim.rollout import PolicyRunner, drive
from ceed_vla.tensors import check_tokens
from ceed_vla.tokens.base import ActionTokens

WARM_UP = 3
# Shortest and longest pause before a measurement [s]: a robot decodes, waits for a camera, and
# decodes again, and meanwhile its cores fall asleep.
PAUSE_S = (0.01, 0.1)
PARTS = ("process", "checks", "prefill", "block", "token")
# observation, instruction -> seconds by part
Probe = Callable[[dict[str, Any], str], dict[str, float]]
# consecutive replans of one episode: observation, instruction
Observations = list[tuple[dict[str, Any], str]]


@dataclass
class Samples:
    """Measurements of one decoder, one entry per chunk; times in [s], after a pause."""

    total: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)  # total, without a pause
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)  # (n,)


def collect_observations(
    runner: PolicyRunner, pool: EnvPool, episodes: Iterable[tuple[int, str]], chunks: int
) -> list[Observations]:
    """Collect observations at the replans of closed-loop episodes, one list per episode.

    The `runner` drives episodes of (seed, task) in the first environment of the pool until there
    are observations for all `chunks`. One episode supplies at most a quarter of them, so that a
    stuck one cannot dominate.
    """
    collected: list[Observations] = []
    wanted = chunks
    longest = max(1, chunks // 4)
    for seed, task in episodes:
        replans = islice(drive(runner, pool, seed, task), min(wanted, longest))
        collected.append([(replan.observation, replan.instruction) for replan in replans])
        wanted -= len(collected[-1])
        if wanted <= 0:
            break
    return collected


def measure(
    runners: Mapping[str, PolicyRunner],
    probes: Mapping[str, Probe],
    episodes: Sequence[Observations],
    on_chunk: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Samples], dict[str, dict[str, list[float]]]]:
    """Time every runner and probe on every observation.

    A runner's warm start is its own chunk for the previous observation, as in its own closed loop.
    Runners and probes are interleaved on each observation, in an order drawn for it, so that slow
    phases of the machine affect all of them, and none always follows the same one. Before each
    there is a pause, which is drawn for the observation. After every episode each runner decodes it
    again in a loop, without pauses.

    Returns:
        Samples by runner, and seconds by probe and part.
    """
    samples = {name: Samples() for name in runners}
    probed: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in probes}
    for observation, instruction in [episodes[0][0]] * WARM_UP:
        for probe in probes.values():
            probe(observation, instruction)
        for runner in runners.values():
            runner.decode([observation], [instruction], [None])
    names = [*probes, *runners]
    draw = random.Random(0)
    for episode in episodes:
        previous: dict[str, Tensor | None] = {}
        for observation, instruction in episode:
            pause = draw.uniform(*PAUSE_S)
            for name in draw.sample(names, len(names)):
                time.sleep(pause)
                if name in probes:
                    for part, seconds in probes[name](observation, instruction).items():
                        probed[name][part].append(seconds)
                    continue
                started = time.perf_counter()
                chunk = runners[name].decode([observation], [instruction], [previous.get(name)])[0]
                samples[name].total.append(time.perf_counter() - started)
                samples[name].prefill.append(chunk.seconds["prefill"])
                samples[name].decode.append(chunk.seconds["decode"])
                samples[name].tokens.append(chunk.tokens)
                previous[name] = chunk.warm_start
            on_chunk()
        for name in draw.sample(list(runners), len(runners)):
            samples[name].loop += _looped(runners[name], episode)
    return samples, probed


def _looped(runner: PolicyRunner, episode: Observations) -> list[float]:
    """Times of a runner's chunks of an episode, one right after the other [s]."""
    times = [time.perf_counter()]
    previous = None
    for observation, instruction in episode:
        previous = runner.decode([observation], [instruction], [previous])[0].warm_start
        times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)]


def bare_parts(bundle: Bundle) -> Probe:
    """Make a probe that times each part of a chunk (`PARTS`) alone.

    "process" is the preprocessor, "checks" validates images, state, words and tokens, "block" is a
    forward of n - 1 tokens and "token" a forward of one.
    """
    policy, preprocess, _ = bundle
    n = policy.config.block_length
    device = str(policy.config.device)
    cold = True

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @torch.inference_mode()
    def probe(observation: dict[str, Any], instruction: str) -> dict[str, float]:
        nonlocal cold
        if cold:  # a compiler's threads must not inherit one core
            prefix = timed(observation, instruction)[1]
            if isinstance(policy.backbone, CompiledBackbone):
                policy.backbone.compile_now(prefix)
            cold = False
        with torch_pinned():
            times = timed(observation, instruction)[0]
        return {
            name: after - before
            for name, (before, after) in zip(PARTS, pairwise(times), strict=True)
        }

    def timed(observation: dict[str, Any], instruction: str) -> tuple[list[float], Any]:
        """The times between parts, and the prefix."""
        times = [now()]
        batch = observation_batch([observation], [instruction])
        batch = preprocess(batch) if preprocess else batch
        times.append(now())
        policy.check_observation(batch)
        for name in ("The previous chunk", "The guess"):
            check_tokens(
                torch.zeros(1, n, dtype=torch.int64), name, (1, n), policy.backbone.vocabulary_size
            )
        times.append(now())
        prefix = policy.backbone.prefill(batch)
        times.append(now())
        for k in (n - 1, 1):
            policy.backbone.block_logits(
                prefix, torch.zeros(1, k, dtype=torch.int64, device=device)
            )
            times.append(now())
        return times, prefix

    return probe


def make_runner(
    row: Row, bundles: Mapping[str, Bundle], executed_steps: int | None
) -> PolicyRunner:
    """Make the runner of a row; its random guesses are the same in every run."""
    generator = torch.Generator().manual_seed(row.decoding.seed)
    return PolicyRunner(bundles[row.model], row.decoding, generator, executed_steps, row.delay)


def summarise(
    samples: Samples, reference: Samples, tokens: ActionTokens, executed_steps: int
) -> dict[str, Any]:
    """Timing entries of ``report.json``: latencies [ms], control rate [Hz], speed-ups, agreement.

    Args:
        samples: Samples of the decoder.
        reference: Samples of the same model's full autoregressive decoder on the same observations.
        tokens: The policy's action tokens.
        executed_steps: Steps of a chunk whose actions are compared, as tokens and by their mean
            difference in the units of the policy.
    """
    blocks = [torch.stack(s.tokens) for s in (samples, reference)]  # (chunks, n)
    own, other = (
        block[:, : executed_steps * (tokens.tokens_per_step or tokens.block_length)]
        for block in blocks
    )
    both = tokens.readable(blocks[0]) & tokens.readable(blocks[1])
    actions, exact = (tokens.decode(block[both])[:, :executed_steps] for block in blocks)
    latency = percentiles(samples.total)
    return {
        "total_ms": latency,
        "loop_ms": percentiles(samples.loop),
        "decode_ms": percentiles(samples.decode),
        "prefill_ms": percentiles(samples.prefill),
        "control_rate_hz": round(1000 * executed_steps / latency["p50"], 1),
        "speedup_vs_ar": round(float(np.median(reference.total) / np.median(samples.total)), 3),
        "decode_speedup_vs_ar": round(
            float(np.median(reference.decode) / np.median(samples.decode)), 3
        ),
        "action_error": round(float((actions - exact).abs().mean()), 5),
        "equal_to_ar": float((own == other).double().mean()),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in [ms]."""
    values = 1000 * np.percentile(seconds, (50, 95, 99))
    return {
        name: round(float(value), 3)
        for name, value in zip(("p50", "p95", "p99"), values, strict=True)
    }
