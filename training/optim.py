"""Muon for the matrices of the trunk, AdamW for everything else; one warm-up and cosine for both."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def build_optimizers(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, muon_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Split trainable parameters between Muon (matrices of transformer layers) and AdamW (the rest).

    Adapters are AdamW's: Muon would give both factors of a product updates of full rank. So is all, if `muon_lr` is 0.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            matrix = ".layers." in f".{name}" and parameter.ndim == 2 and ".lora_" not in name
            (matrices if matrix and muon_lr else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=muon_lr, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay))
    return optimizers


def cosine_factor(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up to 1, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / max(1, warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
