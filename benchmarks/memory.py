"""Memory of acting, training and distilling: what the plan says, and what a step really takes.

    python benchmarks/memory.py                   # an image-text-to-text model of 0.1 B parameters, every mode
    python benchmarks/memory.py --parameters 0.5  # about 13 GB and five minutes on two cores
    python benchmarks/memory.py --plan            # the plan alone: 0.5 B, 3 B and 7 B, and which GPU holds it

Every mode runs in a process of its own: two optimiser steps at batch 1 (or one decoded chunk), the peak of the second
counted from before the weights were made. On a CPU that is the resident set, on a GPU the memory that torch allocated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of benchmarks/models, which are not installed

GPUS = (24, 48, 80, 141)  # [GB] RTX 4090 and L4; L40S and RTX 6000 Ada; A100 and H100; H200
RESERVE = 0.75  # share of a GPU that the plan fills; the rest is for activations at batch 1, work space and fragments
RANK = 32
LORA_SHARE = 0.012  # adapters of rank 32 on all linear layers of a 7B Llama: 80 M of 6.7 G parameters


@dataclass(frozen=True)
class Mode:
    """Bytes a parameter.

    Attributes:
        weights: Of all weights, the frozen teacher's copy included.
        learning: Of every parameter that learns: gradient, optimiser state, and its bf16 copy under autocast.
        adapters: Only adapters learn; `learning` is theirs, with their weights.
        what: In words.
    """

    weights: float
    learning: float
    what: str
    adapters: bool = False

    def bytes(self, parameters: float, learning: float, shards: int = 1) -> float:
        """Memory of a model with so many `parameters`, of which `learning` learn, cut over `shards` GPUs."""
        return (self.weights * parameters + self.learning * learning) / shards


MODES = {
    "act": Mode(2, 0, "bf16 weights"),
    "teacher_lora": Mode(2, 16, "bf16 base; fp32 adapters, gradients, AdamW", adapters=True),
    "student_lora": Mode(2, 16, "as its teacher: one base, adapters switched", adapters=True),
    "teacher_muon": Mode(4, 10, "fp32 weights, gradients, momentum; bf16 copy"),
    "teacher_full": Mode(4, 14, "fp32 weights, gradients, AdamW; bf16 copy"),
    "student_full": Mode(8, 14, "the same, and the frozen fp32 teacher"),
}


def plan() -> None:
    """Print bytes a parameter, and for usual sizes the memory and the smallest GPU that holds it."""
    print(f"{'mode':<14}{'B/param':>8} " + "".join(f"{size:>22}" for size in ("0.5 B", "3 B", "7 B")))
    for name, mode in MODES.items():
        cells = []
        for billions in (0.5, 3.0, 7.0):
            learning = LORA_SHARE * billions if mode.adapters else billions
            size = mode.bytes(billions, learning)
            fits = next((f"{gpu} GB" for gpu in GPUS if size <= RESERVE * gpu), "shard")
            cells.append(f"{size:>9.1f} GB -> {fits:<7}")
        per_parameter = mode.weights + mode.learning * (LORA_SHARE if mode.adapters else 1)
        print(f"{name:<14}{per_parameter:>8.1f} " + " ".join(cells) + f"  {mode.what}")


# ---- one mode in one process ------------------------------------------------------------------------------------


def peak_bytes(device: str, reset: bool = False) -> int:
    """Peak memory since the last reset."""
    if device != "cpu":
        import torch

        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return int(peak)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def make_policy(folder: Path, billions: float, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """A policy with random weights of about the wanted size, and an observation."""
    import torch

    from ceed_vla import CeedVLAPolicy
    from ceed_vla.backbones.vlm.config import VLMConfig
    from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
    from sim.tabletop.policy import tabletop_config

    text = json.loads((folder / "config.json").read_text())
    layers = 24 if billions >= 0.2 else 12
    width = round((billions * 1e9 / 9 / layers) ** 0.5 / 64) * 64  # a layer has 9 d ** 2 weights
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    text["text_config"] |= {**sizes, "head_dim": width // 4}
    ids = list(range(300, 555))
    backbone = VLMConfig(
        path=str(folder), dtype=dtype, architecture=json.dumps(text), action_token_ids=ids, proprio="none"
    )
    config = tabletop_config(backbone=backbone, auxiliary_scale=[], device=device)
    policy = CeedVLAPolicy(config).to(device)
    pre, _ = make_ceed_vla_pre_post_processors(config, None, instructions=["push it"])
    images = {camera: torch.rand(1, 3, 96, 96) for camera in config.cameras}
    return policy, pre({**images, "observation.state": torch.zeros(1, 14), "task": ["push it"]})


def measure(name: str, folder: Path, billions: float, device: str) -> dict[str, float]:
    """Run one mode and return its peak, beside what the plan says."""
    import torch

    from training.adapters import LoRAConfig, attach, attach_student
    from training.losses import trust_region_loss
    from training.objective import DistillationObjective
    from training.optim import build_optimizers

    torch.set_num_threads(1)
    mode = MODES[name]
    dtype = "bfloat16" if mode.weights == 2 else "float32"
    make_policy(folder, 1e-3, dtype, device)  # loads all libraries
    before = torch.cuda.memory_allocated() if device != "cpu" else _resident()
    policy, batch = make_policy(folder, billions, dtype, device)
    parameters = sum(p.numel() for p in policy.parameters())
    if name == "act":
        peak_bytes(device, reset=True)
        policy.eval().decode(batch, "jacobi")
        return {"parameters": parameters, "learning": 0, "peak": peak_bytes(device) - before}
    tokens = torch.randint(255, (1, policy.config.block_length), device=device)
    if name.startswith("student"):
        teacher = None if mode.adapters else make_policy(folder, billions, dtype, device)[0]
        if mode.adapters:
            attach_student(policy, LoRAConfig(rank=RANK))
        objective = DistillationObjective(policy.train(), teacher, trust_region_loss, 3.0)
        with torch.no_grad():
            embeddings = policy.backbone.embed_prefix(batch)
        states = {"fixed_point": tokens, "states": (tokens + 1) % 255}

        def loss() -> Any:
            return objective.losses(embeddings, states, torch.ones(2, device=device)).total
    else:
        if mode.adapters:
            attach(policy, LoRAConfig(rank=RANK))
        policy.train()

        def loss() -> Any:
            _, (logits,) = policy.backbone.packed_logits(policy.backbone.embed_prefix(batch), [tokens])
            return logits.float().log_softmax(-1)[..., 0].mean()

    muon = 1e-3 if name == "teacher_muon" else 0.0
    optimizers = build_optimizers(policy.named_parameters(), lr=1e-4, muon_lr=muon, weight_decay=0.0)
    for _ in range(2):
        peak_bytes(device, reset=True)
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            value = loss()
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    learning = sum(p.numel() for p in policy.parameters() if p.requires_grad)  # adapters come on top
    return {"parameters": parameters, "learning": learning, "peak": peak_bytes(device) - before}


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parameters", type=float, default=0.1, help="size of the measured model [billions]")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plan", action="store_true", help="measure nothing")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, Path(options.folder), options.parameters, options.device)))
        return
    if not options.plan:
        from benchmarks.models.vlm import make_tiny_vlm

        print(f"{'mode':<14}{'parameters':>12}{'learning':>12}{'plan':>10}{'measured':>10}")
        with tempfile.TemporaryDirectory() as folder:
            make_tiny_vlm("smolvlm", folder)
            for name in options.modes.split(","):
                flags = ["--parameters", str(options.parameters), "--device", options.device]
                command = [sys.executable, __file__, "--one", name, "--folder", folder, *flags]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                found = json.loads(done.stdout.splitlines()[-1])
                planned = MODES[name].bytes(found["parameters"], found["learning"])
                print(
                    f"{name:<14}{found['parameters'] / 1e6:>10.1f} M{found['learning'] / 1e6:>10.1f} M"
                    f"{planned / 1e9:>7.2f} GB{found['peak'] / 1e9:>7.2f} GB  {found['peak'] / planned:.2f}x",
                    flush=True,
                )
    plan()


if __name__ == "__main__":
    main()
