"""``ceed-vla route``: learn which layers a chunk needs (CoLa, arXiv 2507.07996).

Programs are found by importance: from all layers, the layer whose loss changes the prediction of
the fixed point least is dropped, again and again. A router then learns to choose one of these
programs from the hidden vector behind the prefix. It minimises the expected cost of its choice on
frames of the datasets: the share of the layers that run, plus `harm` for every bin that the
prediction is further from the fixed point than that of all layers.

The report compares it with each program alone, and with an oracle that knows the costs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from ceed_vla.axes.programs.router import (
    MOST_PROGRAMS,
    ROUTER,
    Program,
    ProgramRouter,
    read_programs,
    written_programs,
)
from ceed_vla.backbones.capabilities import HasExits, RunsPrograms, check_whole_prefix, require
from ceed_vla.checkpoints import load, save
from ceed_vla.errors import ConfigError
from ceed_vla.fields import COUNTS, ranged
from ceed_vla.files import write_text
from ceed_vla.training.beside import BesideConfig, mixed_precision
from ceed_vla.training.beside_run import BesideRun, beside_run
from ceed_vla.training.collect_config import guess_shares
from ceed_vla.training.corruption import draw_states, guess_states, with_first
from ceed_vla.training.distill_data import DistillData
from ceed_vla.training.optim import take_step

REPORT = "route.json"


@dataclass
class RouteConfig(BesideConfig):
    """Settings of `ceed-vla route`.

    Attributes:
        programs: Number of programs, with that of all layers; each drops one layer more.
        search_frames: Frames on which the programs are found.
        harm: Cost of one bin of additional distance from the fixed point, as a share of all layers.
        guesses: Shares of previous, mid and random guesses.
    """

    programs: int = ranged(5, f"[2, {MOST_PROGRAMS}]")
    search_frames: int = ranged(128, COUNTS)
    harm: float = ranged(0.1, "[0, 1000]")
    guesses: str = "0.8,0.1,0.1"

    def __post_init__(self) -> None:
        super().__post_init__()
        guess_shares(self.guesses)


class Frames:
    """Prefixes of B frames, with the policy's guesses and fixed points (B, n)."""

    def __init__(self, data: DistillData, rows: Any, config: RouteConfig, random: Any) -> None:
        policy: Any = data.policy
        draw = draw_states(policy, len(rows), guess_shares(config.guesses), 0, random)
        batch = data.batch(rows, draw)
        self.runner = require(policy.backbone, RunsPrograms, "route")
        self.prefix = policy.backbone.prefill(batch)
        watched = policy.config.n_action_steps * policy.tokenizer.tokens_per_step
        fixed = batch["fixed_point"]
        guess = guess_states(policy, batch["previous"], draw)
        self.tokens = with_first(guess, fixed)[:, : watched - 1]
        self.wanted = fixed[:, 1:watched]

    @torch.no_grad()
    def errors(self, program: Program) -> Tensor:
        """Mean distance (B,) [bins] of a program's tokens from the fixed point."""
        with mixed_precision("cpu"):
            logits = self.runner.program_logits(self.prefix, self.tokens, program)
        found = logits.argmax(-1)
        return (found - self.wanted).abs().double().mean(1)


def route(config: RouteConfig) -> Path:
    """Find programs, train a router, write a checkpoint with it and a report; return its folder.

    The errors are those of `exits`.
    """
    with beside_run(config) as run:
        return _route(config, run)


