"""`ceed-vla distill`: make a teacher reach its fixed point in a few Jacobi iterations.

One packed forward of ``[prefix | Y* | Y]`` gives the student's logits on the fixed point and on a Jacobi state; the
camera stems and the prefix embeddings stay frozen. States come from stored teacher trajectories (the paper) or from the
student itself while it trains ("online": a guess and 0-2 of its own updates).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ceed_vla.checkpoints import load
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from training.distill_data import DistillData, online_states
from training.losses import LOSSES, DistillationTerms, paper_loss, trust_region_loss
from training.run import ClosedLoop, Run, RunConfig
from training.trajectories import guess_shares

STATES = ("online", "stored")
# Parts of the backbone that learn; the others make the prefix embeddings, which student and teacher share.
TRAINED = ("action_tokens", "slots", "layers", "final_norm", "head")


@dataclass
class DistillConfig(RunConfig):
    """Settings of `ceed-vla distill`.

    Attributes:
        teacher_path: The teacher; the student starts from it.
        trajectories: Folder made by `ceed-vla collect` with this teacher.
        roots: Comma-separated data sets the trajectories were collected on, in the same order.
        loss: "trust_region" (KL to the frozen teacher) or "paper" (self-consistency and mixed labels).
        states: "online" (the student's own) or "stored" (the teacher's trajectories, as the paper).
        omega: Weight of the anchoring term.
        delta_quantile: "paper": demonstrations replace the share of labels beyond this quantile of the observed
            distance between teacher and demonstration.
        guesses: "online": shares of previous, mid and random guesses, as in inference.
        max_updates: "online": at most so many own Jacobi updates of the guess.
        max_iterations: Iteration cap of the student's early-exit decoding.
        device: Where to train: "cpu", or an accelerator such as "cuda".
        eval_every: Steps between measurements of iterations and agreement (0: at the end only).
        eval_frames: Held-out frames of that measurement.
    """

    teacher_path: str = ""
    trajectories: str = ""
    roots: str = ""
    loss: str = "trust_region"
    states: str = "online"
    omega: float = 3.0
    delta_quantile: float = 0.95
    guesses: str = "0.7,0.2,0.1"
    max_updates: int = 2
    max_iterations: int = 2
    device: str = "cpu"
    steps: int = 400
    batch_size: int = 48
    lr: float = 3e-4
    muon_lr: float = 3e-4
    warmup: int = 20
    eval_every: int = 100
    eval_frames: int = 96
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ConfigError(f"loss is {self.loss!r}; choose one of {', '.join(LOSSES)}.")
        if self.states not in STATES:
            raise ConfigError(f"states is {self.states!r}; choose one of {', '.join(STATES)}.")
        if not 0 < self.delta_quantile <= 1:
            raise ConfigError(f"delta_quantile is {self.delta_quantile}; it must lie in (0, 1].")
        if self.max_updates < 0 or self.eval_frames < 1:
            raise ConfigError("max_updates must be at least 0, eval_frames at least 1.")


class DistillationObjective(nn.Module):
    """The distillation loss of one batch of student and frozen teacher."""

    def __init__(self, student: CeedVLAPolicy, teacher: CeedVLAPolicy, config: DistillConfig) -> None:
        super().__init__()
        self.student, self.config = student, config
        self.teacher = [teacher]  # in a list: not a submodule, so not wrapped, saved or trained
        for name, parameter in student.backbone.named_parameters():
            parameter.requires_grad_(name.partition(".")[0] in TRAINED)

    def forward(self, embeddings: Tensor, batch: dict[str, Tensor]) -> DistillationTerms:
        """Loss terms behind prefix embeddings (B, P, d).

        Args:
            embeddings: From the frozen part, which student and teacher share.
            batch: ``fixed_point``, ``states``, ``labels`` and ``label_weight`` (B, n).
        """
        fixed, states = batch["fixed_point"], batch["states"]
        if self.config.loss == "trust_region":
            with torch.no_grad():
                _, (teacher_logits,) = self.teacher[0].backbone.packed_logits(embeddings, [fixed])
            _, (on_fixed, on_states) = self.student.backbone.packed_logits(embeddings, [fixed, states])
            return trust_region_loss(teacher_logits, on_fixed, on_states, states, fixed, self.config.omega)
        labels = batch["labels"]
        _, (on_fixed, on_states, on_labels) = self.student.backbone.packed_logits(
            embeddings, [fixed, states, labels]
        )
        sigma = self.student.config.label_sigma
        return paper_loss(
            on_fixed,
            on_states,
            on_labels,
            states,
            fixed,
            labels,
            batch["label_weight"],
            self.config.omega,
            sigma,
        )


def distill(config: DistillConfig, closed_loop: ClosedLoop | None = None) -> Path:
    """Distil a student.

    Args:
        config: Settings.
        closed_loop: Measures a checkpoint in simulation; skipped if None.

    Returns:
        Folder of the final checkpoint.

    Raises:
        ConfigError: Bad settings.
        DatasetError: Trajectories or data sets that do not fit.
        CheckpointError: Trajectories of another teacher, or nothing to resume.
    """
    return DistillRun(config, closed_loop).run()


class DistillRun(Run):
    """One distillation run: student, frozen teacher and data."""

    name = "distil"

    def __init__(self, config: DistillConfig, closed_loop: ClosedLoop | None) -> None:
        super().__init__(config, config.device, closed_loop)
        self.config = config
        self.shares = guess_shares(config.guesses)
        student, pre, post = load(config.teacher_path, device=config.device)
        student.config.decoding = replace(student.config.decoding, max_iterations=config.max_iterations)
        teacher, _, _ = load(config.teacher_path, device=config.device)
        teacher.requires_grad_(False).to(self.accelerator.device)
        with self.accelerator.main_process_first():  # the first one decodes the images
            self.data = DistillData(
                config.trajectories,
                config.roots,
                config.teacher_path,
                student,
                pre,
                eval_frames=config.eval_frames,
                delta_quantile=config.delta_quantile,
            )
        if config.states == "stored" and not self.data.trajectories.states:
            raise DatasetError(f"{config.trajectories} keeps no states; collect them with --states=true.")
        self.prepare(DistillationObjective(student, teacher, config), student, pre, post, weight_decay=0.0)

    def train_step(self) -> dict[str, float]:
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        drawn = np.random.default_rng([config.seed, self.step]).choice(self.data.rows, size=config.batch_size)
        random = np.random.default_rng([config.seed, self.step, rank])  # a step always gets the same states
        batch = self.data.batch(drawn[rank::world])
        with self.accelerator.autocast():
            with torch.no_grad():
                embeddings = self.policy.backbone.embed_prefix(batch)  # (B, P, d), once for all forwards
            if config.states == "stored":
                states = self.data.stored_states(batch["rows"], random).to(batch["fixed_point"].device)
            else:
                states = online_states(
                    self.policy, embeddings, batch["previous"], self.shares, config.max_updates, random
                )
            tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
            terms = self.model(embeddings, {**tensors, "states": states})
        self.optimize(terms.total)
        values = {
            "loss": terms.total.item(),
            "consistency_loss": terms.consistency.item(),
            "anchor_loss": terms.anchor.item(),
            "state_accuracy": (states == batch["fixed_point"]).float().mean().item(),
        }
        if config.loss == "paper":
            values["replacement_rate"] = batch["replaced"].float().mean().item()
            values["delta_max"] = self.data.delta_max
        return values

    def after_step(self) -> None:
        every = self.config.eval_every
        if self.step == self.total or (every and self.step % every == 0):
            self.log(self._measure())

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Strict iterations, agreement with the teacher and accuracy after one forward, on held-out frames."""
        self.policy.eval()
        batch = self.data.batch(self.data.held_out)
        strict = DecodingConfig(method="jacobi", guess="previous")
        result = self.policy.decode(batch, strict, previous=batch["previous"])
        once = self.policy.decode(batch, replace(strict, max_iterations=1), previous=batch["previous"])
        self.policy.train()
        iterations = result.iterations.float()
        return {
            "iterations_mean": iterations.mean().item(),
            "iterations_p95": iterations.quantile(0.95).item(),
            "teacher_agreement": (result.tokens == batch["fixed_point"]).float().mean().item(),
            "one_forward_agreement": (once.tokens == result.tokens).float().mean().item(),
        }
