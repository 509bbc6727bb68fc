"""`ceed-vla train`: the autoregressive teacher, from demonstrations, grounding scenes and takeover rounds."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ceed_vla.checkpoints import load
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.frames import open_dataset
from ceed_vla.decoding.names import CEED
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import COUNTS, SEEDS, ranged
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.outputs import owned_folder
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.supervision import AUGMENTATION_NOISE, augmentation_size, grounding_loss
from training.adapters import attach
from training.clipping import check_clipping
from training.defaults import Privileged, check_target, describe, named_terms, take_from_data
from training.fit_tokens import fit_action_tokens
from training.mixture import Mixture, check_compatible, check_fits
from training.run import TAKEOVER, ClosedLoop, Run, RunConfig
from training.settings import NONE_OR_COUNTS, NONE_OR_RATES, number_list, split_list

logger = logging.getLogger(__name__)

# What a takeover round needs: (policy folder, round, folder for the new data sets) -> the recorded roots.
# It is called again when the run is resumed from a state before the end of that round.
Localisation = Callable[[Path], dict[str, float]]  # of a checkpoint folder: median error [m] by what is looked for
RecordTakeover = Callable[[Path, int, Path], list[Path]]


@dataclass
class TrainConfig(RunConfig):
    """Settings of `ceed-vla train`.

    Attributes:
        roots: Comma-separated LeRobotDataset folders with demonstrations.
        root_weights: Comma-separated shares of `roots`; proportional to their frames if empty.
        grounding_roots: Comma-separated action-free data sets for the auxiliary target.
        policy: The policy's configuration. Features come from the data; action ranges, two-valued dimensions and the
            auxiliary target too, where they are not set (auxiliary_weight 0 switches the target off).
        policy_path: Start from this checkpoint; it replaces `policy` (but for the device).
        grounding_steps: Optimiser steps on grounding frames alone, first.
        grounding_gate: Largest median error [m] of every object in every task on held-out scenes after these steps;
            where one is larger, training ends before it sees an action. 0: no gate.
        steps: Optimiser steps on demonstrations.
        grounding_batch: Grounding frames beside every step.
        named_terms: Once there are actions to learn, regress only so many leading terms of the auxiliary target, those
            that tell of what the instruction names; 0 for all, by default what the environment says.
        weight_decay: Decoupled weight decay.
        rounds: Takeover (DAgger) rounds within the first 3/4 of `steps`.
        takeover_episodes: Takeovers a round.
        takeover_seed: First seed of the takeovers' scenes; a run that goes on from another one's policy takes new ones.
        takeover_weight: Share of a batch that comes from takeover data once there is some.
    """

    roots: str = ""
    root_weights: str = ""
    grounding_roots: str = ""
    policy: CeedVLAConfig = field(default_factory=lambda: CeedVLAConfig(device="cpu", push_to_hub=False))
    policy_path: str = ""
    grounding_steps: int = ranged(1000, NONE_OR_COUNTS)
    steps: int = ranged(8000, COUNTS)
    grounding_gate: float = ranged(0.0, "[0, 10]")
    grounding_batch: int = ranged(12, "[0, 1e6]")
    named_terms: int | None = ranged(None, "[0, 1e6]")
    muon_lr: float = ranged(2e-3, NONE_OR_RATES)
    weight_decay: float = ranged(0.05, "[0, 10]")
    rounds: int = ranged(2, "[0, 1000]")
    takeover_episodes: int = ranged(600, "[1, 1e6]")
    takeover_seed: int = ranged(30_000, SEEDS)
    takeover_weight: float = ranged(0.4, "[0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        weights, roots = number_list(self.root_weights, "root_weights"), split_list(self.roots)
        if weights and (len(weights) != len(roots) or not sum(weights)):
            raise ConfigError(
                f"root_weights has {len(weights)} weights for {len(roots)} roots; give one each, not all 0."
            )


class TeacherObjective(nn.Module):
    """Loss of demonstrations plus auxiliary loss of grounding frames, in one call (DDP needs that)."""

    def __init__(self, policy: CeedVLAPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, batch: dict[str, Tensor] | None, grounding: dict[str, Tensor] | None, share: float, grounding_share: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss and its parts, weighted with the shares of the two in their whole batches (`Run.share`)."""
        parts: dict[str, float] = {}
        total: Any = 0.0
        if batch is not None:
            loss, parts = self.policy(batch)
            total, parts = share * loss, {name: share * value for name, value in parts.items()}
        if grounding is not None:
            loss = grounding_share * grounding_loss(self.policy, grounding)
            parts["grounding_loss"] = loss.item()
            total = total + self.policy.config.auxiliary_weight * loss
        return total, parts


