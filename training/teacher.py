"""`ceed-vla train`: the autoregressive teacher, from demonstrations, grounding scenes and takeover
rounds.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ceed_vla.checkpoints import load
from ceed_vla.data.files import is_whole
from ceed_vla.data.frames import open_dataset
from ceed_vla.decoding.names import CEED
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.outputs import owned_folder
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.supervision import AUGMENTATION_NOISE, augmentation_size, grounding_loss
from ceed_vla.training.adapters import attach
from ceed_vla.training.budget import (
    ACTION,
    BATCH,
    FEW_STEPS,
    GROUNDING,
    GROUNDING_SHARE,
    SHORTEST,
    TAKEOVER_SHARE,
    Speeds,
    divide,
    probe,
)
from ceed_vla.training.clipping import check_clipping
from ceed_vla.training.defaults import (
    Privileged,
    check_target,
    describe,
    named_terms,
    take_from_data,
)
from ceed_vla.training.fit_tokens import fit_action_tokens
from ceed_vla.training.mixture import Mixture, check_compatible, check_fits
from ceed_vla.training.run import TAKEOVER, ClosedLoop, Run
from ceed_vla.training.run_config import ANY_NUMBER
from ceed_vla.training.settings import number_list, split_list
from ceed_vla.training.summary import (
    NOTHING_HELD_OUT,
    PART,
    Summary,
    find_held_out,
    held_out_batches,
    mean_forwards,
    token_accuracy,
)
from ceed_vla.training.train_config import TrainConfig
from ceed_vla.wording import counted

logger = logging.getLogger(__name__)

# of a checkpoint folder: median error [m] by what is looked for
Localisation = Callable[[Path], dict[str, float]]
# What a takeover round needs: (policy folder, round, folder for the new data sets, most minutes or
# 0) -> the recorded roots. It is called again when the run is resumed from a state before the end
# of that round.
RecordTakeover = Callable[[Path, int, Path, float], list[Path]]


class TeacherObjective(nn.Module):
    """Loss of demonstrations plus auxiliary loss of grounding frames, in one call (DDP needs
    that).
    """

    def __init__(self, policy: CeedVLAPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        batch: dict[str, Tensor] | None,
        grounding: dict[str, Tensor] | None,
        share: float,
        grounding_share: float,
    ) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss and its parts, weighted with the shares of the two in their whole batches
        (`Run.share`).
        """
        parts: dict[str, float] = {}
        total: Any = 0.0
        if batch is not None:
            loss, parts = self.policy(batch)
            total = share * loss
            parts = {name: share * value for name, value in parts.items()}
        if grounding is not None:
            loss = grounding_share * grounding_loss(self.policy, grounding)
            parts["grounding_loss"] = loss.item()
            total = total + self.policy.config.auxiliary_weight * loss
        return total, parts


def train(config: TrainConfig, **simulation: Any) -> Path:
    """Train a teacher, and return the folder of the final checkpoint; `simulation` is what
    `TeacherRun` takes of it.

    `ConfigError` for missing or contradicting settings, or a gate that is not met (the state is
    saved, to go on from); `DatasetError` for unreadable or incompatible data sets;
    `CheckpointError` for nothing to resume, or other sizes.
    """
    with owned_folder("output_dir", config.output_dir, launched=True):
        return TeacherRun(config, **simulation).run()


