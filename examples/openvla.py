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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of benchmarks/models, which are not installed

from benchmarks.models.openvla import write_openvla
from ceed_vla.checkpoints import load
from ceed_vla.convert import ConvertConfig, convert
from ceed_vla.data.frames import FrameStore, open_dataset
from ceed_vla.decoding import DecodingConfig
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from sim.record import record
from sim.recording.config import RecordConfig
from training.distill import DistillConfig, TrajectoriesConfig, distill
from training.exits import ExitsConfig, exits
from training.losses import chunk_distance
from training.teacher import TrainConfig, train
from training.trajectories import CollectConfig, collect


def make_fine_tune(folder: Path, chunk_size: int, seed: int) -> tuple[Path, Path, Path]:
    """A tiny OpenVLA that has learnt a few simulated demonstrations: (its checkpoint, their data, held-out data)."""
    record(RecordConfig(root=folder / "data", episodes=12, progress=False))
    record(RecordConfig(root=folder / "held-out", episodes=4, seed=1000, progress=False))
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


def replans(store: FrameStore, steps: int, frames: int, rows: int = 16) -> Iterator[NDArray[np.int64]]:
    """The first frames in groups (B,), every one behind the one that lies `steps` before it in its episode."""
    position = np.arange(len(store)) - np.searchsorted(store.episode, store.episode)  # (N,) in the episode
    turn = (position // steps)[:frames]
    for index in range(turn.max() + 1):
        group = np.flatnonzero(turn == index)
        yield from np.split(group, range(rows, len(group), rows))


@torch.no_grad()
def compare(checkpoint: Path, data: Path, device: str, frames: int = 96) -> dict[str, float]:
    """Forwards a chunk behind the prefix of each decoder, and its agreement with greedy decoding, on frames of `data`.

    A chunk starts at every frame. The warm start is the chunk that began the executed steps earlier, shifted by them;
    an episode's first chunks start from the mid bins.
    """
    policy, pre, _ = load(checkpoint, device)
    store, config = open_dataset(data), policy.config
    decoders: dict[str, str | DecodingConfig] = {
        "greedy (AR)": "ar",
        "Jacobi, random start": DecodingConfig(method="jacobi", guess="random"),
        "Jacobi, warm start": DecodingConfig(method="jacobi", guess="previous"),
        "... and at most 2": "cap2_fresh",
    }
    if policy.backbone.exits:
        decoders["1 layer, then all"] = "depth1_cap2_fresh"
    print(f"{checkpoint}:")
    means: dict[str, float] = {}
    greedy, steps = torch.empty(0), config.n_action_steps
    for name, decoding in decoders.items():
        tokens = torch.full((len(store), config.block_length), -1, device=device)  # -1: not decoded
        previous, random = tokens.clone(), torch.Generator().manual_seed(0)
        forwards: list[int] = []
        for group in replans(store, steps, frames):
            batch = pre(store.batch(group, config.chunk_size))
            result = policy.decode(batch, decoding, previous=previous[group], generator=random)
            tokens[group] = result.tokens
            goes_on = np.flatnonzero(group + steps < store.episode_end[group])
            previous[group[goes_on] + steps] = result.tokens[goes_on]
            forwards += result.iterations.tolist()
        greedy = tokens if decoding == "ar" else greedy
        equal = (tokens == greedy)[:frames].float().mean().item()
        means[name] = float(np.mean(forwards))
        print(
            f"  {name:<20} {means[name]:5.1f} forwards a chunk of {config.block_length} tokens, "
            f"{equal:6.1%} of the greedy tokens"
        )
    print(f"  {_error(policy, store, greedy[:frames]):.3f} between greedy and demonstrated actions")
    return means


def _error(policy: CeedVLAPolicy, store: FrameStore, tokens: torch.Tensor) -> float:
    """Mean distance of the first chunks from the demonstrations, in halves of the actions' range."""
    low, high = policy.tokenizer.low.float(), policy.tokenizer.high.float()
    actions, padded = store.chunks(np.arange(len(tokens)), policy.config.chunk_size)
    chunks = policy.tokenizer.decode(tokens.cpu())
    return chunk_distance(chunks, actions.clamp(low, high), (~padded).float(), (high - low) / 2).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of an OpenVLA fine-tune; a tiny one is made without it")
    parser.add_argument("--data", type=Path, help="LeRobotDataset folder with its demonstrations")
    parser.add_argument("--held_out", type=Path, help="LeRobotDataset folder to measure on; --data without it")
    parser.add_argument("--unnorm_key", default="", help="data set of the model's statistics")
    parser.add_argument("--camera", default="front", help="camera of the data that the model looks through")
    parser.add_argument("--chunk_size", type=int, default=8, help="actions that the model writes at once")
    parser.add_argument("--steps", type=int, default=150, help="steps of the distillation")
    parser.add_argument("--exit_steps", type=int, default=0, help="first, steps of exits beside the frozen model")
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
    before = compare(teacher, held_out, options.device)
    if options.exit_steps:  # for who may not change the weights
        settings = {"steps": options.exit_steps, "eval_frames": 16, "device": options.device}
        compare(
            exits(ExitsConfig(str(teacher), str(data), str(output / "exits"), [1], **settings)),
            held_out,
            options.device,
        )
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
    after = compare(student, held_out, options.device)
    gains = {
        start: after[f"Jacobi, {start} start"] / before[f"Jacobi, {start} start"] - 1 for start in ("random", "warm")
    }
    print(
        "Jacobi forwards to the exact greedy chunk, after distillation: "
        + ", ".join(f"{gain:+.0%} from a {start} start" for start, gain in gains.items())
    )


if __name__ == "__main__":
    main()
