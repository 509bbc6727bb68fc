"""`ceed-vla train`: train the autoregressive teacher.

Its data are demonstrations, grounding scenes and takeover rounds.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ceed_vla.checkpoints import weights_hash
from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import ConfigError
from ceed_vla.outputs import owned_folder
from ceed_vla.supervision import AUGMENTATION_NOISE, augmentation_size
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
from ceed_vla.training.defaults import Privileged, describe, named_terms
from ceed_vla.training.imitation import IMITATED, Imitated
from ceed_vla.training.mixture import Mixture, check_fits, shared_weights
from ceed_vla.training.run import ClosedLoop, Run
from ceed_vla.training.run_config import ANY_NUMBER
from ceed_vla.training.run_folder import TAKEOVER
from ceed_vla.training.settings import number_list, split_list
from ceed_vla.training.summary import (
    NOTHING_HELD_OUT,
    PART,
    Summary,
    find_held_out,
    held_out_batches,
)
from ceed_vla.training.teacher_measures import (
    add_forwards,
    add_token_accuracy,
    check_localisation,
)
from ceed_vla.training.teacher_objective import TeacherObjective
from ceed_vla.training.teacher_policy import check_demonstrations, initial_policy
from ceed_vla.training.teacher_state import Sizes, read_sizes, read_takeovers
from ceed_vla.training.train_config import TrainConfig
from ceed_vla.training.trajectories import origin_of
from ceed_vla.wording import counted

logger = logging.getLogger(__name__)

# checkpoint folder -> median error [m] by object
Localisation = Callable[[Path], dict[str, float]]
# Records a takeover round: (policy folder, round, folder for the new datasets, most minutes or 0)
# -> the recorded roots. It is called again if the run is resumed from a state before the end of
# that round.
RecordTakeover = Callable[[Path, int, Path, float], list[Path]]


def train(config: TrainConfig, **simulation: Any) -> Path:
    """Train a teacher.

    Args:
        config: The settings.
        simulation: Further arguments of `TeacherRun`.

    Returns:
        The folder of the final checkpoint.

    Raises:
        ConfigError: Settings are missing or contradict each other, or a gate is not met (the saved
            state can be resumed).
        DatasetError: Datasets are unreadable or incompatible.
        CheckpointError: There is no run to resume, or it has other sizes.
    """
    with owned_folder("output_dir", config.output_dir, launched=True):
        return TeacherRun(config, **simulation).run()


class TeacherRun(Run):
    """One training run of a teacher: data, policy, and the takeover rounds so far.

    Args:
        config: See `TrainConfig`.
        closed_loop: Measures a checkpoint in simulation; skipped if None.
        record_takeover: Records one takeover round; required if ``config.rounds > 0``.
        privileged: The environment's description of ``observation.environment_state``; without it
            ``auxiliary_scale`` applies.
        localisation: Measures the errors that ``config.grounding_gate`` limits.
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
                f"rounds is {config.rounds}, but nothing records takeovers. Use `ceed-vla train`, "
                "or set rounds=0."
            )
        grounded = config.grounding_roots and config.grounding_steps != 0
        if config.grounding_gate and not (localisation and grounded):
            raise ConfigError(
                "grounding_gate needs --grounding_roots, --grounding_steps and an environment with "
                "known positions."
            )
        # LeRobot replaces a missing device, so the requested one is checked
        asked = config.policy.asked_device or config.policy.device or "cpu"
        super().__init__(config, asked, closed_loop)
        self.config = config
        self.record_takeover: Any = record_takeover  # not None if there are rounds
        self.localisation: Any = localisation  # not None if there is a gate
        self.demonstrations = [
            open_dataset(root, decode=False) for root in split_list(config.roots)
        ]
        self.grounding = [
            open_dataset(root, decode=False) for root in split_list(config.grounding_roots)
        ]
        check_demonstrations(self.demonstrations)
        for store in self.demonstrations:
            if str(store.usable or ""):
                logger.info("%s: %s.", store.root, store.usable)
        if (config.grounding_steps != 0 or config.grounding_batch) and not self.grounding:
            logger.warning("No --grounding_roots: training without grounding frames.")
        if self.grounding and config.grounding_batch:
            self._check_split(config.grounding_batch, "grounding_batch")
        policy, pre, post = initial_policy(config, self.demonstrations, self.grounding, privileged)
        for store in (*self.demonstrations, *self.grounding):
            check_fits(store, policy.config, pre)
        own = config.named_terms
        self.named = named_terms(policy.config, privileged) if own is None else own
        logger.info(describe(policy.config, policy.tokenizer, self.demonstrations[0], self.named))
        check_clipping(policy.tokenizer, self.demonstrations, config.max_clipped)
        with self.accelerator.main_process_first():  # the main process decodes the images
            for store in (*self.demonstrations, *self.grounding):
                store.decode(config.streaming)
        if config.lora.rank:
            attach(policy, config.lora)
        self.imitated = self._imitated(policy, post) if config.imitate else None
        objective = TeacherObjective(policy, self.imitated)
        self.prepare(objective, policy, pre, post, weight_decay=config.weight_decay)
        chunk = policy.config.chunk_size
        self.grounding_mixture = (
            Mixture(self.grounding, None, config.seed + 1, chunk) if self.grounding else None
        )
        self.takeovers: list[list[str]] = []  # the roots of every round
        self.mixture = self._mixture()
        self.speeds = Speeds(0.0, 0.0)  # of steps; measured if there is a budget
        self._choose_sizes()

    def _imitated(self, policy: Any, post: Any) -> Imitated:
        """The policy whose predictions are learnt, too."""
        found = Imitated(self.config.imitate, policy, post)
        for store in self.demonstrations:
            check_fits(store, found.policy.config, found.pre)
        return found

    def _choose_sizes(self) -> None:
        """Set and log `batch_size`, `first` (the first step on demonstrations) and `total`."""
        config = self.config
        self.batch_size = config.batch_size or BATCH
        self.first = (config.grounding_steps or 0) if self.grounding else 0
        self.total = self.first + config.steps if config.steps else ANY_NUMBER
        self.most_first = self.first
        self.most = ANY_NUMBER  # `steps_in_budget` applies config.steps
        if not config.max_minutes:
            return
        if config.resume:  # the sizes are loaded with the state
            self.total = ANY_NUMBER
            return
        schedule = divide(
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
        logger.info("%s", schedule)
        logger.log(logging.INFO if schedule.enough else logging.WARNING, "%s", schedule.expectation)
        if config.steps and schedule.steps < FEW_STEPS * config.steps:
            logger.warning(
                "--max_minutes %g allows about %d of --steps %d.",
                config.max_minutes,
                schedule.steps,
                config.steps,
            )
            self.warned = True
        self._take_sizes(Sizes(schedule.grounding_steps, schedule.batch_size, schedule.speeds))
        self._check_split(self.batch_size, "batch_size")
        self.total = self.first + schedule.steps

    def _measure_speeds(self) -> Speeds:
        """Measure the seconds of steps without updates."""
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

    def _mixture(self) -> Mixture:
        config = self.config
        stores = list(self.demonstrations)
        weights = number_list(config.root_weights, "root_weights")
        if not weights:
            weights = shared_weights(stores, config.intervention_weight)
        roots = [root for of_round in self.takeovers for root in of_round]
        if roots:
            with self.accelerator.main_process_first():
                takeovers = [open_dataset(root, streaming=config.streaming) for root in roots]
            # a batch has the same features for all frames
            if self.demonstrations[0].environment_state is None:
                for store in takeovers:
                    store.environment_state = None
            check_clipping(self.policy.tokenizer, takeovers, config.max_clipped)
            frames = sum(len(s) for s in takeovers)
            share = config.takeover_weight / (1 - config.takeover_weight) * sum(weights)
            weights += [share * len(s) / frames for s in takeovers]
            stores += takeovers
        # The summary measures on demonstrations only, so that all takeovers are trained on.
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
        """See `Run.steps_in_budget`; the remaining takeover rounds take their share."""
        config = self.config
        action = seconds.get(ACTION)
        budget = 60 * config.max_minutes
        if self.step < self.first and GROUNDING in seconds and config.grounding_steps is None:
            remaining = GROUNDING_SHARE * budget - (budget - left)
            fitting = self.step + max(0, int(remaining / seconds[GROUNDING]))
            self.first = min(self.most_first, fitting)
        if action is None:  # the speed measured at the start, corrected like that of other steps
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
        """Draw one preprocessed part of this step's batch, and its share in the batch.

        The part is None if it is empty.
        """
        if mixture is None or not size:
            return None, 0.0
        frames = mixture.draw(size, self.step, part, self.num_parts)
        batch = self.pre(dict(frames))
        if self.imitated is not None and mixture is self.mixture:
            batch[IMITATED] = self.imitated.observation(frames)
        # Drawn for the whole batch, so that augmentation does not depend on the split of the batch.
        random = np.random.default_rng([mixture.seed, self.step, 1])
        noise = random.random((size, augmentation_size(self.policy)), dtype=np.float32)[
            part :: self.num_parts
        ]
        batch[AUGMENTATION_NOISE] = torch.from_numpy(noise)
        return batch, self.share(len(noise), size)

    def _check_grounding(self) -> None:
        """Save the policy and a state, and raise `ConfigError` unless it passes the gate."""
        folder = self.save_policy("grounded")
        self.save_state()
        errors: dict[str, float] = self._of_the_first(lambda: self.localisation(folder))
        self.model.train()
        logger.info(
            "median localisation error: %s",
            ", ".join(f"{name} {100 * error:.1f} cm" for name, error in errors.items()),
        )
        check_localisation(errors, self.config.grounding_gate, self.first)

    def _of_the_first(self, find: Callable[[], Any]) -> Any:
        """Run `find` in the main process, and return its result in every process."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([find() if self.accelerator.is_main_process else None])[0]

    def _takeover_round(self, index: int) -> None:
        """Record takeovers of the present policy, and train on them from here on."""
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

    def origin(self) -> dict[str, Any]:
        paths = {"policy": self.config.policy_path, "imitated": self.config.imitate}
        found = {name: weights_hash(path) for name, path in paths.items() if path}
        datasets = origin_of([*self.demonstrations, *self.grounding], self.config.held_out)
        settings = json.dumps(asdict(self.policy.config.action_tokens), sort_keys=True)
        tokens = sha256(settings.encode()).hexdigest()[:16]
        return {**datasets, "checkpoints": found, "action_tokens": tokens}

    def state_dict(self) -> dict[str, Any]:
        sizes = Sizes(self.first, self.batch_size, self.speeds)
        return {"takeovers": self.takeovers, "sizes": sizes.entry()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rounds = state.get("takeovers")
        most = self.config.rounds or 0
        if self.config.max_minutes and isinstance(rounds, list):
            most = max(most, len(rounds))  # a shorter budget may set fewer rounds
        folder = (self.output / TAKEOVER).resolve()
        self.takeovers = read_takeovers(rounds, self.output, folder, most)
        self.mixture = self._mixture()
        if self.config.max_minutes:
            self._load_sizes(read_sizes(state.get("sizes"), self.output, self.total))

    def _load_sizes(self, sizes: Sizes) -> None:
        """Continue with the sizes that were chosen at the start of the run."""
        self._check_split(sizes.batch_size, "batch_size")
        steps = self.config.grounding_steps
        if steps is not None and self.grounding and steps > sizes.first:
            # after a gate was not met, the user set more grounding steps
            self.total += steps - sizes.first
            sizes = replace(sizes, first=steps)
        self._take_sizes(sizes)

    def _take_sizes(self, sizes: Sizes) -> None:
        self.first = sizes.first
        self.most_first = sizes.first
        self.batch_size = sizes.batch_size
        self.speeds = sizes.speeds

    # ---- the end ---------------------------------------------------------------------------------

    def summarize(self, summary: Summary) -> None:
        config = self.config
        if self.first:
            summary.lines.append(
                f"{counted(self.first, 'step')} of them on grounding frames alone, at the start"
            )
        held = find_held_out(self.demonstrations, config.held_out)
        if not held.count:
            summary.lines.append(NOTHING_HELD_OUT)
            return
        size = max(1, min(PART, self.batch_size // self.num_parts))  # fits into memory in training
        batches = partial(held_out_batches, held, self.pre, self.policy.config.chunk_size, size)
        add_token_accuracy(
            summary, held, self.policy, lambda batch: self.model(batch, None, 1.0, 1.0), batches
        )
        if not self.sharded and self.policy.tokenizer.stop is None:
            add_forwards(summary, self.policy, next(batches()))

    def next_command(self, checkpoint: Path) -> str:
        config = self.config
        data = f"--roots {quote(config.roots)} --held_out {config.held_out:g}"
        if not find_held_out(self.demonstrations, config.held_out).count:
            data = "--roots DATA_THAT_IT_WAS_NOT_TRAINED_ON"
        return (
            f"ceed-vla open-loop --policy.path {quote(str(checkpoint))} {data} --gate 0.5 "
            f"--output_dir {quote(str(self.output / 'open-loop'))}"
        )
