"""LoRA through peft: attach adapters to a policy, switch them, and write them to checkpoints.

A student and its teacher share one copy of the base weights: `teacher_weights` switches the
student's adapter off, or to the adapter that the teacher was trained with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ceed_vla.errors import ConfigError
from ceed_vla.extras import require_module
from ceed_vla.fields import Checked, chosen, ranged, short
from ceed_vla.lora import A, B
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

logger = logging.getLogger(__name__)

LEARNT, TEACHER = "learnt", "teacher"  # names of the adapters
HEADS = ("head", "lm_head")  # backbones read single rows of these weights
LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")


@dataclass
class LoRAConfig(Checked, prefix="lora."):
    """Low-rank adapters; needs the extra `vlm`.

    Attributes:
        rank: Rank of the adapters; 0 trains all weights instead.
        alpha: Numerator of a new adapter's scale alpha / rank; 2 * rank if 0.
        dropout: Share of an adapter's inputs that training drops.
        targets: Linear layers with adapters: those of the "language" model (the part that
            distillation trains) or "all".
        train: Comma-separated modules of the teacher that learn without adapters, e.g.
            state,auxiliary,embed_tokens.
    """

    rank: int = ranged(0, "[0, 4096]")
    alpha: int = ranged(0, "[0, 1e6]")
    dropout: float = ranged(0.0, "[0, 1)")
    targets: str = chosen("language", ("language", "all"))
    train: str = "state,auxiliary"


def attach(policy: CeedVLAPolicy, config: LoRAConfig) -> None:
    """Put adapters on a policy: those of its checkpoint, or new ones.

    Only the adapters, the modules in ``config.train`` and new modules of the backbone learn.

    Raises:
        ConfigError: peft is missing, or the settings do not match the policy or its adapters.
    """
    _add(policy, LEARNT, policy.adapters, config, config.targets)
    full = [name.strip() for name in config.train.split(",") if name.strip()]
    known = {part for name, _ in policy.backbone.named_parameters() for part in name.split(".")}
    if wrong := set(full) - known - {"state", "auxiliary"}:
        raise ConfigError(
            f"--lora.train has {short(min(wrong))}, which is not in the name of any weight."
        )
    for name, parameter in policy.backbone.named_parameters():
        parts = name.split(".")
        own = parts[0] in policy.backbone.new_parts or any(part in full for part in parts)
        parameter.requires_grad_(f".{LEARNT}." in name or own)
    policy.adapters = {}


def attach_student(
    policy: CeedVLAPolicy, config: LoRAConfig, earlier: Mapping[str, Tensor] | None = None
) -> None:
    """Put a student's adapter on a policy, next to the teacher's; see `attach`.

    It starts as a copy of the `earlier` student's adapter if there is one, else of the teacher's,
    or as a new one if the teacher has none.
    """
    if config.targets != "language":
        raise ConfigError(
            f"lora.targets is {config.targets}; distillation trains adapters of the language model "
            'only. Set it to "language".'
        )
    if policy.adapters:
        _add(policy, TEACHER, policy.adapters, config, "language")
    _add(policy, LEARNT, earlier or policy.adapters, config, "language")
    policy.adapters = {}
    learning = set(policy.backbone.distillation_parameters())
    for parameter_name, parameter in policy.backbone.named_parameters():
        parameter.requires_grad_(f".{LEARNT}." in parameter_name and parameter_name in learning)
    select(policy, LEARNT)


def _own_layers(adapters: Mapping[str, Tensor], rank: int) -> list[str]:
    """Layers with adapters in a checkpoint."""
    ranks = {len(weight) for name, weight in adapters.items() if name.endswith(A)}
    if ranks - {rank}:
        raise ConfigError(
            f"lora.rank is {rank}, but the checkpoint has adapters of rank "
            f"{', '.join(map(str, sorted(ranks)))}, which continue to learn; set that rank."
        )
    return [n.removeprefix("backbone.").removesuffix(A) for n in sorted(adapters) if n.endswith(A)]


def _layers(policy: CeedVLAPolicy, targets: str) -> list[str]:
    """Names of the linear layers that get adapters."""
    backbone = policy.backbone
    learning = set(backbone.distillation_parameters())
    names = [
        name
        for name, module in backbone.named_modules()
        if type(module).__name__ in LAYERS
        and name.split(".")[-1] not in HEADS
        and name.split(".")[0] not in ("state", "auxiliary")
        and (targets == "all" or f"{name}.weight" in learning)
    ]
    if not names:
        raise ConfigError(
            f"{type(backbone).__name__} has no linear layer for adapters; set --lora.rank=0."
        )
    return names


def _add(
    policy: CeedVLAPolicy,
    name: str,
    weights: Mapping[str, Tensor],
    config: LoRAConfig,
    targets: str,
) -> None:
    """Put one adapter on the policy.

    It gets the `weights` of a checkpoint's adapters; without these it is new, on `targets`.
    """
    own = _own_layers(weights, config.rank)
    require_module("LoRA", "peft")
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings = PeftConfig(
        r=config.rank,
        # the checkpoint's weights include their scale
        lora_alpha=(config.rank if own else config.alpha or 2 * config.rank),
        lora_dropout=config.dropout,
        target_modules=own or _layers(policy, targets),
    )
    inject_adapter_in_model(settings, policy.backbone, adapter_name=name)
    parameters = dict(policy.named_parameters())
    for parameter in (p for n, p in parameters.items() if f".{name}." in n):
        parameter.data = parameter.data.float()  # half precision would round small updates away
    with torch.no_grad():
        for weight, value in weights.items():
            parameters[weight.removesuffix(".weight") + f".{name}.weight"].copy_(value)


# ---- switching -----------------------------------------------------------------------------------


def adapted_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def select(policy: nn.Module, name: str | None) -> None:
    """Activate adapter `name`, or none; the gradients of `LEARNT` stay in either case."""
    for layer in adapted_layers(policy):
        active = name is not None and name in layer.lora_A
        layer._disable_adapters = not active
        if active:
            layer._active_adapter = [name]


@contextmanager
def teacher_weights(student: nn.Module) -> Iterator[None]:
    """Run the student as its teacher in the block: without adapter, or with the teacher's."""
    select(student, TEACHER)
    try:
        yield
    finally:
        select(student, LEARNT)


# ---- checkpoints ---------------------------------------------------------------------------------


def plain_weights(
    weights: Mapping[str, Tensor], scale: float, keep_adapters: bool
) -> dict[str, Tensor]:
    """Convert the weights of a policy with adapters to those of a checkpoint.

    Args:
        weights: Weights by peft's names.
        scale: Factor of the learnt adapters.
        keep_adapters: Whether the adapters are stored under the names of `ceed_vla.lora`; else
            they are added to the base weights.

    Returns:
        Weights by the names of a policy without adapters.
    """
    a = f".lora_A.{LEARNT}.weight"
    b = f".lora_B.{LEARNT}.weight"
    plain = {n.replace(".base_layer.", "."): w for n, w in weights.items() if ".lora_" not in n}
    for layer in [name.removesuffix(a) for name in weights if name.endswith(a)]:
        down = weights[layer + a]
        up = scale * weights[layer + b].float()
        if keep_adapters:
            plain[layer + A], plain[layer + B] = down, up
        else:
            base = plain[f"{layer}.weight"]
            plain[f"{layer}.weight"] = (base.float() + up @ down.float()).to("cpu", base.dtype)
    return plain


def scale_of(policy: nn.Module) -> float:
    """The scale of the learnt adapters."""
    return float(adapted_layers(policy)[0].scaling[LEARNT])
