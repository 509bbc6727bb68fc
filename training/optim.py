"""Optimisers: Muon for the matrices of the trunk, AdamW for the rest; warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ceed_vla.errors import CeedVLAError

# coefficients of Muon's quintic iteration (Jordan et al. 2024)
NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)


def computes_bfloat16(device: str) -> bool:
    """Whether a device computes in bfloat16; a CPU that emulates it is 70 times slower."""
    if torch.device(device).type == "cpu":
        return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.device(device).type != "cuda" or torch.cuda.is_bf16_supported(
        including_emulation=False
    )


class Muon(torch.optim.Muon):
    """torch's Muon, but in float32 on a CPU that would emulate its bfloat16."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        devices = {
            str(parameter.device) for group in self.param_groups for parameter in group["params"]
        }
        if closure is not None or all(map(computes_bfloat16, devices)):
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return None

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        momentum = group["momentum"]
        lr = group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = orthogonalise(gradient.lerp(buffer, momentum).float())
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(update, alpha=-0.2 * lr * math.sqrt(max(parameter.shape)))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Move all singular values of a matrix (a, b) near 1 by Newton-Schulz iterations, in its dtype.

    Every iteration multiplies by a polynomial of the small Gram matrix; one factor collects them.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T, steps).T
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    gram = matrix @ matrix.T  # (a, a)
    factor = torch.eye(len(gram), dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        polynomial = torch.addmm(b * gram, gram, gram, alpha=c)
        polynomial.diagonal().add_(a)
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    return factor @ matrix


def build_optimizers(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    muon_lr: float,
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """Split trainable parameters between Muon (matrices of transformer layers) and AdamW (others).

    Adapters go to AdamW, because Muon would update both factors of a product with full rank. If
    `muon_lr` is 0, all parameters go to AdamW.
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
            Muon(
                matrices,
                lr=muon_lr,
                momentum=0.95,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        optimizers.append(
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
        )
    return optimizers


def cosine_factor(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up to 1, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / max(1, warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, steps: int) -> None:
    """Step `step` of `steps` of a module that learns beside a frozen policy.

    The learning rate of every group warms up and falls, from the one that it was made with.

    Raises:
        CeedVLAError: The loss is not finite.
    """
    if not torch.isfinite(loss):
        raise CeedVLAError(
            f"The loss is {loss.item()} at step {step}: training diverged. Lower --lr."
        )
    loss.backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        peak = group.setdefault("initial_lr", group["lr"])
        group["lr"] = peak * cosine_factor(step, steps, steps // 20)
    optimizer.step()
    optimizer.zero_grad()
