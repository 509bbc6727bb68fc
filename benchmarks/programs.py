"""Upper bound of the benefit of a program per frame: an oracle of layer programs (CoLa, arXiv
2507.07996).

    python -m benchmarks.programs --policy.path student --roots DATA --frames 80 > programs.json

A beam search skips and repeats layers, for every frame and for all frames together. A program's
error is the mean distance [bins] of the executed tokens from the fixed point, after one forward
from the warm guess. The best of hundreds of programs is good by chance. Therefore the choice of a
frame also runs on the frame one step `later` (a router could not do better) and on an `other`
frame, and the null hypothesis chooses among errors that are permuted over the frames, separately
for each program.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ceed_vla.backbones.capabilities import RunsPrograms, require
from ceed_vla.checkpoints import load
from ceed_vla.cli.commands import Command
from ceed_vla.cli.entry import run
from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.fields import COUNTS, Checked, ranged
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.training.mixture import check_fits
from ceed_vla.training.settings import split_list

type Program = tuple[int, ...]


@dataclass
class ProgramsConfig(Checked, prefix="--"):
    """Options.

    Attributes:
        policy: Checkpoint of the policy.
        roots: Comma-separated datasets.
        frames: Frames to draw, in equal parts from each dataset.
        breadth: Best programs of every length from which the search continues.
        edits: Most layers that a program skips or repeats.
    """

    policy: CheckpointPath = field(default_factory=CheckpointPath)
    roots: str = ""
    frames: int = ranged(80, "[4, 1e6]")
    breadth: int = ranged(2, COUNTS)
    edits: int = ranged(3, "[1, 64]")


class Frame:
    """The `errors` [bins] of programs on a frame.

    A frame is a row of a batch, with a warm guess and the fixed point (1, n).
    """

    def __init__(
        self, policy: Any, row: dict[str, Any], guess: torch.Tensor, fixed: torch.Tensor
    ) -> None:
        watched = policy.config.n_action_steps * policy.tokenizer.tokens_per_step
        self.backbone = policy.backbone
        self.prefix = policy.backbone.prefill(row)
        self.fixed = fixed[:, 1:watched]
        # the prefix predicts the first token
        self.tokens = torch.cat([fixed[:, :1], guess[:, 1 : watched - 1]], 1)
        self.full = tuple(range(policy.backbone.num_layers))
        self.errors = dict[Program, float]()

    def error(self, program: Program) -> float:
        if program not in self.errors:
            found = self.backbone.program_logits(self.prefix, self.tokens, program).argmax(-1)
            self.errors[program] = float((found - self.fixed).abs().double().mean())
        return self.errors[program]


def search(
    error: Callable[[Program], float], full: Program, breadth: int, edits: int
) -> dict[Program, float]:
    """Errors of all programs in a beam search from the full one.

    Each step of the search skips or repeats one more layer.
    """
    found = {full: error(full)}
    beam = [full]
    for _ in range(edits):
        edited = {
            p[: i + twice] + p[i + 1 - twice :]
            for p in beam
            for i in range(len(p))
            for twice in (0, 1)
        }
        fresh = sorted(p for p in edited if 1 <= len(p) <= 2 * len(full) and p not in found)
        found |= {p: error(p) for p in fresh}
        best = sorted(fresh, key=lambda p: found[p])
        beam = [p for i, p in enumerate(best) if sum(len(q) == len(p) for q in best[:i]) < breadth]
    return found


def drawn(config: ProgramsConfig, policy: Any, pre: Any) -> list[tuple[Frame, Frame]]:
    """Draw frames with a previous chunk, each with the frame one step later."""
    found = []
    roots = split_list(config.roots)
    steps = policy.config.n_action_steps
    for store in map(open_dataset, roots):
        check_fits(store, policy.config, pre)
        there = np.arange(steps, len(store) - 1)
        there = there[store.episode[there - steps] == store.episode[there + 1]]
        for frame in np.random.default_rng(0).permutation(there)[: -(-config.frames // len(roots))]:
            batch = pre(
                store.batch(frame + np.array([-steps, 1 - steps, 0, 1]), policy.config.chunk_size)
            )
            fixed = policy.decode(batch, "jacobi").tokens.split(1)  # of these four frames
            guess = policy.tokenizer.guess("previous", 2, torch.cat(fixed[:2]), steps).split(1)
            rows = [
                {k: v[i : i + 1] for k, v in batch.items() if torch.is_tensor(v)} for i in (2, 3)
            ]
            found.append(
                (
                    Frame(policy, rows[0], guess[0], fixed[2]),
                    Frame(policy, rows[1], guess[1], fixed[3]),
                )
            )
    return found


def choices(frames: list[Frame]) -> dict[str, list[Program]]:
    """The oracle's programs of every frame.

    They are the shortest that is not worse than the full one, and the best that is not longer.
    """
    found: dict[str, list[Program]] = {"shortest": [], "best": []}
    for frame in frames:
        errors, full = frame.errors, frame.full
        found["shortest"].append(
            min(errors, key=lambda p: (errors[p] > errors[full], len(p), errors[p]))
        )
        found["best"].append(min(errors, key=lambda p: (len(p) > len(full), errors[p], len(p))))
    return found


def entry(frames: list[Frame], chosen: list[Program]) -> dict[str, float]:
    """Mean errors of a program per frame and of the full program [bins], and shares of frames [%].

    The shares are those of the frames that are not worse, and of wrong frames that are better.
    """
    errors = np.array([f.error(p) for f, p in zip(frames, chosen, strict=True)])
    full = np.array([f.error(f.full) for f in frames])
    better = 100 * (errors < full).sum() / max((full > 0).sum(), 1)
    values = {
        "error": errors.mean(),
        "full": full.mean(),
        "not_worse": 100 * (errors <= full).mean(),
        "better": better,
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def null(frames: list[Frame]) -> dict[str, float]:
    """Layers that `shortest` saves [%], with real and with permuted errors.

    Only the programs that were tried on all frames are used.
    """
    full = frames[0].full
    random = np.random.default_rng(0)
    common = [p for p in frames[0].errors if all(p in f.errors for f in frames)]
    worse = np.array([[f.errors[p] > f.errors[full] for f in frames] for p in common])  # (K, N)
    sizes = np.array([[len(p)] for p in common])
    tables = [worse, *(random.permuted(worse, axis=1) for _ in range(20))]
    saved = [
        float(100 - 100 * np.where(t, np.inf, sizes).min(0).mean() / len(full)) for t in tables
    ]
    return {
        "programs": len(common),
        "saved": round(saved[0], 2),
        "dealt_anew": round(float(np.mean(saved[1:])), 2),
    }


@torch.inference_mode()
def programs(config: ProgramsConfig) -> dict[str, Any]:
    """Search, and print the report as JSON; `ConfigError` for invalid flags."""
    if not (config.policy.path and split_list(config.roots)):
        raise ConfigError("Set --policy.path to a checkpoint, and --roots to datasets.")
    policy, pre, _ = load(config.policy.path)
    require(policy.backbone, RunsPrograms, "A search of programs")
    if policy.tokenizer.tokens_per_step is None:
        raise ConfigError(
            "The policy's tokens are not bins of actions, so that distances between them are "
            "undefined."
        )
    pairs = drawn(config, policy, pre)
    if not pairs:
        raise DatasetError("No frame of --roots has both a chunk behind it and a frame after it.")
    frames, later = map(list, zip(*pairs, strict=True))
    full = frames[0].full
    order = np.random.default_rng(0).permutation(len(frames))
    together = search(
        lambda p: float(np.mean([f.error(p) for f in frames])), full, config.breadth, config.edits
    )
    for frame in frames:
        search(frame.error, full, config.breadth, config.edits)
    sizes = {
        len(p): min((q for q in together if len(q) == len(p)), key=lambda q: together[q])
        for p in together
    }
    chosen = {
        "-".join(map(str, sizes[size])): [sizes[size]] * len(frames) for size in sorted(sizes)
    } | choices(frames)
    report: dict[str, Any] = {"null": null(frames)}
    for name, each in chosen.items():
        report[name] = {
            "saved": round(float(100 - 100 * np.mean([len(p) for p in each]) / len(full)), 2)
        }
        report[name] |= {"own": entry(frames, each), "later": entry(later, each)}
        report[name]["other"] = entry(
            [frames[i] for i in order], [each[i] for i in np.roll(order, 1)]
        )
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    command = Command("benefit of layer programs", "benchmarks.programs ProgramsConfig programs")
    sys.exit(run("benchmarks.programs", command, sys.argv[1:]))
