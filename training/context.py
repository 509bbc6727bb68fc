"""``ceed-vla context``: learn what a frozen policy needs of its prefix, into a file beside a copy of its checkpoint.

The scores of dropped tokens learn to add up to how far the policy's own scores at the fixed point move without them.
Views are parts of the images that many frames can do with, and a glance at state and words learns which ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from ceed_vla.backbones.base import View
from ceed_vla.backbones.context import CONTEXT, ContextScorer, cells, choose, keep_scored
from ceed_vla.checkpoints import load, save
from ceed_vla.errors import CeedVLAError
from ceed_vla.fields import COUNTS, ranged
from ceed_vla.files import write_text
from ceed_vla.outputs import claim_folder
from training.distill_data import DistillData
from training.optim import cosine_factor
from training.settings import RATES, BesideConfig

REPORT = "context.json"
SUBSETS, LEAST, PLACES = 4, 1e-4, 10.0  # of a batch; divergence as good as none; learning rate of places over others
VIEWS, BOUNDS = 24, (0.02, 0.01, 0.03, 0.05)  # most views; divergences, of which they are found for the first
GLANCES, HIGH = 3000, 0.8  # steps that it learns; its answers are this quantile


@dataclass
class ContextConfig(BesideConfig):
    """Settings of `ceed-vla context`.

    Attributes:
        dropped: Most tokens that are dropped together, in random subsets; 1 leaves one out at a time.
    """

    dropped: int = ranged(1, "[1, 99999]")
    steps: int = ranged(200, COUNTS)
    lr: float = ranged(1e-2, RATES)


class Scored:
    """Prefixes of B frames with the policy's fixed points (B, n), and its log-probabilities (B, n, V) there."""

    def __init__(self, data: DistillData, rows: Any) -> None:
        self.batch, self.backbone = data.observations(rows), data.policy.backbone
        self.fixed = data.policy.decode(self.batch, "jacobi", read=False).tokens
        self.embeddings = self.backbone.embed_prefix(self.batch)
        self.tokens: tuple[Tensor, Tensor, Tensor] = self.backbone.prefix_tokens(self.embeddings)
        self.full = self._behind(self.embeddings)
        step = data.policy.tokenizer.tokens_per_step
        self.executed = None if step is None else data.policy.config.n_action_steps * step

    def without(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean KL (B,), and which tokens (B, n) stay, behind the `count` tokens of the highest `scores` (B, N)."""
        return self._cost(keep_scored(self.backbone, self.embeddings, scores, count))

    def seeing(self, view: View) -> tuple[Tensor, Tensor]:
        """The same behind a `view`, of the executed steps' tokens."""
        return self._cost(self.backbone.embed_view(self.batch, view), self.executed)

    def all_views(self, views: Tensor) -> Tensor:
        """The divergences (B, W) behind all `views`."""
        return torch.stack([self.seeing(tuple(map(tuple, view)))[0] for view in views.tolist()], dim=1)

    def _cost(self, embeddings: Any, slots: int | None = None) -> tuple[Tensor, Tensor]:
        own = self._behind(embeddings)[:, :slots]
        apart = F.kl_div(own, self.full[:, :slots], reduction="none", log_target=True).sum(-1).mean(-1)
        return apart, own.argmax(-1) == self.fixed[:, :slots]

    def _behind(self, embeddings: Any) -> Tensor:
        return self.backbone.packed_logits(embeddings, [self.fixed])[1][0].float().log_softmax(-1)


def context(config: ContextConfig) -> Path:
    """Train, write a checkpoint with a scorer and what it is worth, and return its folder; raises as `exits` does."""
    output = claim_folder("output_dir", config.output_dir, (), ())
    torch.manual_seed(config.seed)
    policy, pre, post = load(config.policy_path)
    policy.requires_grad_(False)
    data = DistillData(config.roots, policy, pre, eval_frames=config.eval_frames, seed=config.seed)
    data.split()
    frames = Scored(data, data.held_out)
    rows = data.draw(config.eval_frames, np.random.default_rng(config.seed), 0)
    views = find_views(Scored(data, rows)) if policy.backbone.view else []
    sizes = policy.backbone.exit_parts()[2], int(frames.tokens[1][0].sum())
    scorer = ContextScorer(*sizes, views, policy.backbone.known_width)
    glanced = train(scorer, data, config)
    worth = held_out(scorer, frames, config.seed)
    seen = {}
    if views:
        learn_to_glance(scorer.glance, *map(torch.cat, zip(*glanced, strict=True)))
        seen = glances(scorer.eval(), frames)
    if policy.backbone.context:
        policy.config.forget()
    policy.backbone.context = (scorer.requires_grad_(False),)
    save(output, policy, pre, post)
    report = {"steps": config.steps, "dropped": config.dropped, "kept": worth, "seen": seen}
    write_text(output / REPORT, json.dumps(report, indent=2))
    lines = [f"keep{n}: {found}" for n, found in worth.items()] + [f"look{n}: {found}" for n, found in seen.items()]
    print(*lines, f"Written: {output / CONTEXT}", sep="\n")
    return output


def train(scorer: ContextScorer, data: DistillData, config: ContextConfig) -> list[tuple[Tensor, Tensor]]:
    """Train a scorer on what random subsets of the tokens cost; what is known of the frames, and what views cost."""
    glanced: list[tuple[Tensor, Tensor]] = []
    rate = {id(scorer.place): PLACES * config.lr}
    groups = [{"params": [p], "lr": rate.get(id(p), config.lr)} for p in scorer.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine_factor(s, config.steps, config.steps // 20))
    tokens, most = len(scorer.place), min(config.dropped, len(scorer.place) - 1)
    for step in (bar := trange(config.steps, desc="context", unit="step", dynamic_ncols=True)):
        random = np.random.default_rng([config.seed, step])
        frames, loss = Scored(data, data.draw(config.batch_size, random, step)), torch.zeros(())
        for _ in range(SUBSETS):
            count, order = int(random.integers(1, most + 1)), random.random((config.batch_size, tokens)).argsort(1)
            kept = torch.from_numpy(order >= count)  # (B, N)
            target = frames.without(kept.float(), tokens - count)[0].clamp(min=LEAST).log()  # (B,)
            lost = scorer(*frames.tokens).masked_fill(kept, -torch.inf).logsumexp(-1)
            loss = loss + (lost - target).abs().mean() / SUBSETS
        if not torch.isfinite(loss):
            raise CeedVLAError(f"The loss is {loss.item()} at step {step}: training diverged. Lower --lr.")
        loss.backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if len(scorer.views):
            glanced.append((frames.backbone.known(frames.batch), frames.all_views(scorer.views)))
    return glanced


def held_out(scorer: ContextScorer, frames: Scored, seed: int) -> dict[int, Any]:
    """Tokens kept -> what ways to choose them cost: mean KL, and the share of tokens that stay, behind right ones."""
    (x, may_go, _), scores = frames.tokens, scorer(*frames.tokens)  # (B, N)
    ways = {
        "scorer": scores,
        "places": scores.mean(0).expand_as(scores),  # the same in all frames
        "norm": x[may_go].float().norm(dim=-1).view_as(scores),
        "random": torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)),
    }
    return {
        count: {name: _rounded(frames.without(way, count)) for name, way in ways.items()}
        for count in sorted({max(1, scores.shape[1] * eighths // 8) for eighths in range(1, 8)})
    }


def find_views(frames: Scored) -> list[View]:
    """Parts of the images, from the smallest to the whole: each without a row or a column of a camera's cells that
    another has, and the one that saves most where frames move within the first of `BOUNDS`.
    """
    whole: View = frames.backbone.view
    found, moves = [whole], {whole: torch.zeros(len(frames.fixed))}

    def size(view: View) -> int:
        return int(cells(torch.tensor([view])))

    def saves(view: View) -> float:
        moves[view] = moves[view] if view in moves else frames.seeing(view)[0]
        return float((least - size(view)).clamp(min=0)[moves[view] <= BOUNDS[0]].sum())

    while len(found) < VIEWS:
        fits = [torch.where(moves[view] <= BOUNDS[0], size(view), size(whole)) for view in found]
        least = torch.stack(fits).amin(0)  # (B,) cells that frames need so far
        best = max((part for view in found for part in _smaller(view) if part not in found), key=saves, default=whole)
        if not saves(best):
            break
        found.append(best)
    return sorted(found, key=size)


def learn_to_glance(glance: nn.Module, known: Tensor, costs: Tensor) -> None:
    """Let it answer with a high quantile of the logarithms of what views cost (N, W), where `known` (N, K) is there."""
    target, optimizer = costs.clamp(min=LEAST).log(), torch.optim.AdamW(glance.parameters(), lr=3e-3, weight_decay=1e-2)
    for step in range(GLANCES):
        rows = torch.randint(len(known), (128,))
        missed = target[rows] - glance(known[rows])
        torch.maximum(HIGH * missed, (HIGH - 1) * missed).mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / GLANCES)
        optimizer.step()
        optimizer.zero_grad()


def glances(scorer: ContextScorer, frames: Scored) -> dict[float, list[float]]:
    """Bound -> share of the cells that are computed, and the divergence behind them: mean, and of the worst tenth."""
    costs, sizes, report = frames.all_views(scorer.views), cells(scorer.views), {}
    expected, worst = scorer.glance(frames.backbone.known(frames.batch)), -(-len(costs) // 10)
    for bound in sorted(BOUNDS):
        chosen = choose(expected, bound)  # (B,)
        moved = costs.gather(1, chosen.unsqueeze(1)).squeeze(1)
        numbers = (sizes[chosen] / sizes[-1]).mean(), moved.mean(), moved.topk(worst).values.mean()
        report[bound] = [round(number.item(), 4) for number in numbers]
    return report


def _smaller(view: View) -> Iterator[View]:
    for camera, window in enumerate(view):
        for edge, step in enumerate((1, -1, 1, -1)):
            top, bottom, left, right = (value + step * (place == edge) for place, value in enumerate(window))
            if top < bottom and left < right:
                yield (*view[:camera], (top, bottom, left, right), *view[camera + 1 :])


def _rounded(costs: tuple[Tensor, Tensor]) -> list[float]:
    return [round(cost.float().mean().item(), 4) for cost in costs]
