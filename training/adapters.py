"""LoRA through peft: which layers get adapters, what learns beside them, and what a checkpoint
keeps of them.

A student's adapter and its teacher sit on one copy of the base: `teacher_weights` switches the
student's adapter off, or to the one that the teacher was trained with.
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
from ceed_vla.fields import Checked, chosen, ranged, short
from ceed_vla.lora import A, B
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

logger = logging.getLogger(__name__)

LEARNT, KEPT = "learnt", "teacher"  # names of the adapters
HEADS = ("head", "lm_head")  # backbones read single rows of these weights
LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")


@dataclass
class LoRAConfig(Checked, prefix="lora."):
    """Low-rank adapters; needs `pip install "ceed_vla[vlm]"`.

    Attributes:
        rank: Rank of the adapters; 0 trains the weights themselves.
        alpha: A new adapter counts alpha / rank; 0 takes alpha = 2 * rank.
        dropout: Share of an adapter's inputs that training drops.
        targets: Linear layers with adapters: of the "language" model (what learns in distillation)
            or "all".
        train: Comma-separated modules of the teacher that learn in full beside, e.g.
            state,auxiliary,embed_tokens.
    """

    rank: int = ranged(0, "[0, 4096]")
    alpha: int = ranged(0, "[0, 1e6]")
    dropout: float = ranged(0.0, "[0, 1)")
    targets: str = chosen("language", ("language", "all"))
    train: str = "state,auxiliary"


def attach(policy: CeedVLAPolicy, config: LoRAConfig) -> None:
    """Put adapters on a policy: its own from its checkpoint, or new ones; only they learn, and
    ``config.train``.

    `ConfigError` if peft is missing, or the settings do not fit the policy or the adapters that it
    has.
    """
    _add(policy, LEARNT, _own_layers(policy, config.rank), config, config.targets)
    full = [name.strip() for name in config.train.split(",") if name.strip()]
    known = {part for name, _ in policy.backbone.named_parameters() for part in name.split(".")}
    if wrong := set(full) - known - {"state", "auxiliary"}:
        raise ConfigError(f"--lora.train has {short(min(wrong))}, which no weight has in its name.")
    for name, parameter in policy.backbone.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_(f".{LEARNT}." in name or any(part in full for part in parts))
    policy.adapters = {}


def attach_student(policy: CeedVLAPolicy, config: LoRAConfig) -> None:
    """Put a student's adapter beside the teacher's, as its copy, or new ones where it has none; see
    `attach`.
    """
    if config.targets != "language":
        raise ConfigError(
            f"lora.targets is {config.targets}; what makes the prefix stays frozen in distillation."
        )
    own = _own_layers(policy, config.rank)
    for name in (KEPT, LEARNT) if own else (LEARNT,):
        _add(policy, name, own, config, "language")
    policy.adapters = {}
    learning = set(policy.backbone.distillation_parameters())
    for parameter_name, parameter in policy.backbone.named_parameters():
        parameter.requires_grad_(f".{LEARNT}." in parameter_name and parameter_name in learning)
    select(policy, LEARNT)


def _own_layers(policy: CeedVLAPolicy, rank: int) -> list[str]:
    """Layers of the adapters that the policy came with."""
    ranks = {len(weight) for name, weight in policy.adapters.items() if name.endswith(A)}
    if ranks - {rank}:
        raise ConfigError(
            f"lora.rank is {rank}, but the checkpoint has adapters of rank "
            f"{', '.join(map(str, sorted(ranks)))}, which go on learning; set that rank."
        )
    return [
        n.removeprefix("backbone.").removesuffix(A)
        for n in sorted(policy.adapters)
        if n.endswith(A)
    ]


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
    policy: CeedVLAPolicy, name: str, own: list[str], config: LoRAConfig, targets: str
) -> None:
    """Put one adapter on the policy: on its `own` layers with the policy's own weights, or a new
    one on `targets`.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError('LoRA needs peft: pip install "ceed_vla[vlm]".') from error

    settings = PeftConfig(
        r=config.rank,
        # own ones hold their scale
        lora_alpha=(config.rank if own else config.alpha or 2 * config.rank),
        lora_dropout=config.dropout,
        target_modules=own or _layers(policy, targets),
    )
    inject_adapter_in_model(settings, policy.backbone, adapter_name=name)
    parameters = dict(policy.named_parameters())
    for parameter in (p for n, p in parameters.items() if f".{name}." in n):
        parameter.data = parameter.data.float()  # few, and they get small steps
    with torch.no_grad():
        for weight, value in policy.adapters.items():
            parameters[weight.removesuffix(".weight") + f".{name}.weight"].copy_(value)


# ---- switching -----------------------------------------------------------------------------------


def adapted_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def select(policy: nn.Module, name: str | None) -> None:
    """Let adapter `name` act, or none; `LEARNT` keeps its gradients whoever acts."""
    for layer in adapted_layers(policy):
        active = name is not None and name in layer.lora_A
        layer._disable_adapters = not active
        if active:
            layer._active_adapter = [name]


@contextmanager
def teacher_weights(student: nn.Module) -> Iterator[None]:
    """Let the student act as its teacher: without its adapter, or with the teacher's."""
    select(student, KEPT)
    try:
        yield
    finally:
        select(student, LEARNT)


# ---- checkpoints ---------------------------------------------------------------------------------


def plain_weights(
    weights: Mapping[str, Tensor], scale: float, keep_adapters: bool
) -> dict[str, Tensor]:
    """A checkpoint's weights from those of a policy with adapters, `weights` by peft's names.

    They get the names of a policy without adapters. The learnt adapters, times `scale`, come beside
    them under the names of `ceed_vla.lora` (`keep_adapters`), or are added to them.
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
    """Factor of the learnt adapters."""
    return float(adapted_layers(policy)[0].scaling[LEARNT])