class TeacherRun(Run):
    """One training run of a teacher: data, policy, and the takeover rounds so far.

    Args:
        config: See `TrainConfig`.
        closed_loop: Measures a checkpoint in simulation; skipped if None.
        record_takeover: Records one takeover round; needed when ``config.rounds > 0``.
        privileged: What the environment says of ``observation.environment_state``; else
            ``auxiliary_scale`` decides.
        localisation: Measures what ``config.grounding_gate`` limits.
    """

    name = "teacher"

    def __init__(
        self,
        config: TrainConfig,
        closed_loop: ClosedLoop | None = None,
        record_takeover: RecordTakeover | None = None,
        privileged: Privileged | None = None,
        localisation: Localisation | None = None,
    ) -> None:
        if config.rounds and record_takeover is None:
            raise ConfigError(
                f"rounds is {config.rounds}, but nothing records takeovers; use `ceed-vla train` "
                "or rounds=0."
            )
        grounded = config.grounding_roots and config.grounding_steps != 0
        if config.grounding_gate and not (localisation and grounded):
            raise ConfigError(
                "grounding_gate needs --grounding_roots, --grounding_steps and an environment with "
                "known positions."
            )
        # LeRobot replaces one that is not there
        asked = config.policy.asked_device or config.policy.device or "cpu"
        super().__init__(config, asked, closed_loop)
        self.config, self.privileged = config, privileged
        self.record_takeover: Any = record_takeover  # needed for rounds, as is the other for a gate
        self.localisation: Any = localisation
        self.demonstrations = [
            open_dataset(root, decode=False) for root in split_list(config.roots)
        ]
        self.grounding = [
            open_dataset(root, decode=False) for root in split_list(config.grounding_roots)
        ]
        self._check_data()
        if self.grounding and config.grounding_batch:
            self._check_split(config.grounding_batch, "grounding_batch")
        policy, pre, post = self._policy()
        for store in (*self.demonstrations, *self.grounding):
            check_fits(store, policy.config, pre)
        own = config.named_terms
        self.named = named_terms(policy.config, privileged) if own is None else own
        logger.info(describe(policy.config, policy.tokenizer, self.demonstrations[0], self.named))
        check_clipping(policy.tokenizer, self.demonstrations, config.max_clipped)
        with self.accelerator.main_process_first():  # the first one decodes the images
            for store in (*self.demonstrations, *self.grounding):
                store.decode(config.streaming)
        if config.lora.rank:
            attach(policy, config.lora)
        self.prepare(TeacherObjective(policy), policy, pre, post, weight_decay=config.weight_decay)
        chunk = policy.config.chunk_size
        self.grounding_mixture = (
            Mixture(self.grounding, None, config.seed + 1, chunk) if self.grounding else None
        )
        self.takeovers: list[list[str]] = []  # the roots of every round
        self.mixture = self._mixture()
        self.speeds = Speeds(0.0, 0.0)  # of steps, known where there is a budget
        self._choose_sizes()

    def _choose_sizes(self) -> None:
        """Set `batch_size`, `first` (the first step on demonstrations) and `total`, and say
        them.
        """
        config = self.config
        self.batch_size = config.batch_size or BATCH
        self.first = (config.grounding_steps or 0) if self.grounding else 0
        self.total = self.first + config.steps if config.steps else ANY_NUMBER
        self.most_first = self.first
        self.most = ANY_NUMBER  # `steps_in_budget` keeps to config.steps
        if not config.max_minutes:
            return
        if config.resume:  # it goes on with the sizes that it had
            self.total = ANY_NUMBER
            return
        plan = divide(
            config.max_minutes,
            self._measure_speeds(),
            grounded=bool(self.grounding),
            frames=sum(len(store) for store in self.demonstrations),
            episodes=sum(len(np.unique(store.episode)) for store in self.demonstrations),
            rounds=config.rounds or 0,
            grounding_steps=config.grounding_steps,
            batch_size=config.batch_size,
            steps=config.steps,
        )
        logger.info("%s", plan)
        logger.log(logging.INFO if plan.enough else logging.WARNING, "%s", plan.expectation)
        if config.steps and plan.steps < FEW_STEPS * config.steps:
            logger.warning(
                "--max_minutes %g allows about %d of --steps %d.",
                config.max_minutes,
                plan.steps,
                config.steps,
            )
            self.warned = True
        self.batch_size, self.speeds = plan.batch_size, plan.speeds
        self.first = self.most_first = plan.grounding_steps
        self._check_split(self.batch_size, "batch_size")
        self.total = self.first + plan.steps

    def _measure_speeds(self) -> Speeds:
        """Seconds of steps whose gradients are thrown away."""
        size = self.batch_size
        self._check_split(size, "batch_size")

        def take(frames: int, beside: int) -> Callable[[], None]:
            def step() -> None:
                for part in self.parts:
                    batch, _ = self._draw(self.mixture, frames, part)
                    grounding, _ = self._draw(self.grounding_mixture, beside, part)
                    loss, _ = self.model(batch, grounding, 1.0, 1.0)
                    self.accelerator.backward(loss)
                for optimizer in self.optimizers:
                    optimizer.zero_grad()

            return step

        self.model.train()
        kinds = {ACTION: take(size, self.config.grounding_batch)}
        if self.grounding and self.config.grounding_steps != 0:
            kinds[GROUNDING] = take(0, 2 * size)
        with torch.random.fork_rng():
            seconds = self._mean_over_processes(probe(kinds))
        return Speeds(seconds.get(GROUNDING, 0.0), seconds[ACTION], size)

    def _check_data(self) -> None:
        if not self.demonstrations:
            raise ConfigError("No data: set --roots to one or more recorded folders.")
        for store in self.demonstrations:
            if store.action is None:
                raise ConfigError(
                    f"{store.root} holds no actions; name it in --grounding_roots instead."
                )
        check_compatible(self.demonstrations)
        if (self.config.grounding_steps != 0 or self.config.grounding_batch) and not self.grounding:
            logger.warning("No --grounding_roots: training without grounding frames.")

    def _policy(self) -> tuple[CeedVLAPolicy, Any, Any]:
        config = self.config
        if config.policy_path:
            adapted = config.lora.rank > 0
            policy, pre, post = load(
                config.policy_path, device=config.policy.device, merge_adapters=not adapted
            )
            relaxed: dict[str, Any] = {
                "max_iterations": None,
                "confidence": None,
                "exits": (),
                "deadline_s": None,
            }
            strict = replace(policy.config.decoding, method="jacobi", watch="block", **relaxed)
            policy.config.decoding, policy.config.decode_with = strict, CEED
        else:
            chosen = deepcopy(config.policy)  # it is filled in; the settings can be used again
            stats = take_from_data(chosen, self.demonstrations, self.grounding, self.privileged)
            fit_action_tokens(chosen, self.demonstrations)
            policy = CeedVLAPolicy(chosen, dataset_stats=stats)
            tasks = [
                task for store in (*self.demonstrations, *self.grounding) for task in store.tasks
            ]
            pre, post = make_ceed_vla_pre_post_processors(chosen, stats, instructions=tasks)
        check_target(policy.config, self.demonstrations, self.grounding, self.privileged)
        return policy, pre, post

    def _mixture(self) -> Mixture:
        config = self.config
        weights = number_list(config.root_weights, "root_weights") or [
            float(len(s)) for s in self.demonstrations
        ]
        stores = list(self.demonstrations)
        roots = [root for of_round in self.takeovers for root in of_round]
        if roots:
            with self.accelerator.main_process_first():
                takeovers = [open_dataset(root, streaming=config.streaming) for root in roots]
            # nor may it be in one batch with these
            if self.demonstrations[0].environment_state is None:
                for store in takeovers:
                    store.environment_state = None
            check_clipping(self.policy.tokenizer, takeovers, config.max_clipped)
            frames = sum(len(s) for s in takeovers)
            share = config.takeover_weight / (1 - config.takeover_weight) * sum(weights)
            weights += [share * len(s) / frames for s in takeovers]
            stores += takeovers
        # The summary measures on demonstrations alone, so takeovers are all trained on.
        held_out = [config.held_out] * len(self.demonstrations)
        held_out += [0.0] * len(roots)
        return Mixture(stores, weights, config.seed + 2, self.policy.config.chunk_size, held_out)

    # ---- steps -----------------------------------------------------------------------------------

    def before_step(self) -> None:
        config = self.config
        if config.grounding_gate and self.step == self.first:
            self._check_grounding()
        self.policy.auxiliary_terms = (self.named or None) if self.step >= self.first else None
        rounds = config.rounds or 0
        while len(self.takeovers) < rounds:
            share = 0.75 * (len(self.takeovers) + 1) / (rounds + 1)
            if self.step < self.first + int((self.total - self.first) * share):
                return
            self._takeover_round(len(self.takeovers))

    def kind_of_step(self) -> str:
        return ACTION if self.step >= self.first else GROUNDING

    def steps_in_budget(self, left: float, seconds: dict[str, float]) -> int:
        """See `Run.steps_in_budget`; takeover rounds that are still to come take their share."""
        config = self.config
        action = seconds.get(ACTION)
        budget = 60 * config.max_minutes
        if self.step < self.first and GROUNDING in seconds and config.grounding_steps is None:
            remaining = GROUNDING_SHARE * budget - (budget - left)
            fitting = self.step + max(0, int(remaining / seconds[GROUNDING]))
            self.first = min(self.most_first, fitting)
        if action is None:  # as fast as was measured at first, or slower by as much as the others
            slower = (
                seconds[GROUNDING] / self.speeds.grounding
                if GROUNDING in seconds and self.speeds.grounding
                else 1
            )
            action = slower * self.speeds.action
        left -= TAKEOVER_SHARE * budget * ((config.rounds or 0) - len(self.takeovers))
        left -= max(0, self.first - self.step) * seconds.get(GROUNDING, self.speeds.grounding)
        total = max(self.first, self.step) + int(left / max(action, SHORTEST))
        if config.steps:
            total = min(total, self.first + config.steps)
        return max(self.first + 1, total)

    def train_step(self) -> dict[str, float]:
        config = self.config
        size = self.batch_size if self.step >= self.first else 0
        beside = config.grounding_batch if size else 2 * self.batch_size
        values: dict[str, float] = defaultdict(float)

        def loss(part: int) -> Tensor:
            batch, share = self._draw(self.mixture, size, part)
            grounding, grounding_share = self._draw(self.grounding_mixture, beside, part)
            total, parts = self.model(batch, grounding, share, grounding_share)
            for name, value in {"loss": total.item(), **parts}.items():
                values[name] += value
            return total

        self.optimize(self.parts, loss)
        return dict(values)

    def _draw(
        self, mixture: Mixture | None, size: int, part: int
    ) -> tuple[dict[str, Any] | None, float]:
        """One part of this step's batch, pre-processed, and its share in the batch; None of an
        empty one.
        """
        if mixture is None or not size:
            return None, 0.0
        batch = self.pre(mixture.draw(size, self.step, part, self.num_parts))
        # Drawn for the whole batch: a frame looks the same however the batch is split.
        random = np.random.default_rng([mixture.seed, self.step, 1])
        noise = random.random((size, augmentation_size(self.policy)), dtype=np.float32)[
            part :: self.num_parts
        ]
        batch[AUGMENTATION_NOISE] = torch.from_numpy(noise)
        return batch, self.share(len(noise), size)

    def _check_grounding(self) -> None:
        folder = self.save_policy("grounded")
        self.save_state()
        errors: dict[str, float] = self._of_the_first(lambda: self.localisation(folder))
        self.model.train()
        over = {
            name: error for name, error in errors.items() if not error <= self.config.grounding_gate
        }
        logger.info(
            "median localisation error: %s",
            ", ".join(f"{n} {100 * e:.1f} cm" for n, e in errors.items()),
        )
        if over:
            worst = max(over, key=lambda name: over[name])
            raise ConfigError(
                f"After {self.first} grounding steps {worst} is off by {100 * over[worst]:.1f} cm "
                f"(median); {len(over)} of {len(errors)} are over "
                f"--grounding_gate={self.config.grounding_gate:g} m. A policy that does not see "
                "where things are learns nothing from actions: go on with --resume=true and more "
                "--grounding_steps, give more --grounding_roots, or look at `ceed-vla grounding`."
            )

    def _of_the_first(self, find: Callable[[], Any]) -> Any:
        """What the first process finds, in every process."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([find() if self.accelerator.is_main_process else None])[0]

    def _takeover_round(self, index: int) -> None:
        """Record takeovers of the policy as it is now, and train on them from here on."""
        folder = self.save_policy(f"round_{index}")
        self.validate(folder)
        minutes = TAKEOVER_SHARE * self.config.max_minutes
        roots = self._of_the_first(
            lambda: self.record_takeover(folder, index, self.output / TAKEOVER, minutes)
        )
        self.takeovers.append([str(Path(root).resolve()) for root in roots])
        self.mixture = self._mixture()
        self.save_state()
        self.model.train()

    def state_dict(self) -> dict[str, Any]:
        sizes = {"first": self.first, "batch_size": self.batch_size}
        return {
            "takeovers": self.takeovers,
            "sizes": {**sizes, "speeds": [self.speeds.grounding, self.speeds.action]},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rounds = state.get("takeovers")
        most = self.config.rounds or 0
        if self.config.max_minutes and isinstance(rounds, list):
            most = max(most, len(rounds))  # a shorter budget has none of its own
        rounds = rounds if isinstance(rounds, list) and len(rounds) <= most else [None]
        folder = (self.output / TAKEOVER).resolve()
        for roots in rounds:
            inside = isinstance(roots, list) and all(isinstance(root, str) for root in roots)
            if not inside or not all(Path(root).resolve().is_relative_to(folder) for root in roots):
                raise CheckpointError(
                    f"{self.output} cannot be resumed: its takeovers are "
                    f"{str(state.get('takeovers'))[:200]}; they must be data sets in {folder}, of "
                    f"{most} rounds at most."
                )
        self.takeovers = rounds
        self.mixture = self._mixture()
        if self.config.max_minutes:
            self._load_sizes(state.get("sizes"))

    def _load_sizes(self, sizes: Any) -> None:
        """Go on with the sizes that were chosen when the run began; `CheckpointError` for damaged
        ones.
        """
        try:
            first = sizes["first"]
            batch_size = sizes["batch_size"]
            speeds = [float(s) for s in sizes["speeds"]]
            grounding, action = speeds
            fits = (
                is_whole(first, 0, self.total)
                and is_whole(batch_size, 1)
                and all(0 <= s < 1e6 for s in speeds)
            )
        except (TypeError, KeyError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"{self.output} cannot be resumed with --max_minutes: its sizes are "
                f"{str(sizes)[:200]}; they must be those that a run with --max_minutes chose. "
                "Leave the flag out and give --steps, or start again."
            )
        self._check_split(batch_size, "batch_size")
        if (
            self.config.grounding_steps is not None
            and self.grounding
            and self.config.grounding_steps > first
        ):
            # a gate was not met, and more are given
            self.total += self.config.grounding_steps - first
            first = self.config.grounding_steps
        self.first = self.most_first = first
        self.batch_size = batch_size
        self.speeds = Speeds(grounding, action, batch_size)

    # ---- the end ---------------------------------------------------------------------------------

    def summarize(self, summary: Summary) -> None:
        config = self.config
        if self.first:
            summary.lines.append(
                f"{counted(self.first, 'step')} of them on grounding frames alone, at first"
            )
        held = find_held_out(self.demonstrations, config.held_out)
        if not held.count:
            summary.lines.append(NOTHING_HELD_OUT)
            return
        size = max(1, min(PART, self.batch_size // self.num_parts))  # what fitted into memory
        batches = partial(held_out_batches, held, self.pre, self.policy.config.chunk_size, size)
        summary.measured |= token_accuracy(
            self.policy, lambda batch: self.model(batch, None, 1.0, 1.0), batches()
        )
        found = summary.measured
        summary.lines.append(
            f"Token accuracy {found['held_out_token_accuracy']:.3f} on {held}, shown the tokens "
            f"before; {found['constant_token_accuracy']:.3f} for the most frequent token of every "
            "slot"
        )
        if not self.sharded and self.policy.tokenizer.stop is None:
            block = self.policy.config.block_length
            strict = mean_forwards(self.policy, next(batches()), "jacobi")
            summary.measured["jacobi_forwards"] = strict
            summary.lines.append(
                f"Forwards a chunk: {block - 1} token by token, {strict:.1f} with strict Jacobi"
            )

    def next_command(self, checkpoint: Path) -> str:
        config = self.config
        data = f"--roots {quote(config.roots)} --held_out {config.held_out:g}"
        if not find_held_out(self.demonstrations, config.held_out).count:
            data = "--roots DATA_THAT_IT_WAS_NOT_TRAINED_ON"
        return (
            f"ceed-vla open-loop --policy.path {quote(str(checkpoint))} {data} --gate 0.5 "
            f"--output_dir {quote(str(self.output / 'open-loop'))}"
        )
