"""Accelerate an OpenVLA fine-tune end to end: convert, distil, and compare the decoders.

    python examples/openvla.py

makes everything itself, tiny, in a minute and a half on one CPU core: demonstrations in simulation, a random model in
OpenVLA's file format, and its fine-tune. With a real fine-tune and its data (LeRobotDataset folders), on a GPU:

    python examples/openvla.py --model DIR --data ROOT --held_out ROOT2 --unnorm_key NAME --camera front \
        --chunk_size 1 --device cuda --steps 2000 --output runs/openvla

Its folder is read as published, without remote code, and stays as it is. `docs/other-vlas.md` explains the steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of benchmarks/models, which are not installed

from benchmarks.models.openvla import write_openvla
from ceed_vla.convert import ConvertConfig, convert
from sim.record import record
from sim.recording.config import RecordConfig
from training.distill import DistillConfig, TrajectoriesConfig, distill
from training.open_loop import OpenLoopConfig, open_loop
from training.teacher import TrainConfig, train
from training.trajectories import CollectConfig, collect

COLD, WARM = "jacobi_random", "jacobi"  # the first guess: random, or the chunk before


def make_fine_tune(folder: Path, chunk_size: int, seed: int) -> tuple[Path, Path, Path]:
    """A tiny OpenVLA that has learnt a few simulated demonstrations: (its checkpoint, their data, held-out data)."""
    record(RecordConfig(root=folder / "data", episodes=12, progress=False))
    record(RecordConfig(root=folder / "held-out", episodes=16, seed=1000, progress=False))
    model, base = write_openvla(folder / "model", seed=seed), folder / "base"
    print(convert(ConvertConfig(str(model), str(base), chunk_size=chunk_size, n_action_steps=chunk_size // 2)))
    config = TrainConfig(
        policy_path=str(base),
        roots=str(folder / "data"),
        output_dir=str(folder / "fine-tune"),
        steps=150,
        batch_size=16,
        lr=2e-3,
        # What has hardly learnt writes nearly the same chunk in every frame, where a warm start has little to gain.
        muon_lr=1e-2,
        warmup=5,
        grounding_steps=0,
        rounds=0,
        mixed_precision="no",
        seed=seed,
    )
    return train(config), folder / "data", folder / "held-out"


def compare(checkpoint: Path, data: Path, output: Path, device: str) -> dict[str, float]:
    """Mean forwards a chunk behind the prefix, of each decoder on held-out frames; prints and draws the rest."""
    print(f"{checkpoint}:")
    decoders = f"{COLD},{WARM},cap2_fresh"
    report = open_loop(OpenLoopConfig(str(checkpoint), str(data), str(output), decoders, device=device))
    return {name: row["forwards_mean"] for name, row in report["rows"].items() if "forwards_mean" in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of an OpenVLA fine-tune; a tiny one is made without it")
    parser.add_argument("--data", type=Path, help="LeRobotDataset folder with its demonstrations")
    parser.add_argument("--held_out", type=Path, help="LeRobotDataset folder to measure on; --data without it")
    parser.add_argument("--unnorm_key", default="", help="data set of the model's statistics")
    parser.add_argument("--camera", default="front", help="camera of the data that the model looks through")
    parser.add_argument("--chunk_size", type=int, default=8, help="actions that the model writes at once")
    parser.add_argument("--steps", type=int, default=150, help="steps of the distillation")
    parser.add_argument("--seed", type=int, default=0, help="of the tiny model, and of both trainings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder for checkpoints; a temporary one without it")
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data belong together")
    tiny, output = options.model is None, options.output or Path(tempfile.mkdtemp(prefix="openvla-"))
    if tiny:
        torch.set_num_threads(1)  # more of them only get in each other's way on tiny layers
        teacher, data, held_out = make_fine_tune(output, options.chunk_size, options.seed)
        # The teacher's answers for every frame, which pays where each is seen many times.
        stored = CollectConfig(str(teacher), str(data), str(output / "trajectories"), states=False, frame_stride=1)
        trajectories = TrajectoriesConfig(str(collect(stored)))
    else:
        teacher, data, held_out = output / "teacher", options.data, options.held_out or options.data
        settings = {name: getattr(options, name) for name in ("unnorm_key", "camera", "chunk_size", "device")}
        print(convert(ConvertConfig(str(options.model), str(teacher), **settings)))
        trajectories = TrajectoriesConfig(online=True)
    before = compare(teacher, held_out, output / "before", options.device)
    student = distill(
        DistillConfig(
            teacher_path=str(teacher),
            trajectories=trajectories,
            roots=str(data),
            output_dir=str(output / "student"),
            steps=options.steps,
            batch_size=16,
            lr=3e-3 if tiny else 2e-5,
            muon_lr=1e-2 if tiny else 2e-5,
            omega=1.0 if tiny else 3.0,  # the tiny model has little skill to protect
            eval_every=0,
            eval_frames=16,
            device=options.device,
            mixed_precision="no" if options.device == "cpu" else "bf16",
            seed=options.seed,
        )
    )
    after = compare(student, held_out, output / "after", options.device)
    cold, warm = (after[start] / before[start] - 1 for start in (COLD, WARM))
    print(
        "Jacobi forwards to the exact greedy chunk, after distillation: "
        f"{cold:+.0%} from a random start, {warm:+.0%} from a warm start"
    )


if __name__ == "__main__":
    main()
