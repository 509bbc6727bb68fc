"""Time decoding at sizes of published models, and on curves around the shipped one.

    python -m benchmarks.shapes openvla-0.3b OUT.json   # a shape; or curves, or those of a factor
    benchmarks/gpu.sh openvla-7b                          # the same on a bare machine with a GPU

Weights are random, so a cap of K always takes K forwards. Whole decodes after one prefix are timed
in every engine of the device, in turns: token by token (the block, and its executed half), and
Jacobi with caps 1 to 4, with a convergence test after every forward or none (``loop``). The last
column weighs caps 1 and 2 as the shipped student's early exit does. The benchmark needs torch,
transformers and draccus, but not lerobot.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ceed_vla.axes  # noqa: F401 - registers its decoders
from benchmarks.models.trunk import ACTION_DIM, SHAPES, CompactTrunk, Trunk
from ceed_vla.compiled.engine import compiled
from ceed_vla.decoding import BlockRequest, DecodeResult, named_config

# per chunk with the shipped student's early exit, which takes 1.28 to 1.31 (recipes/MODEL_CARD.md)
FORWARDS = 1.28
BLOCK = 56
PREFIX = {"openvla": 286, "pi0fast": 560}
EXECUTED = 0.5
BLOCK_FORWARDS = (1, 2, 4, 8, 16, 28, 40, 55)
CURVES: dict[str, tuple[int, ...]] = {
    "n": (7, 14, 28, 56, 112, 224),
    "batch": (1, 4, 16, 64),
    "prefix": (64, 128, 256, 512, 1024),
    "layers": (4, 8, 16, 32),
}
USUAL = {"n": BLOCK, "batch": 1, "prefix": 47, "layers": 4}
CAPS, LOOPS = ("cap1", "cap2", "cap3", "cap4"), ("loop1_h", "loop2_h", "loop3_h", "loop4_h")
Timed = dict[str, Callable[[], object]]


def engines(device: str) -> dict[str, Callable[[Any], Any]]:
    """Engines that run a backbone; CUDA graphs on CUDA only."""
    found: dict[str, Callable[[Any], Any]] = {
        "eager": lambda backbone: backbone,
        "compiled": compiled,
    }
    if device.startswith("cuda"):
        found["graphs"] = lambda backbone: compiled(backbone, mode="reduce-overhead")
    return found


def decodes(backbone: Any, prefix: Any, rows: int) -> Timed:
    """Whole decodes after one prefix."""
    n, device = backbone.block_length, prefix.logits.device
    step = ACTION_DIM if n % ACTION_DIM == 0 else 1
    executed = max(1, int(n // step * EXECUTED))
    generator = torch.Generator().manual_seed(1)
    guess = torch.randint(min(backbone.vocabulary_size, 255), (rows, n), generator=generator).to(
        device
    )

    def run(name: str) -> Callable[[], DecodeResult]:
        config = named_config(name)
        request = BlockRequest(config, guess=guess, tokens_per_step=step, executed_steps=executed)
        return lambda: config.decoder.decode(backbone, prefix, request)

    return {name: run(name) for name in ("ar", "ar_h", *CAPS, *LOOPS)}


def forwards(backbone: Any, prefix: Any, rows: int) -> Timed:
    """Single forwards of k tokens after the prefix."""

    def run(k: int) -> Callable[[], object]:
        tokens = torch.zeros(rows, k, dtype=torch.int64, device=prefix.logits.device)
        return lambda: (prefix.cache.roll_back(), backbone.block_logits(prefix, tokens))

    return {f"block_{k}": run(k) for k in BLOCK_FORWARDS if k < backbone.block_length}


def measure(
    timed: Timed, seconds: float, device: str, least: int = 3
) -> dict[str, dict[str, float]]:
    """p50, p95 and p99 [ms] of functions that take turns for `seconds`, after a warm-up."""

    def once(function: Callable[[], object]) -> float:
        started = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for function in timed.values():
        for _ in range(1 if device == "cpu" else 3):
            once(function)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(next(iter(samples.values()))) < least:
        for name, function in timed.items():
            samples[name].append(once(function))
    return {
        name: {
            **{f"p{p}": round(float(1000 * np.percentile(times, p)), 3) for p in (50, 95, 99)},
            "count": len(times),
        }
        for name, times in samples.items()
    }


@torch.inference_mode()
def time_backbone(
    backbone: Any, rows: int, prefix_length: int, seconds: float, device: str
) -> dict[str, Any]:
    """Time all engines of one backbone.

    Returns:
        "ms": engine -> decode, single forward or prefill -> percentiles; "x_ar": their ratios; and
        on a GPU its peak memory.
    """
    dtype = next(backbone.parameters()).dtype
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    embeds = torch.randn(
        rows, prefix_length, backbone.width, generator=torch.Generator().manual_seed(2)
    )
    observation = {"embeds": embeds.to(device, dtype)}
    built = {name: make(backbone) for name, make in engines(device).items()}
    prefixes = {name: engine.prefill(observation) for name, engine in built.items()}
    timed: Timed = {}
    for name, engine in built.items():
        parts = decodes(engine, prefixes[name], rows) | forwards(engine, prefixes[name], rows)
        timed |= {f"{name} {part}": function for part, function in parts.items()}
    found = measure(timed, seconds, device)
    found |= measure({"eager prefill": lambda: backbone.prefill(observation)}, seconds / 10, device)
    times: dict[str, Any] = {}
    for name, percentiles in found.items():
        engine, part = name.split()
        times.setdefault(engine, {})[part] = percentiles
    torch._dynamo.reset()
    return {
        "ms": times,
        "x_ar": ratios(times),
        **({"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {}),
    }


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """p50 of AR over that of other decoders, each in its fastest engine, without the prefill.

    `student` takes `FORWARDS` forwards.
    """

    def best(part: str) -> float:
        return min(times[part]["p50"] for times in found.values() if part in times)

    student = best("cap1") + (FORWARDS - 1) * (best("cap2") - best("cap1"))
    ways = {**{part: best(part) for part in ("ar_h", *CAPS, *LOOPS)}, "student": student}
    return {name: round(best("ar") / way, 2) for name, way in ways.items()} | {
        "student_v_ar_h": round(best("ar_h") / student, 2)
    }


def shape(
    name: str, device: str, dtype: torch.dtype, seconds: float, batches: tuple[int, ...]
) -> dict[str, Any]:
    """Time one of `SHAPES` at every batch size."""
    backbone = Trunk(SHAPES[name], BLOCK, dtype, device)
    prefix = PREFIX[name.partition("-")[0]]
    found = {
        rows: time_backbone(backbone, rows, prefix, seconds / len(batches), device)
        for rows in batches
    }
    parameters = sum(p.numel() for p in backbone.parameters())
    return {"parameters": parameters, "prefix": prefix, "block": BLOCK, "batches": found}


def curves(factors: tuple[str, ...], device: str, seconds: float) -> dict[str, Any]:
    """Time `CURVES`, one factor at a time around the shipped compact trunk.

    Returns:
        Factor -> value -> times and ratios.
    """
    todo = [(factor, value) for factor in factors for value in CURVES[factor]]
    result: dict[str, Any] = {"usual": USUAL} | {factor: {} for factor in factors}
    for factor, value in todo:
        sizes = {**USUAL, factor: value}
        backbone = CompactTrunk(sizes["n"], sizes["layers"], device=device)
        found = time_backbone(
            backbone, sizes["batch"], sizes["prefix"], seconds / len(todo), device
        )
        result[factor][value] = found
        print(f"{factor} {value}: {found['x_ar']}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "part", choices=(*SHAPES, "curves", *(f"curves-{factor}" for factor in CURVES))
    )
    parser.add_argument("output", type=Path, help="JSON file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default="", choices=("", "float32", "bfloat16"), help="bfloat16 on a GPU"
    )
    parser.add_argument("--minutes", type=float, default=5, help="of timing, without compilation")
    parser.add_argument("--batches", default="", help="batch sizes of the shapes; default 1,8")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(options.device)
    of_curves = options.part.startswith("curves")
    if of_curves and (options.dtype or options.batches):
        parser.error("curves are in float32 and have batch sizes of their own")
    chosen = options.dtype or ("bfloat16" if cuda and not of_curves else "float32")
    dtype = getattr(torch, chosen)
    seconds = 60 * options.minutes
    if of_curves:
        _, _, factor = options.part.partition("-")
        result = curves((factor,) if factor else tuple(CURVES), options.device, seconds)
    else:
        result = shape(
            options.part,
            options.device,
            dtype,
            seconds,
            tuple(map(int, (options.batches or "1,8").split(","))),
        )
    name = torch.cuda.get_device_name() if cuda else platform.processor()
    about = {
        "part": options.part,
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "torch": torch.__version__,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(about | result, indent=1) + "\n")
    print(
        *(f"batch {rows}: {found['x_ar']}" for rows, found in result.get("batches", {}).items()),
        sep="\n",
    )


if __name__ == "__main__":
    main()
