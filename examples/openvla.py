"""Accelerate an OpenVLA fine-tune end to end: convert, distil, and compare the decoders.

    python examples/openvla.py

makes everything itself, tiny, in about a minute on a CPU: demonstrations in simulation, a random model in OpenVLA's
file format, and its fine-tune. With a real fine-tune and its data (a LeRobotDataset folder), on a GPU:

    python examples/openvla.py --model DIR --data ROOT --unnorm_key NAME --camera front --chunk_size 1 \
        --device cuda --steps 2000 --output runs/openvla

Its folder is read as published, without remote code, and stays as it is. `docs/other-vlas.md` explains the steps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from ceed_vla.backbones.openvla_tiny import write_openvla
from ceed_vla.checkpoints import load
from ceed_vla.convert import ConvertConfig, convert
from ceed_vla.decoding import DecodingConfig
from sim.record import record
from sim.recording.config import RecordConfig
from training.data import open_dataset
from training.distill import DistillConfig, TrajectoriesConfig, distill
from training.teacher import TrainConfig, train


def make_fine_tune(folder: Path, chunk_size: int) -> tuple[Path, Path]:
    """A tiny random OpenVLA that has learnt a few simulated demonstrations: (its checkpoint, the data)."""
    record(RecordConfig(root=folder / "data", episodes=8, progress=False))
    model = write_openvla(folder / "model")
    base = folder / "base"
    print(convert(ConvertConfig(str(model), str(base), chunk_size=chunk_size, n_action_steps=2)))
    config = TrainConfig(
        policy_path=str(base),
        roots=str(folder / "data"),
        output_dir=str(folder / "fine-tune"),
        steps=110,
        batch_size=16,
        lr=2e-3,
        warmup=5,
        grounding_steps=0,
        rounds=0,
        mixed_precision="no",
    )
    return train(config), folder / "data"


@torch.no_grad()
def compare(checkpoint: Path, data: Path, device: str, frames: int = 16) -> None:
    """Forwards a chunk behind the prefix, and agreement with greedy decoding, on consecutive frames of the data."""
    policy, pre, _ = load(checkpoint, device)
    store, chunk = open_dataset(data), policy.config.chunk_size
    decoders = {
        "greedy (AR)": "ar",
        "Jacobi": DecodingConfig(method="jacobi", guess="mid"),
        "Jacobi, warm start": DecodingConfig(method="jacobi", guess="previous"),
        "... and at most 2": DecodingConfig(method="jacobi", guess="previous", max_iterations=2),
    }
    print(f"{checkpoint}:")
    greedy: list[torch.Tensor] = []
    for name, decoding in decoders.items():
        forwards, equal, previous = 0, [], None
        for frame in range(frames):
            batch = pre(store.batch(np.array([frame]), chunk))
            result = policy.decode(batch, decoding, previous=previous, shift_steps=1)
            previous, forwards = result.tokens, forwards + result.forwards
            if decoding == "ar":
                greedy.append(result.tokens)
            equal.append((result.tokens == greedy[frame]).float().mean().item())
        print(
            f"  {name:<18} {forwards / frames:5.1f} forwards a chunk of {policy.config.block_length} tokens, "
            f"{np.mean(equal):6.1%} of the greedy tokens"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="folder of an OpenVLA fine-tune; a tiny one is made without it"
    )
    parser.add_argument("--data", type=Path, help="LeRobotDataset folder with its demonstrations")
    parser.add_argument("--unnorm_key", default="", help="data set of the model's statistics")
    parser.add_argument("--camera", default="front", help="camera of the data that the model looks through")
    parser.add_argument("--chunk_size", type=int, default=4, help="actions that the model writes at once")
    parser.add_argument("--steps", type=int, default=100, help="steps of the distillation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder for checkpoints; a temporary one without it")
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data belong together")
    output = options.output or Path(tempfile.mkdtemp(prefix="openvla-"))
    if options.model is None:
        torch.set_num_threads(1)  # more of them only get in each other's way on tiny layers
        teacher, data = make_fine_tune(output, options.chunk_size)
    else:
        teacher, data = output / "teacher", options.data
        settings = {name: getattr(options, name) for name in ("unnorm_key", "camera", "chunk_size", "device")}
        print(convert(ConvertConfig(str(options.model), str(teacher), **settings)))
    compare(teacher, data, options.device)
    student = distill(
        DistillConfig(
            teacher_path=str(teacher),
            trajectories=TrajectoriesConfig(online=True),
            roots=str(data),
            output_dir=str(output / "student"),
            steps=options.steps,
            batch_size=16,
            lr=1e-3 if options.model is None else 2e-5,
            muon_lr=1e-3 if options.model is None else 2e-5,
            eval_every=0,
            eval_frames=16,
            device=options.device,
            mixed_precision="no" if options.device == "cpu" else "bf16",
        )
    )
    compare(student, data, options.device)


if __name__ == "__main__":
    main()
