"""Fine-tune SmolVLM as an autoregressive VLA, and distil it to fewer Jacobi iterations.

    python examples/smolvlm.py

makes everything itself, tiny, in about a minute on a CPU: demonstrations in simulation, and a random model in SmolVLM's
file format. With a model that was downloaded before and a LeRobotDataset folder, on a GPU:

    python examples/smolvlm.py --model DIR --data ROOT --device cuda --lora_rank 32 --chunk_size 8 --steps 20000 \
        --student_steps 4000 --output runs/smolvlm

Any other image-text-to-text model works the same (LLaVA, LLaVA-OneVision, Qwen2.5-VL, PaliGemma). `docs/other-vlas.md`
explains the settings, `docs/scaling.md` what fits which GPU, and how to run the two training steps on many.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of benchmarks/models, which are not installed

from benchmarks.models.vlm import make_tiny_vlm
from ceed_vla.backbones.vlm.config import VLMConfig
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.decoding import DecodingConfig
from sim.record import record
from sim.recording.config import RecordConfig
from sim.tabletop.policy import tabletop_config
from training.adapters import LoRAConfig
from training.distill import DistillConfig, TrajectoriesConfig, distill
from training.teacher import TrainConfig, train
from training.trajectories import CollectConfig, collect


def policy_config(options: argparse.Namespace, model: Path) -> CeedVLAConfig:
    """A policy around the model. Cameras, state and action are taken from the data when training starts."""
    tiny, adapted = options.model is None, options.lora_rank > 0
    backbone = VLMConfig(
        path=str(model),
        weights="reference" if adapted else "copied",  # a checkpoint holds adapters, or everything
        dtype="bfloat16" if adapted and options.device != "cpu" else "float32",
    )
    settings = {
        "backbone": backbone,
        "chunk_size": options.chunk_size,
        "n_action_steps": options.chunk_size // 2,
        "decoding": DecodingConfig(max_iterations=2, watch="executed"),
        "auxiliary_scale": [],  # no regression beside the action tokens
        "device": options.device,
    }
    if tiny:
        return tabletop_config(num_bins=63, **settings)
    return CeedVLAConfig(push_to_hub=False, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of the base model; a tiny one is made without it")
    parser.add_argument("--data", type=Path, help="LeRobotDataset folder with demonstrations")
    parser.add_argument("--chunk_size", type=int, default=8, help="actions that the model writes at once")
    parser.add_argument("--lora_rank", type=int, default=0, help="rank of adapters; 0 trains all weights")
    parser.add_argument("--steps", type=int, default=250, help="steps of the fine-tuning")
    parser.add_argument("--student_steps", type=int, default=200, help="steps of the distillation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder for checkpoints; a temporary one without it")
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data belong together")
    tiny, output = options.model is None, options.output or Path(tempfile.mkdtemp(prefix="smolvlm-"))
    model, data = options.model or output / "model", options.data or output / "data"
    if tiny:
        make_tiny_vlm("smolvlm", model)
        record(RecordConfig(root=data, episodes=12, progress=False))
    common = {
        "roots": str(data),
        "batch_size": 16,
        "lora": LoRAConfig(rank=options.lora_rank),
        "lr": 3e-3 if tiny else 2e-4 if options.lora_rank else 2e-5,
        "mixed_precision": "no" if options.device == "cpu" else "bf16",
        "gradient_checkpointing": not tiny,
    }

    teacher = train(
        TrainConfig(
            policy=policy_config(options, model),
            output_dir=str(output / "teacher"),
            steps=options.steps,
            muon_lr=1e-2 if tiny else 0.0,  # all parameters to AdamW
            grounding_steps=0,
            rounds=0,
            **common,
        )
    )
    # The teacher's answers: stored, as the tiny model sees each frame many times. Large data are better decoded as
    # they are trained on (online=True), see docs/scaling.md.
    stored = output / "trajectories"
    if tiny:
        collect(CollectConfig(str(teacher), str(data), str(stored), states=False, frame_stride=1))
    student = distill(
        DistillConfig(
            teacher_path=str(teacher),
            trajectories=TrajectoriesConfig(str(stored) if tiny else "", online=not tiny),
            output_dir=str(output / "student"),
            steps=options.student_steps,
            omega=0.3 if tiny else 3.0,  # a random model has no skill to protect: speed counts
            muon_lr=2e-2 if tiny else 0.0,
            eval_every=options.student_steps,
            eval_frames=48,
            device=options.device,
            **common,
        )
    )

    print(f"{student}:")
    log = [json.loads(line) for line in (output / "student" / "log.jsonl").read_text().splitlines()]
    measured = [line for line in log if "iterations_mean" in line]  # on held-out frames
    for name, row in zip(("teacher", "student"), measured, strict=True):
        print(
            f"  {name}: {row['iterations_mean']:.1f} Jacobi iterations a chunk to its exact greedy answer, "
            f"{row['one_forward_agreement']:.0%} of that after one, {row['teacher_agreement']:.0%} of the teacher's"
        )


if __name__ == "__main__":
    main()
