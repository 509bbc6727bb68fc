"""Student and teacher of a distillation as one module; its forward runs all their computations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ceed_vla.decoding import DecodeResult, DecodingConfig
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.training.adapters import teacher_weights
from ceed_vla.training.corruption import StateDraw, online_states
from ceed_vla.training.curriculum import informative_states
from ceed_vla.training.joint_exits import exit_loss
from ceed_vla.training.losses import DistillationTerms, Loss, needs


class DistillationObjective(nn.Module):
    """The distillation loss of student and frozen teacher.

    The `student` starts from the weights of the `teacher`, which do not change. The teacher is None
    if the student's adapters can be switched instead
    (`ceed_vla.training.adapters.attach_student`). See `ceed_vla.training.losses` for `loss` and
    `omega`.

    Attributes:
        exits: Early-exit layers of the student that learn with it, if any.
        exits_weight: Weight of their loss.
        choose: Reduces prefix embeddings to the tokens that the student runs; None if it runs all.
    """

    def __init__(
        self, student: CeedVLAPolicy, teacher: CeedVLAPolicy | None, loss: Loss, omega: float
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.omega = omega
        self.exits: nn.ModuleDict | None = None
        self.exits_weight = 0.0
        self.choose: Callable[[Any], Any] | None = None
        self.copy = [teacher]  # in a list: not a submodule, so not wrapped, saved or trained
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            # The other weights produce the prefix embeddings, which student and teacher share.
            learning = set(student.backbone.distillation_parameters())
            for name, parameter in student.backbone.named_parameters():
                parameter.requires_grad_(name in learning)

    def forward(self, part: str, *arguments: Any) -> Any:
        """Run the method called `part`: DDP, FSDP and autocast apply to `forward` only."""
        return getattr(self, part)(*arguments)

    @contextmanager
    def teacher(self) -> Iterator[CeedVLAPolicy]:
        """The teacher, in evaluation mode."""
        teacher = self.copy[0]
        if teacher is not None:
            yield teacher
            return
        with teacher_weights(self.student), self._evaluating():
            yield self.student

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Student in evaluation mode: without dropout, with a cache despite recomputation."""
        training = self.student.training
        self.student.eval()
        try:
            yield
        finally:
            self.student.train(training)

    @torch.no_grad()
    def prepare(
        self,
        batch: dict[str, Any],
        own: tuple[StateDraw, int] | None,
        curriculum: NDArray[Any] | None = None,
    ) -> tuple[Any, Any, Tensor]:
        """Compute what all forwards of a step share: prefix embeddings and states ``Y``.

        Args:
            batch: The observation, ``previous`` (B, n), and ``teacher_states`` (B, n) if `own` is
                None.
            own: Random part of the student's own states, and the most updates of them; None for
                the teacher's states.
            curriculum: Shares of the kinds of guesses (kinds,) for states by curriculum; None for
                uniform ones.

        Returns:
            Prefix embeddings, those of the tokens that the student keeps, and states (B, n).
        """
        student: Any = self.student
        previous = batch["previous"]
        with self._evaluating():
            kept = getattr(student.backbone, "kept", [])
            teacher = cast("Any", self.copy[0])
            # the student keeps a part of the prefix
            if kept and teacher is not None and not teacher.backbone.kept:
                embeddings = teacher.backbone.embed_prefix(batch)
                seen = embeddings[:, kept]
            else:
                embeddings = seen = student.backbone.embed_prefix(batch)
            if self.choose is not None:
                seen = self.choose(embeddings)
            if own is None:
                states = batch["teacher_states"]
            elif curriculum is None:
                states = online_states(student, seen, previous, batch["fixed_point"], *own)
            else:
                states = informative_states(
                    student, seen, previous, batch["fixed_point"], batch["live"], *own, curriculum
                )
            return embeddings, seen, states

    def losses(
        self, embeddings: Any, seen: Any, batch: dict[str, Any], counts: Tensor
    ) -> DistillationTerms:
        """Loss terms of a part of a batch.

        Args:
            embeddings: Prefix embeddings.
            seen: Those of the tokens that the student keeps.
            batch: ``fixed_point``, ``states``, ``labels`` and ``label_weight`` (B, n), and
                ``share``, the weight of this part's rows in a mean over the batch.
            counts: Slots of the whole batch in the means of the two terms, and of the exits' (3,).
        """
        wanted = needs(self.loss)
        backbone = self.student.backbone
        blocks = {"fixed_logits": "fixed_point", "state_logits": "states", "label_logits": "labels"}
        blocks = {name: block for name, block in blocks.items() if name in wanted}
        have: dict[str, Any] = {**batch, "omega": self.omega, "counts": counts[:2]}
        have["sigma"] = (
            self.student.config.label_sigma if self.student.config.action_tokens.ordered else 0.0
        )
        if "teacher_logits" in wanted:
            with torch.no_grad(), self.teacher() as teacher:
                _, (have["teacher_logits"],) = teacher.backbone.packed_logits(
                    embeddings, [batch["fixed_point"]]
                )
        _, logits = backbone.packed_logits(seen, [batch[block] for block in blocks.values()])
        have |= zip(blocks, logits, strict=True)
        terms = self.loss(**{name: have[name] for name in wanted})
        if "counts" not in wanted:  # it is a mean over this part's rows
            parts = {name: getattr(terms, name) for name in ("total", "consistency", "anchor")}
            terms = replace(terms, **{n: batch["share"] * part for n, part in parts.items()})
        if self.exits is None:
            return terms
        target = have["teacher_logits"] if "teacher_logits" in have else have["fixed_logits"]
        read = [batch["fixed_point"], batch["states"]]
        found = exit_loss(backbone, seen, read, target, batch["live"], counts[2])
        return replace(terms, exits=found, total=terms.total + self.exits_weight * found)

    def decode_student(
        self, batch: dict[str, Any], config: DecodingConfig, previous: Tensor
    ) -> DecodeResult:
        """Decode with the student in evaluation mode."""
        with self._evaluating():
            return self.student.decode(batch, config, previous=previous, read=False)

    def decode_teacher(
        self, batch: dict[str, Any], guess: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's fixed points (B, n), and from a guess (B, n) all states (k, B, n)."""
        with self.teacher() as teacher:
            return fixed_points(teacher, batch, guess)


def fixed_points(
    policy: CeedVLAPolicy, batch: dict[str, Any], guess: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A policy's fixed points (B, n), and from a guess (B, n) all states (k, B, n)."""
    if guess is None:
        return policy.decode(batch, "ar", read=False).tokens, None
    found = policy.decode(
        batch, "jacobi", previous=guess, shift_steps=0, record_states=True, read=False
    )
    return found.tokens, torch.stack([*(found.states or []), found.tokens])
