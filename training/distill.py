"""`ceed-vla distill`: train a student that reaches the fixed point in a few Jacobi iterations.

One packed forward of ``[prefix | Y* | Y]`` gives the student's logits on the fixed point and on a
Jacobi state. The weights that produce the prefix embeddings stay frozen. States come from the
teacher's trajectories (the paper) or from the student as it trains ("online": a guess and 0-2 of
its own updates).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.capabilities import check_whole_prefix
from ceed_vla.checkpoints import load, weights_hash
from ceed_vla.decoding import DecodingConfig
from ceed_vla.decoding.exits import exit_rules
from ceed_vla.decoding.names import CEED
from ceed_vla.discovery import discovered
from ceed_vla.errors import ConfigError
from ceed_vla.fields import COUNTS, chosen, ranged
from ceed_vla.outputs import owned_folder
from ceed_vla.training.adapters import attach_student
from ceed_vla.training.clipping import check_clipping
from ceed_vla.training.collect_config import guess_shares
from ceed_vla.training.corruption import PREVIOUS, StateDraw, draw_states
from ceed_vla.training.distill_data import DistillData, OnlineData, StoredData, TrajectoriesConfig
from ceed_vla.training.earlier_student import copy_into, earlier_weights
from ceed_vla.training.joint_exits import JointExitsConfig, attach_exits
from ceed_vla.training.kept_prefix import FRAMES, keep_by_scorer, keep_places
from ceed_vla.training.losses import after_first_divergence, find_loss, needs
from ceed_vla.training.objective import DistillationObjective
from ceed_vla.training.run import ClosedLoop, Run
from ceed_vla.training.run_config import ANY_NUMBER, RunConfig
from ceed_vla.training.settings import BATCHES, NONE_OR_COUNTS, NONE_OR_RATES, RATES
from ceed_vla.training.summary import Summary
from ceed_vla.training.trajectories import origin_of
from ceed_vla.wording import counted

STEPS = 400  # without a budget
TARGETS = {"teacher_logits", "fixed_logits"}  # from which early-exit layers learn


@dataclass
class DistillConfig(RunConfig):
    """Settings of `ceed-vla distill`.

    Attributes:
        steps: Optimiser steps; by default 400, or as many as fit into max_minutes.
        teacher_path: Checkpoint of the teacher, from which the student starts.
        student_path: Earlier student of this teacher, from which the student starts instead; for a
            second round with the states that the first student reached.
        trajectories: Source of the teacher's trajectories.
        roots: Comma-separated datasets; for stored trajectories those that they were collected on,
            in the same order.
        loss: "trust_region" (KL to the frozen teacher), "paper" (self-consistency and mixed
            labels), or a loss of another package.
        states: "online" (the student's own) or "stored" (of the teacher's trajectories, as in the
            paper).
        omega: Weight of the anchoring term.
        delta_quantile: "paper": quantile of the observed distance between teacher and
            demonstration, beyond which demonstrations replace the teacher's labels.
        intervention_weight: Share of a batch from frames in which a person intervened, if there are
            any; 0: as their number.
        guesses: "online": shares of previous, mid and random guesses, as in inference.
        max_updates: "online": most Jacobi updates of the guess by the student.
        curriculum: "online": which states are drawn: "uniform", or "spread", by how much the
            student's next update changes their distance to the fixed point.
        exits: Early-exit layers that learn with the student.
        kept: Prefix tokens that the student runs, those with the highest scores of the teacher's
            scorer (`ceed-vla context`); 0 for all.
        kept_by: Which these are: "places" (the same in all frames, compact backbone only), or
            "scorer" (those of each frame, decoded by ``keep<K>``).
        max_iterations: Iteration cap of the student's early-exit decoding.
        confidence: Its confidence rule (`DecodingConfig.confidence`); None for the cap alone.
        device: Device to train on: "cpu", or an accelerator such as "cuda".
        eval_every: Steps between measurements of iterations and agreement, from step 0 on; 0
            measures at the end only.
        eval_frames: Frames of held-out episodes for these measurements.
    """

    teacher_path: str = ""
    student_path: str = ""
    trajectories: TrajectoriesConfig = field(default_factory=TrajectoriesConfig)
    roots: str = ""
    loss: str = "trust_region"
    states: str = chosen("online", ("online", "stored"))
    omega: float = ranged(3.0, "[0, 1e6]")
    delta_quantile: float = ranged(0.95, "(0, 1]")
    intervention_weight: float = ranged(0.0, "[0, 1)")
    guesses: str = "0.7,0.2,0.1"
    max_updates: int = ranged(2, "[0, 1000]")
    curriculum: str = chosen("uniform", ("uniform", "spread"))
    exits: JointExitsConfig = field(default_factory=JointExitsConfig)
    kept: int = ranged(0, "[0, 1e6]")
    kept_by: str = chosen("places", ("places", "scorer"))
    max_iterations: int = ranged(2, "[1, 1e6]")
    confidence: float | None = ranged(None, "(0, 1]")
    device: str = "cpu"
    steps: int | None = ranged(None, COUNTS)  # type: ignore[assignment]  # set in __post_init__
    batch_size: int = ranged(48, BATCHES)
    lr: float = ranged(3e-4, RATES)
    muon_lr: float = ranged(3e-4, NONE_OR_RATES)
    warmup: int = ranged(20, NONE_OR_COUNTS)
    eval_every: int = ranged(100, NONE_OR_COUNTS)
    eval_frames: int = ranged(96, BATCHES)
    save_every: int = ranged(100, COUNTS)
    log_every: int = ranged(10, COUNTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is None:
            self.steps = ANY_NUMBER if self.max_minutes else STEPS
        guess_shares(self.guesses)
        find_loss(self.loss)
        if self.curriculum != "uniform" and self.states == "stored":
            raise ConfigError(
                "--curriculum spread draws among the student's own states; use --states online."
            )


def distill(config: DistillConfig, closed_loop: ClosedLoop | None = None) -> Path:
    """Distil a student.

    Args:
        config: The settings.
        closed_loop: Measures a checkpoint in simulation; skipped if None.

    Returns:
        The folder of the final checkpoint.

    Raises:
        DatasetError: Trajectories or datasets do not match the policy or each other.
        CheckpointError: Trajectories are of another teacher, or there is no run to resume.
        ConfigError: The settings are invalid.
    """
    with owned_folder("output_dir", config.output_dir, launched=True):
        return DistillRun(config, closed_loop).run()


class DistillRun(Run):
    name = "distil"

    def __init__(self, config: DistillConfig, closed_loop: ClosedLoop | None) -> None:
        super().__init__(config, config.device, closed_loop)
        self.config = config
        adapted = config.lora.rank > 0
        by_scorer = config.kept > 0 and config.kept_by == "scorer"
        self.shares = guess_shares(config.guesses)
        if self.sharded and adapted and config.trajectories.online:
            raise ConfigError(
                "Processes that share one sharded model cannot decode with it independently. "
                "Collect the trajectories before, or leave out FSDP: a frozen base with adapters "
                "takes little memory."
            )
        student, pre, post = load(
            config.teacher_path, device=config.device, merge_adapters=not adapted
        )
        check_whole_prefix(student, "the distillation from it")
        student.config.decoding = replace(
            student.config.decoding,
            method=f"keep{config.kept}" if by_scorer else "jacobi",
            exits=(),
            deadline_s=None,
            window=None,
            watch="executed",
            max_iterations=config.max_iterations,
            confidence=config.confidence,
        )
        student.config.decode_with = CEED  # not the teacher's
        exit_rules(
            student.config.decoding, student.tokenizer.ordered and student.tokenizer.stop is None
        )
        earlier: dict[str, Tensor] = {}
        if config.student_path:
            earlier = earlier_weights(student, config.student_path, config.device, adapted=adapted)
        teacher = None
        if adapted:
            attach_student(student, config.lora, earlier)
        else:
            copy_into(student, earlier)
            teacher, _, _ = load(config.teacher_path, device=config.device)
            teacher.to(self.accelerator.device)
        student.to(self.accelerator.device)
        self.objective = DistillationObjective(
            student, teacher, find_loss(config.loss), config.omega
        )
        with self.accelerator.main_process_first():  # the main process decodes the images
            self.data = self._data(student, pre)
        scorers = student.backbone.context if by_scorer else ()
        if by_scorer:
            self.objective.choose = keep_by_scorer(student, config.kept)
        elif config.kept:
            self._keep_places(student)
        check_clipping(student.tokenizer, self.data.stores, config.max_clipped)
        self.prepare(self.objective, student, pre, post, weight_decay=0.0)
        if by_scorer:  # the student's checkpoint needs it, too
            student.backbone.context = scorers

    def modules_beside(self, policy: Any) -> list[tuple[str, torch.nn.Parameter]]:
        """The early-exit layers of the student."""
        config = self.config.exits
        if config.layers and not TARGETS & set(needs(self.objective.loss)):
            raise ConfigError(
                f"exits.layers needs a loss that reads {' or '.join(sorted(TARGETS))}, and "
                f"--loss {self.config.loss} reads neither."
            )
        adapted = self.settings.lora.rank > 0 and config.kind == "layer"
        for refused, why in (
            (self.sharded, "on sharded weights; leave out FSDP."),
            (self.settings.gradient_checkpointing, "with --gradient_checkpointing; leave it out."),
            (adapted, "with --lora.rank and --exits.kind layer; set --exits.kind linear."),
            (
                self.config.kept > 0 and self.config.kept_by == "scorer",
                "with --kept_by scorer, as decoders with exits run the whole prefix.",
            ),
        ):
            if config.layers and refused:
                raise ConfigError(f"exits.layers does not work {why}")
        self.objective.exits = attach_exits(policy, config)
        self.objective.exits_weight = config.weight
        made = self.objective.exits
        return [] if made is None else [(f"exits.{n}", p) for n, p in made.named_parameters()]

    def _keep_places(self, student: Any) -> None:
        if self.config.lora.rank:
            raise ConfigError(
                "With --kept_by places all of the student's layers learn; leave out --lora.rank."
            )
        rows = self.data.draw(FRAMES, np.random.default_rng(self.config.seed), 0)
        keep_places(student, self.config.kept, self.data.observations(rows))

    def _data(self, student: Any, pre: Any) -> DistillData:
        config, chosen = self.config, self.config.trajectories
        names = (
            "eval_frames",
            "held_out",
            "delta_quantile",
            "intervention_weight",
            "streaming",
            "seed",
        )
        sizes = {name: getattr(config, name) for name in names} | {"corrections_only": True}
        stored = config.states == "stored"
        if chosen.online:
            decode = self.objective.decode_teacher
            return OnlineData(config.roots, student, pre, decode, teacher_states=stored, **sizes)
        return StoredData(
            chosen.path, config.roots, config.teacher_path, student, pre, stored, **sizes
        )

    # ---- steps -----------------------------------------------------------------------------------

    def origin(self) -> dict[str, Any]:
        config = self.config
        return {
            **origin_of(self.data.stores, config.held_out),
            "teacher": weights_hash(config.teacher_path),
            "student": weights_hash(config.student_path) if config.student_path else None,
        }

    def train_step(self) -> dict[str, float]:
        config, size = self.config, self.config.batch_size
        rows = self.data.draw(size, np.random.default_rng([config.seed, self.step]), self.step)
        # Drawn for the whole batch, so that states do not depend on the split of the batch.
        random = np.random.default_rng([config.seed, self.step, 1])
        draw = draw_states(self.policy, size, self.shares, config.max_updates, random)
        if config.curriculum == "spread":
            draw.kind[:] = PREVIOUS  # every kind of guess is a candidate of every row
        parts = [
            self._part(rows[p :: self.num_parts], draw[p :: self.num_parts]) for p in self.parts
        ]
        counts = self._counts(parts)
        values: dict[str, float] = defaultdict(float)

        def loss(part: dict[str, Any]) -> Tensor:
            share = part["share"] = self.share(len(part["states"]), size)
            terms = self.model("losses", part["embeddings"], part["seen"], part, counts)
            for name, value in {
                "loss": terms.total,
                "consistency_loss": terms.consistency,
                "anchor_loss": terms.anchor,
                **({} if terms.exits is None else {"exits_loss": terms.exits}),
                "state_accuracy": share * (part["states"] == part["fixed_point"]).float().mean(),
                "replacement_rate": share * part["replaced"].float().mean(),
            }.items():
                values[name] += value.item()
            return terms.total  # type: ignore[no-any-return]

        self.optimize(parts, loss)
        if "labels" in needs(self.objective.loss):
            return {**values, "delta_max": self.data.delta_max}
        values.pop("replacement_rate")
        return dict(values)

    def _part(self, rows: Any, draw: StateDraw) -> dict[str, Any]:
        """A part of the batch with its prefix embeddings and states, computed without gradients."""
        batch = self.data.batch(rows, draw)
        own = None if self.config.states == "stored" else (draw, self.config.max_updates)
        with torch.no_grad():
            curriculum = self.shares if self.config.curriculum == "spread" else None
            embeddings, seen, states = self.model("prepare", batch, own, curriculum)
        return {**batch, "embeddings": embeddings, "seen": seen, "states": states}

    def _counts(self, parts: list[dict[str, Any]]) -> Tensor:
        """Slots (3,) in the means of the two loss terms and of the exits', of the whole batch, over
        the processes.
        """
        masks = torch.cat(
            [
                after_first_divergence(part["states"], part["fixed_point"], part["live"])
                for part in parts
            ]
        )
        weight = "label_weight" if "label_weight" in needs(self.objective.loss) else "live"
        weights = torch.cat([part[weight] for part in parts])
        live = torch.cat([part["live"] for part in parts])
        counts = torch.stack([masks.sum(), weights.sum(), live.sum()])
        return self.accelerator.reduce(counts, reduction="mean")  # type: ignore[no-any-return]

    # ---- measurements ----------------------------------------------------------------------------

    def before_step(self) -> None:
        if self.step == 0 and self.config.eval_every:
            self.log(self._measure())  # the student still has the teacher's weights

    def after_step(self) -> None:
        every = self.config.eval_every
        if every and self.step % every == 0 and self.step < self.total:
            self.log(self._measure())

    def summarize(self, summary: Summary) -> None:
        found = self._measure()
        summary.measured |= found
        frames = counted(len(self.data.held_out), "frame")
        where = (
            f"{frames} of held-out episodes"
            if self.data.whole_episodes
            else f"{frames} (no episode was held out)"
        )
        agreement = f"On {where}: {found['teacher_agreement']:.3f} of the teacher's tokens"
        if "token_accuracy" in found:
            agreement += f", {found['token_accuracy']:.3f} of the demonstration's"
        summary.lines += [
            agreement,
            (
                f"Forwards a chunk: {found['iterations_mean']:.2f} with strict Jacobi, "
                f"{found['early_exit_forwards']:.2f} with early exit; after one forward "
                f"{found['one_forward_agreement']:.3f} of the tokens equal the fixed point's"
            ),
        ]

    def next_command(self, checkpoint: Path) -> str:
        env = getattr(self.config, "env", None)
        policy = f"--policy.path {quote(str(checkpoint))}"
        if env is None or env.type == "none":
            data = f"--roots {quote(self.config.roots)} --held_out {self.config.held_out:g}"
            if not self.data.whole_episodes:
                data = "--roots DATA_THAT_IT_WAS_NOT_TRAINED_ON"
            return (
                f"ceed-vla open-loop {policy} {data} --decoders jacobi,ceed "
                f"--output_dir {quote(str(self.output / 'open-loop'))}"
            )
        where = f"--env.type={env.type}"
        if packages := discovered():
            where += f" --discover_packages_path={','.join(packages)}"
        return (
            f"ceed-vla calibrate {policy} {where} --output_dir "
            f"{quote(str(self.output / 'calibrated'))} (chooses the exit), or ceed-vla eval "
            f"{policy} --teacher.path {quote(self.config.teacher_path)} {where}"
        )

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Measure iterations, agreement with the teacher and accuracy on held-out frames."""
        method = self.policy.config.decoding.method  # "jacobi", or that of a part of the prefix
        strict = DecodingConfig(method=method, guess="previous")
        size = self.config.batch_size // self.num_parts or 1
        # Sharded weights are gathered in the model's own forward only.
        decode = (
            partial(self.model, "decode_student") if self.sharded else self.objective.decode_student
        )
        found, early, correct = [], [], []
        for rows in np.split(self.data.held_out, range(size, len(self.data.held_out), size)):
            batch = self.data.batch(rows)
            result = decode(batch, strict, batch["previous"])
            once = decode(batch, replace(strict, max_iterations=1), batch["previous"])
            early.append(
                decode(batch, self.policy.config.decoding, batch["previous"]).iterations.float()
            )
            demonstrated = self.policy.tokenizer.encode(batch["action"])
            agree = (result.tokens == batch["fixed_point"], once.tokens == result.tokens)
            live = batch["live"] / batch["live"].sum(1, keepdim=True)
            found.append((result.iterations.float(), *((same * live).sum(1) for same in agree)))
            # neither steps behind an episode's end nor what nobody demonstrated
            valid = self.policy.tokenizer.weight(demonstrated, batch["action_is_pad"])
            valid = valid[self.data.demonstrated(rows)].float()
            same = (result.tokens == demonstrated)[self.data.demonstrated(rows)]
            correct.append((same * valid).sum(1) / valid.sum(1).clamp(min=1e-9))
        shown = torch.cat(correct)
        iterations, teacher, once = (torch.cat(parts) for parts in zip(*found, strict=True))
        return {
            "early_exit_forwards": torch.cat(early).mean().item(),
            **({"token_accuracy": shown.mean().item()} if len(shown) else {}),
            "iterations_mean": iterations.mean().item(),
            "iterations_p95": iterations.quantile(0.95).item(),
            "teacher_agreement": teacher.mean().item(),
            "one_forward_agreement": once.mean().item(),
        }
