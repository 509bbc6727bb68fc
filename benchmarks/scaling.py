"""Rates of collecting and distilling, measured here, and what follows for a 7B model on 1 M episodes.

    python benchmarks/scaling.py            # two to four minutes on two cores

Measured: seconds a frame of `ceed-vla collect`, and a sample of `ceed-vla distill` with stored and with online
trajectories, for a small image-text-to-text model on simulated demonstrations; the bytes they store; and the rate of
this machine's matrix products. The time that the method's arithmetic takes at that rate is printed as a share.
Derived: the same arithmetic for a larger model, on a GPU whose published rates are given in `Gpu`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of benchmarks/models, which are not installed


@dataclass(frozen=True)
class Gpu:
    """Published rates of one GPU, and the share of them that is reached (an assumption)."""

    name: str = "H100 SXM"
    flops: float = 989e12  # [1/s] dense bf16
    bandwidth: float = 3.35e12  # [byte/s]
    flops_share: float = 0.4
    bandwidth_share: float = 0.6


@dataclass(frozen=True)
class Work:
    """Arithmetic of one frame.

    Attributes:
        parameters: Weights that every token passes.
        prefix: Tokens ``P`` of images and text.
        block: Action tokens ``n``.
    """

    parameters: float
    prefix: int
    block: int

    @property
    def token(self) -> float:
        """Operations of a forward over one token."""
        return 2 * self.parameters

    @property
    def decode(self) -> float:
        """Operations of a greedy decode: the prefix, and the block token by token."""
        return self.token * (self.prefix + self.block)

    @property
    def step(self) -> float:
        """Operations of a distillation sample: the student's own states (one forward on average), the teacher on the
        fixed point, and the student on fixed point and state, forward and backward.
        """
        one, two = self.prefix + self.block, self.prefix + 2 * self.block
        return self.token * (2 * one + 3 * two)


# ---- measured ---------------------------------------------------------------------------------------------------


def matmul_rate(seconds: float = 2.0) -> float:
    """Operations a second of products of the size that the small model has."""
    a, b = torch.randn(1024, 512), torch.randn(512, 1024)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ b
        count += 1
    return count * 2 * 1024 * 512 * 1024 / (time.perf_counter() - started)


def measure(folder: Path, episodes: int, steps: int) -> dict[str, float]:
    """Run the pipeline on a model of `Work`'s kind, and return what was measured."""
    from benchmarks.models.vlm import make_tiny_vlm
    from ceed_vla.backbones.vlm.config import VLMConfig
    from ceed_vla.checkpoints import load
    from ceed_vla.data.frames import open_dataset
    from sim.record import record
    from sim.recording.config import RecordConfig
    from sim.tabletop.policy import tabletop_config
    from training.distill import DistillConfig, TrajectoriesConfig, distill
    from training.teacher import TrainConfig, train
    from training.trajectories import CollectConfig, collect

    data, quiet = folder / "data", {"mixed_precision": "no", "log_every": 1, "threads": 1}
    record(RecordConfig(root=data, episodes=episodes, progress=False))
    base = make_tiny_vlm("smolvlm", folder / "base", width=384, layers=6)
    policy = tabletop_config(backbone=VLMConfig(path=str(base)), auxiliary_scale=[])
    teacher = train(
        TrainConfig(policy=policy, roots=str(data), output_dir=str(folder / "teacher"), steps=2, grounding_steps=0,
                    rounds=0, **quiet)
    )  # fmt: skip
    started = time.perf_counter()
    loaded, pre, _ = load(teacher)
    loading = time.perf_counter() - started
    store = open_dataset(data)
    ids = pre(store.batch(store.episode.argsort()[:1], 8))["observation.vlm.input_ids"]
    decoder = sum(p.numel() for p in loaded.backbone.decoder.layers.parameters())
    found: dict[str, float] = {
        "parameters": decoder, "prefix": ids.shape[1], "block": loaded.config.block_length, "frames": len(store),
        "matmul": matmul_rate(),
    }  # fmt: skip
    for name, states in (("greedy", False), ("states", True)):
        started = time.perf_counter()
        collect(CollectConfig(str(teacher), str(data), str(folder / name), states=states, frame_stride=2, threads=1))
        frames = sum(len(range(0, int(n), 2)) for n in torch.bincount(torch.tensor(store.episode)))
        found[f"{name}_s"] = (time.perf_counter() - started - loading) / frames
        found[f"{name}_bytes"] = sum(f.stat().st_size for f in (folder / name).glob("*.parquet")) / frames
    for name, chosen in (
        ("stored", TrajectoriesConfig(str(folder / "greedy"))),
        ("online", TrajectoriesConfig(online=True)),
    ):
        config = DistillConfig(
            teacher_path=str(teacher), trajectories=chosen, roots=str(data), output_dir=str(folder / name),
            steps=steps, batch_size=16, muon_lr=0.0, eval_every=0, eval_frames=4, **quiet,
        )  # fmt: skip
        distill(config)
        log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        rate = next(line["steps_per_s"] for line in log if line["step"] == steps and "steps_per_s" in line)
        found[f"{name}_s"] = 1 / rate / config.batch_size
    return found