def train(config: TrainConfig, **simulation: Any) -> Path:
    """Train a teacher, and return the folder of the final checkpoint; `simulation` is what `TeacherRun` takes of it.

    `ConfigError` for missing or contradicting settings, or a gate that is not met (the state is saved, to go on from);
    `DatasetError` for unreadable or incompatible data sets; `CheckpointError` for nothing to resume, or other sizes.
    """
    with owned_folder("output_dir", config.output_dir, launched=True):
        return TeacherRun(config, **simulation).run()


class TeacherRun(Run):
    """One training run of a teacher: data, policy, and the takeover rounds so far.

    Args:
        config: See `TrainConfig`.
        closed_loop: Measures a checkpoint in simulation; skipped if None.
        record_takeover: Records one takeover round; needed when ``config.rounds > 0``.
        privileged: What the environment says of ``observation.environment_state``; else ``auxiliary_scale`` decides.
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
                f"rounds is {config.rounds}, but nothing records takeovers; use `ceed-vla train` or rounds=0."
            )
        if config.max_minutes and (config.rounds or (config.grounding_roots and config.grounding_steps)):
            raise ConfigError(
                "max_minutes may end a run before its takeovers, or before it has seen an action: give --rounds 0 and "
                "--grounding_steps 0 with it, or no --max_minutes."
            )
        if config.grounding_gate and not (localisation and config.grounding_roots and config.grounding_steps):
            raise ConfigError(
                "grounding_gate needs --grounding_roots, --grounding_steps and an environment with known positions."
            )
        asked = config.policy.asked_device or config.policy.device or "cpu"  # LeRobot replaces one that is not there
        super().__init__(config, asked, closed_loop)
        self.config, self.privileged = config, privileged
        self.record_takeover: Any = record_takeover  # needed for rounds, as is the other for a gate
        self.localisation: Any = localisation
        self.demonstrations = [open_dataset(root, decode=False) for root in split_list(config.roots)]
        self.grounding = [open_dataset(root, decode=False) for root in split_list(config.grounding_roots)]
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
        self.grounding_mixture = Mixture(self.grounding, None, config.seed + 1, chunk) if self.grounding else None
        self.takeovers: list[list[str]] = []  # the roots of every round
        self.mixture = self._mixture()
        self.first = config.grounding_steps if self.grounding else 0  # the first step on demonstrations
        self.total = self.first + config.steps

    def _check_data(self) -> None:
        if not self.demonstrations:
            raise ConfigError("No data: set --roots to one or more recorded folders.")
        for store in self.demonstrations:
            if store.action is None:
                raise ConfigError(f"{store.root} holds no actions; name it in --grounding_roots instead.")
        check_compatible(self.demonstrations)
        if (self.config.grounding_steps or self.config.grounding_batch) and not self.grounding:
            logger.warning("No --grounding_roots: training without grounding frames.")

    def _policy(self) -> tuple[CeedVLAPolicy, Any, Any]:
        config = self.config
        if config.policy_path:
            adapted = config.lora.rank > 0
            policy, pre, post = load(config.policy_path, device=config.policy.device, merge_adapters=not adapted)
            relaxed: dict[str, Any] = {"max_iterations": None, "confidence": None, "exits": (), "deadline_s": None}
            strict = replace(policy.config.decoding, method="jacobi", watch="block", **relaxed)
            policy.config.decoding, policy.config.decode_with = strict, CEED
        else:
            chosen = deepcopy(config.policy)  # it is filled in; the settings can be used again
            stats = take_from_data(chosen, self.demonstrations, self.grounding, self.privileged)
            fit_action_tokens(chosen, self.demonstrations)
            policy = CeedVLAPolicy(chosen, dataset_stats=stats)
            tasks = [task for store in (*self.demonstrations, *self.grounding) for task in store.tasks]
            pre, post = make_ceed_vla_pre_post_processors(chosen, stats, instructions=tasks)
        check_target(policy.config, self.demonstrations, self.grounding, self.privileged)
        return policy, pre, post

    def _mixture(self) -> Mixture:
        config = self.config
        weights = number_list(config.root_weights, "root_weights") or [float(len(s)) for s in self.demonstrations]
        stores = list(self.demonstrations)
        roots = [root for of_round in self.takeovers for root in of_round]
        if roots:
            with self.accelerator.main_process_first():
                takeovers = [open_dataset(root, streaming=config.streaming) for root in roots]
            if self.demonstrations[0].environment_state is None:  # nor may it be in one batch with these
                for store in takeovers:
                    store.environment_state = None
            check_clipping(self.policy.tokenizer, takeovers, config.max_clipped)
            frames = sum(len(s) for s in takeovers)
            share = config.takeover_weight / (1 - config.takeover_weight) * sum(weights)
            weights += [share * len(s) / frames for s in takeovers]
            stores += takeovers
        return Mixture(stores, weights, config.seed + 2, self.policy.config.chunk_size)

    # ---- steps --------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        config = self.config
        if config.grounding_gate and self.step == self.first:
            self._check_grounding()
        self.policy.auxiliary_terms = (self.named or None) if self.step >= self.first else None
        while len(self.takeovers) < config.rounds:
            share = 0.75 * (len(self.takeovers) + 1) / (config.rounds + 1)
            if self.step < self.first + int(config.steps * share):
                return
            self._takeover_round(len(self.takeovers))

    def train_step(self) -> dict[str, float]:
        config = self.config
        size = config.batch_size if self.step >= self.first else 0
        beside = config.grounding_batch if size else 2 * config.batch_size
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

    def _draw(self, mixture: Mixture | None, size: int, part: int) -> tuple[dict[str, Any] | None, float]:
        """One part of this step's batch, pre-processed, and its share in the batch; None of an empty one."""
        if mixture is None or not size:
            return None, 0.0
        batch = self.pre(mixture.draw(size, self.step, part, self.num_parts))
        # Drawn for the whole batch: a frame looks the same however the batch is split.
        random = np.random.default_rng([mixture.seed, self.step, 1])
        noise = random.random((size, augmentation_size(self.policy)), dtype=np.float32)[part :: self.num_parts]
        batch[AUGMENTATION_NOISE] = torch.from_numpy(noise)
        return batch, self.share(len(noise), size)

    def _check_grounding(self) -> None:
        folder = self.save_policy("grounded")
        self.save_state()
        errors: dict[str, float] = self._of_the_first(lambda: self.localisation(folder))
        self.model.train()
        over = {name: error for name, error in errors.items() if not error <= self.config.grounding_gate}
        logger.info("median localisation error: %s", ", ".join(f"{n} {100 * e:.1f} cm" for n, e in errors.items()))
        if over:
            worst = max(over, key=lambda name: over[name])
            raise ConfigError(
                f"After {self.first} grounding steps {worst} is off by {100 * over[worst]:.1f} cm (median); {len(over)}"
                f" of {len(errors)} are over --grounding_gate={self.config.grounding_gate:g} m. A policy that does not "
                "see where things are learns nothing from actions: go on with --resume=true and more "
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
        roots = self._of_the_first(lambda: self.record_takeover(folder, index, self.output / TAKEOVER))
        self.takeovers.append([str(Path(root).resolve()) for root in roots])
        self.mixture = self._mixture()
        self.save_state()
        self.model.train()

    def state_dict(self) -> dict[str, Any]:
        return {"takeovers": self.takeovers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rounds = state.get("takeovers")
        rounds = rounds if isinstance(rounds, list) and len(rounds) <= self.config.rounds else [None]
        folder = (self.output / TAKEOVER).resolve()
        for roots in rounds:
            inside = isinstance(roots, list) and all(isinstance(root, str) for root in roots)
            if not inside or not all(Path(root).resolve().is_relative_to(folder) for root in roots):
                raise CheckpointError(
                    f"{self.output} cannot be resumed: its takeovers are {str(state.get('takeovers'))[:200]}; they "
                    f"must be data sets in {folder}, of {self.config.rounds} rounds at most."
                )
        self.takeovers = rounds
        self.mixture = self._mixture()
