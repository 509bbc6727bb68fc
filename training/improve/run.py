"""``ceed-vla improve``: learn from the outcomes of episodes, iteration by iteration.

Every iteration decodes chunks at chosen states, runs the episode to its end from each state of each
decode path, and moves low-rank adapters by the rewards. It writes the checkpoint with the adapters
added to its weights, from which the next iteration's episodes are driven.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple
from functools import cached_property
from itertools import batched, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ceed_vla.axes import SAVED
from ceed_vla.backbones.capabilities import check_whole_prefix
from ceed_vla.checkpoints import load, save, weights_hash
from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError, raised_as
from ceed_vla.files import read_json, settle, write_text
from ceed_vla.outputs import MADE_BY, owned_folder
from ceed_vla.starts import SerialGroup, Start
from ceed_vla.training.adapters import (
    LoRAConfig,
    attach_student,
    plain_weights,
    scale_of,
    teacher_weights,
)
from ceed_vla.training.improve.config import ImproveConfig
from ceed_vla.training.improve.objective import Batch, chances, loss, predicted, stacked
from ceed_vla.training.improve.space import StartSpace

REPORT = "improve.json"
CHECKPOINT = Path("checkpoints") / "final" / "pretrained_model"
STATES = ("state_a", "state_b")  # written alternately: adapters and optimiser, and the known starts
MOST_STARTS = 2**28  # [bytes] of a file of starts
FREE = ("output_dir", "resume", "iterations", "max_control_steps")  # may change in a resumed run
LARGEST_GRADIENT = 1.0  # norm
Rollouts = Any  # ceed_vla.sim.improve.Groups: training never imports the simulation


def improve(config: ImproveConfig, rollouts: Rollouts) -> Path:
    """Improve a policy, and return the folder of the checkpoint.

    Raises:
        ConfigError: The settings are invalid, or the folder is not empty.
        CheckpointError: The checkpoint or the state of an interrupted run cannot be loaded.
        SimulationError: The environment cannot restore an earlier state.
    """
    with owned_folder("output_dir", config.output_dir) as output:
        run = Improvement(config, rollouts, output)
        while not run.ended:
            run.iterate()
        print(f"Written: {output / CHECKPOINT}")
        return output / CHECKPOINT


class Improvement:
    """A run.

    Args:
        config: The settings.
        rollouts: The simulator's part.
        output: Folder of the run, locked for this process.

    Attributes:
        records: An entry of the report for every iteration.
    """

    def __init__(self, config: ImproveConfig, rollouts: Rollouts, output: Path) -> None:
        self.config, self.rollouts, self.output = config, rollouts, output
        self.records: list[dict[str, Any]] = []
        self.space = StartSpace(config.starts, config.known)
        self.used = 0  # seeds of episodes so far
        before = self._before()
        torch.manual_seed(config.seed)
        self.policy, self.pre, self.post = load(config.policy_path, merge_adapters=False)
        check_whole_prefix(self.policy, "improve")
        if self.policy.tokenizer.tokens_per_step is None:
            raise ConfigError(
                "The policy's tokens have variable length and belong to no step, so the states of "
                "a decode path cannot be executed."
            )
        # The policy's decodings, exits and scorer do not apply to the new weights.
        self.policy.config.forget()
        for saved in SAVED:
            saved.detach(self.policy.backbone)
        self.decoding = config.decoding or self.policy.config.decode_with
        self.policy.config.named(self.decoding)
        attach_student(self.policy, LoRAConfig(config.rank))
        self.learning = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.learning.values(), lr=config.lr, weight_decay=0.0)
        if before is None:
            self._write_report("")  # from here on an interrupt can be resumed
        else:
            self._continue(before)
        self._save_policy()  # an interrupt may have left none, or that of a later iteration

    @property
    def steps(self) -> int:
        """Control steps that were simulated so far."""
        return sum(record["control_steps"] for record in self.records)

    @property
    def ended(self) -> bool:
        limit = self.config.max_control_steps
        return len(self.records) >= self.config.iterations or (0 < limit <= self.steps)

    def iterate(self) -> None:
        """One iteration: rollouts, learning, a checkpoint."""
        config, number = self.config, len(self.records)
        starts = self._draw(np.random.default_rng([config.seed, number]))
        policy = str(self.output / CHECKPOINT)
        groups = list(
            tqdm(
                self.rollouts(policy, self.decoding, config.cap, starts, number),
                total=len(starts),
                desc=f"iteration {number + 1} of {config.iterations}",
                unit="group",
                dynamic_ncols=True,
            )
        )
        measured = self._learn(groups, np.random.default_rng([config.seed, number, 1]))
        self.space.learn(groups, config.decay)
        self.records.append({**described(groups), "known": len(self.space.known), **measured})
        print(f"iteration {number + 1}: {json.dumps(self.records[-1])}")
        self._save_policy()
        self._save_state()

    def _draw(self, random: np.random.Generator) -> list[Start]:
        """The starts of an iteration: known states, and new episodes."""
        known = self.space.draw(self.config.groups, random)
        new = self.config.groups - len(known)
        starts = known + self.rollouts.first(self.config.seed, self.used, new)
        self.used += new
        return starts

    # ---- learning --------------------------------------------------------------------------------

    def _learn(
        self, groups: Sequence[SerialGroup], random: np.random.Generator
    ) -> dict[str, float]:
        """Take the optimiser steps of an iteration; returns means over them."""
        config = self.config
        device = str(self.policy.config.device)
        batches: list[Batch] = []
        self.policy.eval()  # without dropout, so that ratios start at 1
        # prompts of several lengths do not fit into one batch
        ordered = sorted(groups, key=_shapes)
        alike = [list(found) for _, found in groupby(ordered, key=_shapes)]
        for part in (part for found in alike for part in batched(found, config.batch_size)):
            batch = stacked(part, config.decay, device)
            with torch.no_grad():
                batch.known = chances(predicted(self.policy, batch)[0], batch.tokens)
                with teacher_weights(self.policy):
                    batch.reference = predicted(self.policy, batch)
            batches.append(batch)
        found = []
        for _ in range(config.epochs):
            for index in random.permutation(len(batches)):
                batch = batches[index]
                logits = predicted(self.policy, batch)
                total, strayed = loss(logits, batch, config.clip, config.leash)
                self._step(total)
                found.append((float(total.detach()), float(strayed.detach())))
        means = np.mean(found, axis=0)
        return {"loss": round(float(means[0]), 6), "divergence": round(float(means[1]), 6)}

    def _step(self, total: Tensor) -> None:
        if not torch.isfinite(total):
            raise CeedVLAError(f"The loss is {total.item()}: training diverged. Lower --lr.")
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.learning.values(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad()

    # ---- files -----------------------------------------------------------------------------------

    def _before(self) -> dict[str, Any] | None:
        """The report of the run to continue; None for a new one."""
        file = self.output / REPORT
        if not self.config.resume:
            if self.output.is_dir() and any(self.output.iterdir()):
                raise ConfigError(
                    f"--output_dir is {str(self.output)!r}, which is not empty; name a new folder, "
                    "or continue the run in it with --resume=true."
                )
            return None
        before = read_json(file)
        if before.get("settings") != self._settings:
            raise ConfigError(
                f"{file} is of a run with other settings or of other weights; repeat them, or name "
                f"a new folder. Only {', '.join(FREE[2:])} may change."
            )
        return before

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What a resumed run must repeat."""
        own = {name: value for name, value in asdict(self.config).items() if name not in FREE}
        weights = weights_hash(self.config.policy_path)
        return {**own, "env": self.rollouts.settings, "weights": weights}

    def _continue(self, report: dict[str, Any]) -> None:
        """Load the state of an interrupted run."""
        advice = "start again in another folder."
        with raised_as(CheckpointError, f"{self.output} cannot be resumed", advice):
            if not report["iterations"]:  # interrupted in the first one
                return
            if report["state"] not in STATES:
                raise ValueError("its state has another name")
            tensors = load_file(self.output / f"{report['state']}.safetensors")
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                raise ValueError("its state has values that are not finite")
            for name, parameter in self.learning.items():
                parameter.data.copy_(tensors[name])
                self.optimizer.state[parameter] = {
                    "step": tensors[f"{name}:step"],
                    "exp_avg": tensors[f"{name}:exp_avg"].view_as(parameter),
                    "exp_avg_sq": tensors[f"{name}:exp_avg_sq"].view_as(parameter),
                }
            self.records, self.used = list(report["iterations"]), int(report["used_seeds"])
            if self.steps < 0 or self.used < 0:
                raise ValueError("its counts are negative")
            file = self.output / f"{report['state']}.json"
            found = read_json(file, most=MOST_STARTS, values=MOST_STARTS)
            for seed, task, actions, previous, score in found["starts"]:
                start = Start(seed, task, tuple(map(tuple, actions)), tuple(previous))
                if not 0 < score <= 1:
                    raise ValueError("a start has a score outside (0, 1]")
                self.space.known[start] = float(score)

    def _save_policy(self) -> None:
        """Write the checkpoint, with the adapters added to its weights."""
        weights = plain_weights(
            self.policy.state_dict(),
            scale_of(self.policy),
            keep_adapters=bool(self.policy.referenced),
        )
        save(self.output / CHECKPOINT, self.policy, self.pre, self.post, weights)

    def _save_state(self) -> None:
        """Write what a resumed run needs; the state before stays valid until this is complete."""
        name = STATES[len(self.records) % 2]
        tensors: dict[str, Tensor] = {}
        for parameter_name, parameter in self.learning.items():
            tensors[parameter_name] = parameter.detach().contiguous()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{parameter_name}:{key}"] = value.contiguous()
        save_file(tensors, self.output / f"{name}.safetensors")
        settle(self.output / f"{name}.safetensors")
        starts = [(*astuple(start), score) for start, score in self.space.known.items()]
        while len(text := json.dumps({"starts": starts})) > MOST_STARTS:
            starts = starts[len(starts) // 2 :]  # those with the highest scores
        write_text(self.output / f"{name}.json", text)
        self._write_report(name)

    def _write_report(self, state: str) -> None:
        report = {
            "made_by": MADE_BY,
            "state": state,
            "settings": self._settings,
            "used_seeds": self.used,
            "iterations": self.records,
        }
        self.output.mkdir(parents=True, exist_ok=True)
        write_text(self.output / REPORT, json.dumps(report, indent=2))


def _shapes(group: SerialGroup) -> list[tuple[int, ...]]:
    """Shapes of the inputs."""
    return [tuple(value.shape) for value in group.inputs.values()]


def described(groups: Sequence[SerialGroup]) -> dict[str, Any]:
    """Entry of the report: what the groups were, and how their episodes ended."""
    ran = [group for group in groups if group.solved]
    mixed = [group for group in ran if len(set(group.solved)) > 1]
    return {
        "groups": len(groups),
        "from_partial_histories": sum(bool(group.start.actions) for group in groups),
        "all_states_alike": len(groups) - len(ran),
        "outcomes_differ": len(mixed),
        "only_last_solves": sum(group.solved[-1] and not group.solved[0] for group in mixed),
        "only_first_solves": sum(group.solved[0] and not group.solved[-1] for group in mixed),
        "solved_from_first": sum(group.solved[0] for group in ran),
        "solved_from_last": sum(group.solved[-1] for group in ran),
        "control_steps": sum(group.steps for group in groups),
    }