def report(found: dict[str, float]) -> None:
    """Print what was measured, beside the arithmetic."""
    work = Work(found["parameters"], int(found["prefix"]), int(found["block"]))
    print(
        f"measured: {work.parameters / 1e6:.1f} M weights a token passes, P = {work.prefix}, n = {work.block}, "
        f"{found['frames']:.0f} frames; matrix products {found['matmul'] / 1e9:.0f} GFLOP/s (one thread)"
    )
    for name, operations in (
        ("greedy", work.decode),
        ("states", None),
        ("stored", work.step),
        ("online", work.step + 1.7 * work.decode),
    ):
        seconds, bound = found[f"{name}_s"], (operations or 0.0) / found["matmul"]
        share = f", {bound / seconds:.0%} of it arithmetic at that rate" if operations else ""
        what = {"greedy": "collect --states=false", "states": "collect --states=true"}.get(name, f"distill, {name}")
        size = f", {found[f'{name}_bytes']:.0f} bytes stored" if f"{name}_bytes" in found else ""
        print(f"  {what:<24}{1000 * seconds:8.1f} ms a frame{share}{size}")


# ---- derived ----------------------------------------------------------------------------------------------------


def derive(work: Work, gpu: Gpu, frames: float, samples: float, bytes_a_frame: float) -> None:
    """Print GPU-hours and wall-clock of collecting and distilling."""
    flops, bandwidth = gpu.flops * gpu.flops_share, gpu.bandwidth * gpu.bandwidth_share
    read = 2 * work.parameters / bandwidth  # [s] all bf16 weights once: the least of one decoded token

    def decode(batch: int) -> float:
        """Seconds a frame of greedy decoding of a batch."""
        return work.token * work.prefix / flops + (work.block - 1) * max(read / batch, work.token / flops)

    step = work.step / flops
    share = 1.7  # the fixed point of every sample, and of the chunk before for the 70 % that start from it
    rows = {
        "collect, all frames, batch 64": frames * decode(64),
        "distill, stored": samples * step,
        "distill, online, batch 8 a GPU": samples * (step + share * decode(8)),
        "distill, online, batch 32 a GPU": samples * (step + share * decode(32)),
    }
    print(
        f"derived: {work.parameters / 1e9:.0f} B weights, P = {work.prefix}, n = {work.block}, {frames:.0e} frames, "
        f"{samples:.0e} samples, {gpu.name} at {gpu.flops_share:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s and "
        f"{gpu.bandwidth_share:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s; {frames * bytes_a_frame / 1e9:.0f} GB stored"
    )
    print(f"  {'':<34}{'GPU-hours':>10}{'1 GPU':>12}{'8 GPUs':>12}{'64 GPUs':>12}")
    for name, seconds in rows.items():
        wall = "".join(f"{_time(seconds / gpus):>12}" for gpus in (1, 8, 64))
        print(f"  {name:<34}{seconds / 3600:>10.0f}{wall}")
    for batch in (8, 32):
        equal = frames * decode(64) / (share * decode(batch))
        print(
            f"  storing all frames costs as much as decoding {equal:.1e} samples online at batch {batch}: "
            f"{equal / frames:.2f} passes over the frames"
        )


def _time(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recorded", type=int, default=6, help="simulated episodes to measure on")
    parser.add_argument("--steps", type=int, default=8, help="distillation steps to measure")
    parser.add_argument("--parameters", type=float, default=7.0, help="size of the derived model [billions]")
    parser.add_argument("--prefix", type=int, default=290, help="its prefix: 256 patches and the prompt")
    parser.add_argument("--block", type=int, default=56, help="its block: 8 steps of 7 dimensions")
    parser.add_argument("--episodes", type=float, default=1e6)
    parser.add_argument("--frames", type=float, default=100, help="frames an episode")
    parser.add_argument("--samples", type=float, default=1e7, help="samples of the distillation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("MUJOCO_GL", "egl")
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),  # progress bars
    ):
        found = measure(Path(folder), options.recorded, options.steps)
    report(found)
    work = Work(options.parameters * 1e9, options.prefix, options.block)
    frames = options.episodes * options.frames
    derive(work, Gpu(), frames, options.samples, found["greedy_bytes"])


if __name__ == "__main__":
    main()
