"""Weights of a run as files: what a resumable state keeps, and what a checkpoint is made of."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_model
from torch import Tensor, nn

from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from training.adapters import plain_weights, scale_of


def weights(
    accelerator: Accelerator, model: nn.Module, policy: CeedVLAPolicy, adapted: bool
) -> dict[str, Tensor] | None:
    """The policy's weights where it cannot write them by itself: sharded ones, or with adapters. All processes call.

    Returns:
        Weights by the policy's own names; None where the policy can, and on processes that write nothing.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if not sharded and not adapted:
        return None
    found: dict[str, Tensor] = policy.state_dict()
    if sharded:
        prefix = next(name for name, module in model.named_modules() if module is policy) + "."
        whole = accelerator.get_state_dict(model)  # gathered by all, given to the first
        found = {name.removeprefix(prefix): w for name, w in whole.items() if name.startswith(prefix)}
    if not accelerator.is_main_process:
        return None
    if adapted:
        found = plain_weights(found, scale_of(policy), keep_adapters=bool(policy.referenced))
    return _distinct(found)


def _distinct(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without second names of tied weights, which safetensors refuses."""
    first: dict[tuple[int, int], str] = {}
    for name, weight in found.items():
        first.setdefault((weight.data_ptr(), weight.numel()), name)
    return {name: found[name] for name in first.values()}


def keep_in_states(accelerator: Accelerator, adapted: bool) -> None:
    """Say what states hold: weights by the names that they have in one process, so that any number can go on.

    Args:
        accelerator: Saves and loads the states.
        adapted: Only the weights that learn; beside a large frozen base these are few.
    """

    def save(models: list[nn.Module], state_dicts: list[dict[str, Tensor]], folder: str) -> None:
        del folder
        for model, state in zip(models, state_dicts, strict=True):
            plain = accelerator.unwrap_model(model)
            learns = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
            prefix = "" if plain is model else "module."
            found = {name.removeprefix(prefix): weight for name, weight in state.items()}
            state.clear()
            state.update({name: w for name, w in found.items() if not adapted or name in learns})

    def load(models: list[nn.Module], folder: str) -> None:
        while models:  # accelerate loads those that are left
            plain, file = accelerator.unwrap_model(models.pop()), Path(folder) / "model.safetensors"
            missing, unknown = load_model(plain, file, strict=not adapted)
            learns = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
            if unknown or learns & set(missing):
                raise KeyError(f"{file} has other weights: {sorted(set(unknown) | learns & set(missing))[0]}")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
