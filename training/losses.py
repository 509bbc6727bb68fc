"""Losses of consistency distillation.

Notation: ``Y*`` is the fixed point (the teacher's greedy block), ``Y`` a Jacobi state on the way to
it, ``f`` the first slot where they differ. All logits are aligned: entry ``i`` of (B, n, V)
predicts token ``i`` from tokens ``< i``. Entries up to and including ``f`` are therefore identical
for ``Y`` and ``Y*`` and carry no information; the consistency terms start at ``f + 1``.

A loss is one registered function. The names of its parameters are its inputs; only these are
computed:

    fixed_logits, state_logits, label_logits    the student's (B, n, V) on ``Y*``, ``Y``, labels
    teacher_logits      the frozen teacher's (B, n, V) on ``Y*``
    states, fixed_point, labels    ``Y``, ``Y*`` and mixed labels (B, n)
    label_weight        (B, n) 0 on tokens past the end of the demonstration, and where `live` is 0
    live                (B, n) 0 after the token that ends ``Y*``
    omega               weight of the anchor
    sigma               width of soft labels [bins], as for the teacher; 0 for the paper's hard ones
    counts              (2,) slots in the two means; those of the whole batch if this is a part
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ceed_vla.errors import ConfigError
from ceed_vla.supervision import divergence as forward_kl
from ceed_vla.supervision import soft_cross_entropy


@dataclass
class DistillationTerms:
    """Scalar parts of a distillation loss."""

    consistency: Tensor  # divergence on the corrupted block
    # keeps the student near the teacher: KL to it, or cross-entropy on mixed labels
    anchor: Tensor
    total: Tensor  # weighted sum of both
    exits: Tensor | None = None  # of early-exit layers that learn with the student; in the sum, too


Loss = Callable[..., DistillationTerms]
_LOSSES: dict[str, Loss] = {}


def register_loss[F: Loss](name: str) -> Callable[[F], F]:
    """Decorator that registers a loss under `name`, for ``--loss``."""

    def add(loss: F) -> F:
        _LOSSES[name] = loss
        return loss

    return add


def find_loss(name: str) -> Loss:
    """The loss of that name; `ConfigError` for an unknown one."""
    if name not in _LOSSES:
        raise ConfigError(
            f"loss is {name[:60]!r}; choose one of {', '.join(_LOSSES)}, or import the package of "
            "another one with --discover_packages_path."
        )
    return _LOSSES[name]


def needs(loss: Loss) -> list[str]:
    """Names of the inputs of a loss."""
    return list(inspect.signature(loss).parameters)


def after_first_divergence(
    states: Tensor, fixed_point: Tensor, live: Tensor | None = None
) -> Tensor:
    """Mask (B, n) of floats: 1 on `live` slots after the first divergence from the fixed point."""
    wrong = (states != fixed_point).int()  # (B, n)
    return (wrong.cumsum(1) - wrong > 0).float() * (1 if live is None else live)


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean of `values` (B, n) where `mask` (B, n) is 1; zero, with a gradient, for an empty mask.

    `count` is the number of ones in the mask of the whole batch, if this is a part of it; those of
    `mask` if None.
    """
    return (values * mask).sum() / (mask.sum() if count is None else count).clamp(min=1)


@register_loss("trust_region")
def trust_region_loss(
    teacher_logits: Tensor,
    fixed_logits: Tensor,
    state_logits: Tensor,
    states: Tensor,
    fixed_point: Tensor,
    omega: float,
    counts: Tensor | None = None,
    live: Tensor | None = None,
) -> DistillationTerms:
    """KL of the student to the frozen teacher on both blocks; demonstrations are not used.

    L = mean_{i > f} KL(p_T(. | Y*_<i) || q(. | Y_<i))
        + omega * mean_i KL(p_T(. | Y*_<i) || q(. | Y*_<i))
    """
    mask = after_first_divergence(states, fixed_point, live)
    divergences = forward_kl(teacher_logits, state_logits), forward_kl(teacher_logits, fixed_logits)
    return _terms(
        *divergences, mask, torch.ones_like(mask) if live is None else live, omega, counts
    )


@register_loss("paper")
def paper_loss(
    fixed_logits: Tensor,
    state_logits: Tensor,
    label_logits: Tensor,
    states: Tensor,
    fixed_point: Tensor,
    labels: Tensor,
    label_weight: Tensor,
    omega: float,
    sigma: float,
    counts: Tensor | None = None,
    live: Tensor | None = None,
) -> DistillationTerms:
    """CEED-VLA (arXiv 2506.13725): self-consistency plus autoregression on mixed labels.

        L = mean_{i > f} KL(sg q(. | Y*_<i) || q(. | Y_<i))
            - omega * mean_i log q(label_i | label_<i)

    The student reads the label itself, so that prefix and target agree.
    """
    divergence = forward_kl(fixed_logits, state_logits)
    surprise = soft_cross_entropy(label_logits, labels, sigma)
    return _terms(
        divergence,
        surprise,
        after_first_divergence(states, fixed_point, live),
        label_weight,
        omega,
        counts,
    )


def _terms(
    consistency: Tensor,
    anchor: Tensor,
    mask: Tensor,
    weight: Tensor,
    omega: float,
    counts: Tensor | None,
) -> DistillationTerms:
    """Means of the two terms (B, n), over `mask` and `weight`, and their sum."""
    of_mask, of_weight = (None, None) if counts is None else counts
    consistency = masked_mean(consistency, mask, of_mask)
    anchor = masked_mean(anchor, weight, of_weight)
    return DistillationTerms(consistency, anchor, consistency + omega * anchor)


def chunk_distance(
    actions: Tensor, demonstration: Tensor, valid: Tensor, half_range: Tensor
) -> Tensor:
    """Mean absolute difference (B,) of two chunks (B, m, A) over `valid` steps (B, m).

    It is in units of `half_range` (A,), half the bin range of every dimension.
    """
    difference = ((actions - demonstration).abs() / half_range).mean(-1)  # (B, m)
    return (difference * valid).sum(1) / valid.sum(1).clamp(min=1)


def mixed_labels(
    fixed_point: Tensor, demonstration: Tensor, distance: Tensor, delta_max: float
) -> tuple[Tensor, Tensor]:
    """Choose labels as in the paper: the teacher's block, or the demonstration if they differ much.

    Args:
        fixed_point: The teacher's blocks (B, n).
        demonstration: Tokens of the demonstrations (B, n).
        distance: Distance of the two (B,).
        delta_max: Largest distance at which the teacher's block is the label.

    Returns:
        Labels (B, n), and the rows (B,) that were replaced by the demonstration.
    """
    replaced = (distance > delta_max) | distance.isinf()
    return torch.where(replaced[:, None], demonstration, fixed_point), replaced
