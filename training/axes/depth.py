"""``ceed-vla exits``: train early-exit layers of a frozen policy by self-distillation.

They are stored in a copy of the policy's checkpoint; its weights stay bit-exact. An exit learns the
policy's full-depth predictions (Balcony) at the fixed point. Its input is the fixed point, and the
states that occur in inference: guesses, and guesses after Jacobi updates. An exit for drafts reads
verified tokens only, and is better without the states.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ceed_vla.axes  # noqa: F401 - axes that build on this one add kinds of exits
from ceed_vla.axes.depth.exits import EXITS, KINDS, make_exits
from ceed_vla.backbones.capabilities import TrainsDepths, check_whole_prefix, require
from ceed_vla.checkpoints import load, save
from ceed_vla.data.frame_stream import StreamingConfig
from ceed_vla.devices import check_device
from ceed_vla.errors import ConfigError
from ceed_vla.fields import chosen, ranged
from ceed_vla.files import write_text
from ceed_vla.training.beside import BesideConfig, mixed_precision
from ceed_vla.training.beside_run import BesideRun, beside_run
from ceed_vla.training.collect_config import guess_shares
from ceed_vla.training.corruption import StateDraw, draw_states
from ceed_vla.training.distill_data import DistillData
from ceed_vla.training.optim import take_step

REPORT = "exits.json"
READS = ("states", "fixed_points")
FIRST = 0.5  # share of the states that are guesses, on which exits are used most


@dataclass
class ExitsConfig(BesideConfig):
    """Settings of `ceed-vla exits`.

    Attributes:
        layers: Depths that get an exit, in [1, number of layers - 1].
        kind: "linear" (a norm and a residual linear layer), "layer" (a transformer layer and a
            norm), or "coarse" (as linear, and a branch with one token per control step).
        reads: Inputs that the exits learn from: "states" and fixed points, or "fixed_points" alone,
            for drafts.
        guesses: Shares of previous, mid and random guesses.
        device: Device to train on.
    """

    layers: list[int] = ranged([], "[1, 4096]")
    kind: str = chosen("linear", tuple(KINDS))
    reads: str = chosen("states", READS)
    guesses: str = "0.8,0.1,0.1"
    device: str = "cpu"
    streaming: StreamingConfig = field(default_factory=StreamingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        guess_shares(self.guesses)


def exits(config: ExitsConfig) -> Path:
    """Train exits, write a checkpoint with them and a report, and return the checkpoint's folder.

    Raises:
        ConfigError: The settings are invalid, the folder is not empty and no run is resumed, or the
            model cannot have exits.
        DatasetError: The datasets do not match the policy.
        CheckpointError: A checkpoint cannot be loaded or written, or a run cannot be resumed.
    """
    with beside_run(config) as run:
        return _exits(config, run)


def _exits(config: ExitsConfig, run: BesideRun[ExitsConfig]) -> Path:
    """`exits`, as a run in its output folder."""
    check_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    policy, pre, post = load(config.policy_path, device=config.device)
    policy.requires_grad_(False)
    check_whole_prefix(policy, "exits")
    if policy.backbone.exits:
        policy.config.forget()
    require(policy.backbone, TrainsDepths, "exits")
    policy.backbone.exits = made = make_exits(policy.backbone, config.layers, config.kind)
    if any(p.dtype != torch.float32 for own in made.values() for p in own.parameters()):
        raise ConfigError(
            "--kind layer would learn in half precision, which rounds updates away; use --kind "
            "linear."
        )
    data = config.data(policy, pre, states=True, streaming=config.streaming)
    shares = guess_shares(config.guesses)
    optimizer = torch.optim.AdamW(
        [p for e in made.values() for p in e.parameters()], lr=config.lr, weight_decay=0.0
    )
    learning = nn.ModuleDict({str(depth): module for depth, module in made.items()})
    for step in run.steps("exits", data, learning, optimizer):
        random = np.random.default_rng([config.seed, step])
        draw = draw_states(policy, config.batch_size, shares, 0, random)
        draw.pick = np.where(random.random(len(draw)) < FIRST, 0.0, draw.pick)
        batch = data.batch(data.draw(config.batch_size, random, step), draw)
        with torch.no_grad():
            embeddings = policy.backbone.embed_prefix(batch)
        blocks = [batch["fixed_point"]]
        if config.reads == "states":
            blocks.append(batch["teacher_states"])
        with mixed_precision(config.device):
            losses = divergences(policy.backbone, embeddings, blocks, batch["live"])
        loss = torch.stack(list(losses.values())).sum()
        take_step(optimizer, loss, step, config.steps)
        run.show(**{f"KL {depth}": value.item() for depth, value in losses.items()})
    worth = held_out(policy, data, shares, config.seed)
    save(run.output, policy, pre, post, unchanged=True)
    write_text(
        run.output / REPORT,
        json.dumps({"kind": config.kind, "steps": config.steps, "depths": worth}, indent=2),
    )
    for depth, found in worth.items():
        print(
            f"{depth} layers: {found['same']:.1%} of the fixed point from a guess, "
            f"{found['near']:.1%} within 2 bins, {found['drafts']:.1%} after correct tokens"
        )
    print(f"Written: {run.output / EXITS}")
    return run.output


def divergences(
    backbone: Any, embeddings: Any, blocks: list[Tensor], live: Tensor
) -> dict[int, Tensor]:
    """Mean KL between the predictions of exits and those of the full depth.

    The target is the full-depth prediction on the first block, the fixed point. So an exit learns
    to predict the fixed point from a state, not the result of one more iteration.

    Args:
        backbone: The model, with exits.
        embeddings: Prefix embeddings.
        blocks: The fixed point and states, each (B, n).
        live: (B, n) slots that count; not those behind a stop token.

    Returns:
        Depth -> mean KL over all blocks.
    """
    with torch.no_grad():
        full = (
            backbone.packed_logits(embeddings, blocks[:1])[1][0]
            .float()
            .log_softmax(-1)
            .repeat(len(blocks), 1, 1)
        )
    found = {}
    for depth in backbone.exits:
        logits = require(backbone, TrainsDepths, "exits").packed_depth_logits(
            embeddings, blocks, depth
        )
        own = torch.cat(logits).float().log_softmax(-1)
        apart = F.kl_div(own, full, reduction="none", log_target=True).sum(-1)  # (blocks * B, n)
        weight = live.repeat(len(blocks), 1)
        found[depth] = (apart * weight).sum() / weight.sum().clamp(min=1)
    return found


@torch.no_grad()
def held_out(policy: Any, data: DistillData, shares: Any, seed: int) -> dict[int, dict[str, float]]:
    """Share of the fixed points' tokens that each depth predicts on held-out frames.

    Returns:
        Depth (exits and all layers) -> shares: from a guess, the "same" tokens and those "near"
        (within 2 bins); after correct tokens, "drafts".
    """
    draw: StateDraw = draw_states(
        policy, len(data.held_out), shares, 0, np.random.default_rng(seed)
    )
    draw.pick[:] = 0
    batch = data.batch(data.held_out, draw)
    embeddings = policy.backbone.embed_prefix(batch)
    found = {}
    blocks = [batch["teacher_states"], batch["fixed_point"]]
    trained = require(policy.backbone, TrainsDepths, "exits")
    for depth in (*policy.backbone.exits, policy.backbone.num_layers):
        logits = trained.packed_depth_logits(embeddings, blocks, depth)
        guessed, drafted = ((scores.argmax(-1) - batch["fixed_point"]).abs() for scores in logits)
        right = {"same": guessed <= 0, "near": guessed <= 2, "drafts": drafted <= 0}
        found[depth] = {
            name: round(share[batch["live"].bool()].float().mean().item(), 4)
            for name, share in right.items()
        }
    return found
