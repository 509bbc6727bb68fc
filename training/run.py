"""Base of all training runs: output folder, loop, log, checkpoints, and states to resume from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from ceed_vla.axes import SAVED
from ceed_vla.checkpoints import save
from ceed_vla.devices import check_device
from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError, raised_as
from ceed_vla.files import settle
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.supervision import finish_training
from ceed_vla.training import states
from ceed_vla.training.budget import FEW_STEPS, STEP, StepTimer
from ceed_vla.training.optim import build_optimizers, cosine_factor
from ceed_vla.training.processes import layer_classes, new_accelerator
from ceed_vla.training.run_config import ANY_NUMBER, RunConfig
from ceed_vla.training.run_folder import (
    CHECKPOINTS,
    TRACKER,
    RunFolder,
    check_origin,
    described_settings,
    warn_of_other_settings,
)
from ceed_vla.training.summary import Summary

logger = logging.getLogger(__name__)

# Closed-loop validation: policy folder -> (successes, episodes).
ClosedLoop = Callable[[Path], tuple[int, int]]


class Run:
    """One training run. A subclass loads its data, then calls `prepare`.

    Args:
        config: The settings.
        device: "cpu", or an accelerator, as `accelerate` selects it.
        closed_loop: Measures a checkpoint in simulation; skipped if None.

    Raises:
        ConfigError: There is no output folder, or it holds another run, or files that this run
            would replace.
        CheckpointError: There is no run to resume, or a link leads out of the folder.
    """

    name = "run"

    def __init__(self, config: RunConfig, device: str, closed_loop: ClosedLoop | None) -> None:
        self.settings = config
        self._given = described_settings(config)  # before a run completes them
        self.closed_loop = closed_loop
        self.folder = RunFolder(config.output_dir, config.resume)
        self.output = self.folder.path
        check_device(device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # accelerate uses the current device
        if config.threads:
            torch.set_num_threads(config.threads)
        self.accelerator = new_accelerator(config.mixed_precision, device, self.output)
        set_seed(config.seed)
        self.step = 0
        self.total = config.steps or 0
        self.most = config.steps or ANY_NUMBER  # steps that a budget may allow
        self.warned = False  # whether the log has a warning about a small budget
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if config.batch_size:
            self._check_split(config.batch_size, "batch_size")
        if self.sharded and config.muon_lr:
            raise ConfigError("Muon does not work on sharded weights; set --muon_lr=0 under FSDP.")

    def prepare(
        self,
        objective: nn.Module,
        policy: CeedVLAPolicy,
        pre: Any,
        post: Any,
        *,
        weight_decay: float,
    ) -> None:
        """Build the optimisers of the policy's trainable parameters, and prepare accelerate.

        Raises:
            ConfigError: No parameter learns, a parameter would learn in half precision, or the
                backbone cannot recompute activations as set.
        """
        self.policy = policy.train()
        self.pre = pre
        self.post = post
        if check := getattr(self.closed_loop, "check", None):
            check(policy.config)
        # The policy's decodings, exits and scorer do not apply to the new weights.
        policy.config.forget()
        for saved in SAVED:
            saved.detach(policy.backbone)
        if self.settings.gradient_checkpointing:
            policy.backbone.recompute_activations()
        if not any(parameter.requires_grad for parameter in policy.parameters()):
            raise ConfigError(
                "No weight would learn: all are stored by reference. Set --lora.rank, or copy them "
                "(backbone.weights=copied)."
            )
        if half := {p.dtype for p in policy.parameters() if p.requires_grad} - {torch.float32}:
            raise ConfigError(
                f"Weights would learn in {half.pop()}, which rounds most of an update away; load "
                "the model in float32 (--policy.backbone.dtype, convert --dtype), or train "
                "adapters alone (--lora.rank, --lora.train)."
            )
        beside = self.modules_beside(policy)
        objective._no_split_modules = layer_classes(policy)  # type: ignore[assignment]  # what FSDP wraps
        optimizers = build_optimizers(
            [*policy.named_parameters(), *beside],
            lr=self.settings.lr,
            muon_lr=self.settings.muon_lr,
            weight_decay=weight_decay,
        )
        self.peak_lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        self.model, *self.optimizers = self.accelerator.prepare(objective, *optimizers)
        if not self.sharded:
            states.keep_in_states(self.accelerator, adapted=self.settings.lora.rank > 0)

    def modules_beside(self, policy: CeedVLAPolicy) -> list[tuple[str, nn.Parameter]]:
        """Parameters by name of modules that learn beside the policy, and are made here."""
        return []

    # ---- split of a batch over processes and parts -----------------------------------------------

    @property
    def num_parts(self) -> int:
        """Parts of every batch: one for each process and accumulated backward pass."""
        return self.accelerator.num_processes * self.settings.gradient_accumulation

    @property
    def parts(self) -> range:
        """Numbers of the parts that this process runs.

        Part ``p`` holds the rows ``p, p + num_parts, ...``.
        """
        return range(self.accelerator.process_index, self.num_parts, self.accelerator.num_processes)

    def share(self, rows: int, size: int) -> float:
        """Weight of a mean over `rows` of a batch of `size`.

        With it, the mean over the processes is the mean over the batch.
        """
        return rows * self.accelerator.num_processes / size

    def _check_split(self, size: int, name: str) -> None:
        if size < self.num_parts:
            raise ConfigError(
                f"{name} is {size}, fewer than the {self.num_parts} parts of "
                f"{self.accelerator.num_processes} processes and gradient_accumulation = "
                f"{self.settings.gradient_accumulation}; make it larger."
            )

    # ---- methods of subclasses -------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """Take one optimiser step; return values whose mean over the processes is logged."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Called before every step."""

    def after_step(self) -> None:
        """Called after every step, when `step` is already increased."""

    def kind_of_step(self) -> str:
        """Kind of the next step; kinds differ in duration."""
        return STEP

    def steps_in_budget(self, left: float, seconds: dict[str, float]) -> int:
        """Total number of steps that fit into the budget.

        Args:
            left: Seconds left of the budget.
            seconds: Mean seconds of a step, by kind.
        """
        return self.step + int(left / seconds[STEP]) if STEP in seconds else self.total

    def summarize(self, summary: Summary) -> None:
        """Add measurements at the end of the run to the summary; called in every process."""

    def next_command(self, checkpoint: Path) -> str:
        """The command that a user runs next with the final checkpoint."""
        raise NotImplementedError

    def origin(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run before; JSON types.

        Datasets and checkpoints decide the words, ranges and statistics of a policy, and the
        datasets which frames are held out.
        """
        return {}

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """`origin`, which hashes whole datasets, once for all saves."""
        return self.origin()

    def state_dict(self) -> dict[str, Any]:
        """State besides weights, optimisers and torch's random state; JSON types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""

    # ---- the loop --------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the end, and return the folder of the final checkpoint."""
        started = time.monotonic()
        if self.settings.resume:
            self.load_state()
        else:
            self.save_state()  # from here on an interrupt can be resumed
        with self.folder.writing():
            if self.accelerator.is_main_process:
                self.folder.trim_log(self.step)
            # A resumed run takes the steps after its state again.
            again = {"purge_step": self.step + 1} if self.settings.resume else {}
            self.accelerator.init_trackers(TRACKER, init_kwargs={"tensorboard": again})
        self.model.train()
        scheduled = self.total
        self._take_steps(started)
        finish_training(self.policy)
        final = self.save_policy("final")
        self._end(final, time.monotonic() - started, scheduled)
        self.validate(final)
        with self.folder.writing():
            self.accelerator.end_training()
        return final

    def _take_steps(self, started: float) -> None:
        """Take the remaining steps; log, validate and save between them.

        The run began at `started` [s].
        """
        settings = self.settings
        first_step = self.step
        timer = StepTimer()
        with tqdm(
            total=self.total,
            initial=self.step,
            desc=self.name,
            unit="step",
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        ) as bar:
            while self.step < self.total:
                self.before_step()
                began = time.monotonic()
                kind = self.kind_of_step()
                values = self.train_step()
                timer.add(kind, time.monotonic() - began)
                self.step += 1
                bar.update()
                if self.step % settings.log_every == 0:
                    elapsed = time.monotonic() - started
                    speed = (self.step - first_step) / elapsed
                    values = self._mean_over_processes({**values, "steps_per_s": speed})
                    self.log(values)
                    if settings.max_minutes:
                        self._keep_to_budget(elapsed, timer.means())
                        bar.total = self.total
                    bar.set_postfix({key: f"{value:.3f}" for key, value in values.items()})
                self.after_step()
                self._validate_and_save()

    def _validate_and_save(self) -> None:
        """Validate and save a state after this step, as the settings require."""
        settings = self.settings
        validates = settings.validate_every and self.step % settings.validate_every == 0
        if validates and self.step < self.total:
            self.validate(self.save_policy("last"))
        if self.step % settings.save_every == 0 or self.step == self.total:
            self.save_state()

    def _keep_to_budget(self, elapsed: float, seconds: dict[str, float]) -> None:
        """Set the number of steps that the budget allows, `elapsed` seconds after the start."""
        # equal in all processes
        timing = self._mean_over_processes({"elapsed": elapsed, **seconds})
        left = 60 * self.settings.max_minutes - timing.pop("elapsed")
        self.total = max(min(self.most, self.steps_in_budget(left, timing)), self.step)
        if self.total < FEW_STEPS * self.most and self.most < ANY_NUMBER and not self.warned:
            logger.warning(
                "--max_minutes %g allows about %d of --steps %d. A run that ends so early has "
                "rarely learnt its task: allow more minutes, or use smaller images or a "
                "smaller --batch_size.",
                self.settings.max_minutes,
                self.total,
                self.most,
            )
            self.warned = True

    def _end(self, final: Path, seconds: float, scheduled: int) -> None:
        """Measure on held-out episodes, log the results, and print the summary."""
        asked = scheduled if scheduled < ANY_NUMBER else self.step
        summary = Summary(self.step, asked, seconds, str(final), self.next_command(final))
        self.policy.eval()
        self.summarize(summary)
        if summary.measured:
            self.log(summary.measured)
        if self.accelerator.is_main_process:
            summary.show()

    def optimize[T](self, parts: Sequence[T], loss: Callable[[T], Tensor]) -> None:
        """Take one step of all optimisers at this step's learning rate.

        Each of this process's `parts` has a backward pass, and their losses add up. Gradients are
        exchanged after the last part.

        Raises:
            CeedVLAError: A loss is not finite.
        """
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                value = loss(part)
                if not math.isfinite(value.item()):
                    raise CeedVLAError(
                        f"The loss is {value.item()} at step {self.step}: training diverged. Lower "
                        f"--lr and --muon_lr; the last complete state is in {self.output}."
                    )
                self.accelerator.backward(value)
        factor = cosine_factor(self.step, self.total, self.settings.warmup)
        for optimizer, lr in zip(self.optimizers, self.peak_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    # ---- log, checkpoints, states ----------------------------------------------------------------

    def _mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return values
        every = torch.tensor(
            list(values.values()), device=self.accelerator.device, dtype=torch.float32
        )
        means = self.accelerator.reduce(every, reduction="mean")
        return dict(zip(values, means.tolist(), strict=True))

    def log(self, values: dict[str, float]) -> None:
        """Write values of this step to tensorboard and ``log.jsonl``."""
        with self.folder.writing():
            if self.accelerator.is_main_process and self.folder.append_log(self.step, values):
                self.accelerator.log(values, step=self.step)

    def validate(self, folder: Path) -> None:
        """Measure a checkpoint in closed loop, if there is a simulator."""
        if self.closed_loop is not None and self.accelerator.is_main_process:
            tqdm.write(f"step {self.step}: validating in closed loop, which takes minutes ...")
            successes, episodes = self.closed_loop(folder)
            self.log({"validation_success": successes / max(1, episodes)})
            tqdm.write(f"step {self.step}: {successes}/{episodes} validation episodes succeed")
        self.accelerator.wait_for_everyone()

    def save_policy(self, name: str) -> Path:
        """Write the policy as the checkpoint `name`, and return its folder."""
        folder = self.output / CHECKPOINTS / name / "pretrained_model"
        weights = states.weights(
            self.accelerator, self.model, self.policy, self.settings.lora.rank > 0
        )
        if self.accelerator.is_main_process:
            with self.folder.writing():
                save(folder, self.policy, self.pre, self.post, weights)
        self.accelerator.wait_for_everyone()
        return folder

    def save_state(self) -> None:
        """Write a state to resume from; the state before it stays valid until this is complete."""
        name = self.folder.next_state(self.total)
        self.accelerator.wait_for_everyone()  # every process has read the name
        with self.folder.writing():
            self.accelerator.save_state(str(self.output / name))
        self._undo_empty_step()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            done = {
                "step": self.step,
                "state": name,
                "processes": self.accelerator.num_processes,
                "total": self.total,
                "origin": self._origin,
                "settings": self._given,
            }
            with self.folder.writing():
                settle(*(file for file in (self.output / name).rglob("*") if file.is_file()))
                self.folder.write_progress({**done, **self.state_dict()})
        self.accelerator.wait_for_everyone()

    def load_state(self) -> None:
        """Continue from the last complete state.

        Raises:
            CheckpointError: The state cannot be read, or has other sizes.
        """
        progress = self.folder.read_progress(self.total)
        instead = "; it may begin with this run's last checkpoint"
        check_origin(progress, self._origin, self.output, instead)
        if self.accelerator.is_main_process:
            warn_of_other_settings(progress, self._given)
        folder = self.output / progress["state"]
        advice = "repeat the settings that it was started with, or start again in another folder."
        with raised_as(CheckpointError, f"{folder} cannot be resumed", advice, passing=()):
            settings = states.optimizer_settings(self.optimizers)
            states.check_metadata(folder)
            self.accelerator.load_state(str(folder))
            if self.accelerator.process_index < progress["processes"]:
                states.check_random_state(folder, self.accelerator.process_index)
            if not self.sharded:
                states.check_optimizers(self.optimizers, settings, progress["step"])
        self.step = progress["step"]
        if self.settings.max_minutes:
            self.total = max(self.step, min(self.total, progress["total"]))
        self._undo_empty_step()
        self.load_state_dict(progress)

    def _undo_empty_step(self) -> None:
        """Clear the optimisers before the first step.

        To write the state of sharded optimisers, torch takes a step without gradients.
        """
        if self.sharded and self.step == 0:
            for optimizer in self.optimizers:
                optimizer.state.clear()