def _route(config: RouteConfig, run: BesideRun[RouteConfig]) -> Path:
    """`route`, as a run in its output folder."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    policy, pre, post = load(config.policy_path)
    policy.requires_grad_(False)
    check_whole_prefix(policy, "route")
    require(policy.backbone, RunsPrograms, "route")
    if policy.tokenizer.tokens_per_step is None:
        raise ConfigError(
            "The policy's tokens have variable length and belong to no step, so programs cannot "
            "be compared on the executed steps."
        )
    if policy.config.n_action_steps * policy.tokenizer.tokens_per_step < 2:
        raise ConfigError(
            "The policy executes one token of a chunk, which the prefix predicts, so no layer "
            "could be left out."
        )
    if config.programs > policy.backbone.num_layers:
        raise ConfigError(
            f"programs is {config.programs}; the model has {policy.backbone.num_layers} layers, "
            "and each program drops one more."
        )
    data = config.data(policy, pre, states=False)
    text = run.find("programs", lambda: written_programs(found_programs(data, config)))
    programs = read_programs(text, policy.backbone.num_layers, str(run.output))
    router = ProgramRouter(require(policy.backbone, HasExits, "route").exit_parts()[2], programs)
    train(router, data, run)
    worth = held_out(router.eval(), data, config)
    report = {
        "steps": config.steps,
        "harm": config.harm,
        "programs": ["-".join(map(str, program)) for program in programs],
        "held_out": worth,
    }
    if policy.backbone.router:
        policy.config.forget()
    policy.backbone.router = (router.requires_grad_(False),)
    save(run.output, policy, pre, post, unchanged=True)
    write_text(run.output / REPORT, json.dumps(report, indent=2))
    for name, values in worth.items():
        print(
            f"{name}: {values['layers']:.2f} layers, {values['error']:.2f} bins from the fixed "
            f"point, cost {values['cost']:.3f}"
        )
    print(f"Written: {run.output / ROUTER}")
    return run.output


def found_programs(data: DistillData, config: RouteConfig) -> list[Program]:
    """All layers, then programs that each drop the layer that matters least."""
    random = np.random.default_rng([config.seed, 1])
    rows = data.draw(config.search_frames, random, 0)
    parts = [
        Frames(data, part, config, random)
        for part in np.array_split(rows, -(-len(rows) // config.batch_size))
    ]
    programs: list[Program] = [tuple(range(data.policy.backbone.num_layers))]
    for _ in trange(config.programs - 1, desc="programs", unit="program", dynamic_ncols=True):
        last = programs[-1]
        shorter = [last[:i] + last[i + 1 :] for i in range(len(last))]
        errors = [_mean_error(parts, program) for program in shorter]
        programs.append(shorter[int(np.argmin(errors))])
    return programs


def _mean_error(parts: list[Frames], program: Program) -> float:
    return float(torch.cat([part.errors(program) for part in parts]).mean())


def costs(frames: Frames, programs: list[Program], harm: float) -> tuple[Tensor, Tensor]:
    """Costs (B, K) of the programs on frames, and their errors (B, K) [bins]."""
    errors = torch.stack([frames.errors(program) for program in programs], dim=1)
    shares = torch.tensor([len(program) / len(programs[0]) for program in programs])
    return shares + harm * (errors - errors[:, :1]).clamp(min=0), errors


def train(router: ProgramRouter, data: DistillData, run: BesideRun[RouteConfig]) -> None:
    """Minimise the expected cost of the router's choice."""
    config = run.config
    optimizer = torch.optim.AdamW(router.parameters(), lr=config.lr, weight_decay=0.0)
    for step in run.steps("route", data, router, optimizer):
        random = np.random.default_rng([config.seed, 2, step])
        frames = Frames(data, data.draw(config.batch_size, random, step), config, random)
        cost, _ = costs(frames, router.programs, config.harm)
        shares = router(frames.prefix.state).softmax(-1)
        loss = (shares * cost.to(shares.dtype)).sum(1).mean()
        take_step(optimizer, loss, step, config.steps)
        run.show(cost=loss.item())


@torch.no_grad()
def held_out(
    router: ProgramRouter, data: DistillData, config: RouteConfig
) -> dict[str, dict[str, float]]:
    """Mean layers, error [bins] and cost on held-out frames, by how the program is chosen."""
    frames = Frames(data, data.held_out, config, np.random.default_rng(config.seed))
    cost, errors = costs(frames, router.programs, config.harm)
    layers = torch.tensor([float(len(program)) for program in router.programs])
    rows = torch.arange(len(cost))
    ways = {f"{len(p)} layers": torch.full_like(rows, i) for i, p in enumerate(router.programs)}
    ways |= {"router": router(frames.prefix.state).argmax(-1), "oracle": cost.argmin(1)}
    return {
        name: {
            "layers": round(float(layers[chosen].mean()), 3),
            "error": round(float(errors[rows, chosen].mean()), 4),
            "cost": round(float(cost[rows, chosen].mean()), 4),
        }
        for name, chosen in ways.items()
    }
