"""``ceed-vla context``: train a scorer of the prefix tokens of a frozen policy.

It is stored in a copy of the policy's checkpoint. The scores of dropped tokens learn to add up to
the divergence that dropping them causes in the policy's predictions at the fixed point.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ceed_vla.axes.context.scorer import CONTEXT, ContextScorer, keep_scored
from ceed_vla.backbones.capabilities import ChoosesPrefix, check_whole_prefix, require
from ceed_vla.checkpoints import load, save
from ceed_vla.fields import COUNTS, ranged
from ceed_vla.files import write_text
from ceed_vla.training.beside import BesideConfig, fixed_points_of, mixed_precision
from ceed_vla.training.beside_run import BesideRun, beside_run
from ceed_vla.training.distill_data import OnlineData, StoredData
from ceed_vla.training.optim import take_step
from ceed_vla.training.settings import RATES

REPORT = "context.json"
SUBSETS = 4  # subsets of dropped tokens per batch
Data = OnlineData | StoredData
LEAST = 1e-4  # smallest divergence that is distinguished
PLACES = 10.0  # learning rate of places over that of other parameters


@dataclass
class ContextConfig(BesideConfig):
    """Settings of `ceed-vla context`.

    Attributes:
        dropped: Most tokens that are dropped together, in random subsets; 1 drops one at a time.
        fixed: Keep the same tokens in all frames, those with the highest mean scores.
    """

    dropped: int = ranged(1, "[1, 99999]")
    fixed: bool = False
    steps: int = ranged(200, COUNTS)
    lr: float = ranged(1e-2, RATES)


class Scored:
    """Prefixes of B frames, with the policy's fixed points (B, n) and their log-probabilities.

    The log-probabilities are (B, n, V).
    """

    def __init__(self, data: Data, rows: Any) -> None:
        self.batch = data.observations(rows)
        policy: Any = data.policy
        self.backbone = policy.backbone
        self.fixed = fixed_points_of(data, rows, self.batch)
        self.embeddings = self.backbone.embed_prefix(self.batch)
        self.tokens: tuple[Tensor, Tensor, Tensor] = self.backbone.prefix_tokens(self.embeddings)
        self.full = self._behind(self.embeddings)
        live = policy.tokenizer.weight(self.fixed)  # (B, n), 0 behind a stop token
        self.weight = live / live.sum(-1, keepdim=True).clamp(min=1)

    def without(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Effect of keeping only the `count` prefix tokens of the highest `scores` (B, N).

        Returns:
            Mean KL (B,), and the share (B,) of the fixed point's tokens that stay the same.
        """
        own = self._behind(keep_scored(self.backbone, self.embeddings, scores, count))
        apart = F.kl_div(own, self.full, reduction="none", log_target=True).sum(-1)  # (B, n)
        same = own.argmax(-1) == self.fixed
        return (apart * self.weight).sum(-1), (same * self.weight).sum(-1)

    def _behind(self, embeddings: Any) -> Tensor:
        with mixed_precision("cpu"):
            logits = self.backbone.packed_logits(embeddings, [self.fixed])[1][0]
        found: Tensor = logits.float().log_softmax(-1)
        return found


def context(config: ContextConfig) -> Path:
    """Train a scorer, write a checkpoint with it and a report, and return the checkpoint's folder.

    The errors are those of `exits`.
    """
    with beside_run(config) as run:
        return _context(config, run)


def _context(config: ContextConfig, run: BesideRun[ContextConfig]) -> Path:
    """`context`, as a run in its output folder."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    policy, pre, post = load(config.policy_path)
    policy.requires_grad_(False)
    check_whole_prefix(policy, "context")
    chooser = require(policy.backbone, ChoosesPrefix, "context")
    data = config.data(policy, pre, states=False)
    frames = Scored(data, data.held_out)
    scorer = ContextScorer(chooser.exit_parts()[2], int(frames.tokens[1][0].sum()))
    train(scorer, data, run)
    random = np.random.default_rng(config.seed)
    ranking = mean_scores(scorer, Scored(data, data.draw(config.eval_frames, random, 0)))
    worth = held_out(scorer, frames, ranking, config.seed)
    if config.fixed:
        forget_frames(scorer, ranking)
    if policy.backbone.context:
        policy.config.forget()
    policy.backbone.context = (scorer.requires_grad_(False),)
    save(run.output, policy, pre, post, unchanged=True)
    write_text(
        run.output / REPORT,
        json.dumps({"steps": config.steps, "dropped": config.dropped, "kept": worth}, indent=2),
    )
    lines = [f"keep{n}: {found}" for n, found in worth.items()]
    print(*lines, f"Written: {run.output / CONTEXT}", sep="\n")
    return run.output


def train(scorer: ContextScorer, data: Data, run: BesideRun[ContextConfig]) -> None:
    """Train a scorer on the divergences that random subsets of dropped tokens cause."""
    config = run.config
    rate = {id(scorer.place): PLACES * config.lr}
    groups = [{"params": [p], "lr": rate.get(id(p), config.lr)} for p in scorer.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)
    tokens = len(scorer.place)
    most = max(1, min(config.dropped, len(scorer.place) - 1))
    for step in run.steps("context", data, scorer, optimizer):
        random = np.random.default_rng([config.seed, step])
        frames = Scored(data, data.draw(config.batch_size, random, step))
        loss = torch.zeros(())
        for _ in range(SUBSETS):
            count = int(random.integers(1, most + 1))
            order = random.random((config.batch_size, tokens)).argsort(1)
            kept = torch.from_numpy(order >= count)  # (B, N)
            target = frames.without(kept.float(), tokens - count)[0].clamp(min=LEAST).log()  # (B,)
            lost = scorer(*frames.tokens).masked_fill(kept, -torch.inf).logsumexp(-1)
            loss = loss + (lost - target).abs().mean() / SUBSETS
        take_step(optimizer, loss, step, config.steps)
        run.show(loss=loss.item())


@torch.no_grad()
def mean_scores(scorer: ContextScorer, frames: Scored) -> Tensor:
    """Mean score of every token (N,) in `frames`."""
    found: Tensor = scorer(*frames.tokens).mean(0)
    return found


@torch.no_grad()
def forget_frames(scorer: ContextScorer, ranking: Tensor) -> None:
    """Make a scorer rank the tokens the same in every frame, by the scores `ranking` (N,)."""
    scorer.place.copy_(ranking)
    scorer.out.weight.zero_()


def held_out(scorer: ContextScorer, frames: Scored, ranking: Tensor, seed: int) -> dict[int, Any]:
    """Compare ways to choose the kept tokens on held-out frames: by the frame, or by the same
    `ranking` (N,) in all of them.

    Returns:
        Number of kept tokens -> way to choose them -> mean KL, and the share of action tokens that
        stay the same after correct ones.
    """
    (x, may_go, _), scores = frames.tokens, scorer(*frames.tokens)  # (B, N)
    ways = {
        "scorer": scores,
        "places": ranking.expand_as(scores),
        "norm": x[may_go].float().norm(dim=-1).view_as(scores),
        "random": torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)),
    }
    worth: dict[int, Any] = {}
    for count in sorted({max(1, scores.shape[1] * eighths // 8) for eighths in range(1, 8)}):
        found = {name: frames.without(way, count) for name, way in ways.items()}
        worth[count] = {
            name: [round(c.float().mean().item(), 4) for c in costs]
            for name, costs in found.items()
        }
    return worth
