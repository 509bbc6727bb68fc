"""Weights of a run as files: those of resumable states, and those of checkpoints."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.other import load as load_numbers  # no code: weights_only
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata

from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.training.adapters import plain_weights, scale_of


def weights(
    accelerator: Accelerator, model: nn.Module, policy: CeedVLAPolicy, adapted: bool
) -> dict[str, Tensor] | None:
    """Gather the policy's weights if it cannot write them itself: sharded, or with adapters.

    All processes must call this.

    Returns:
        Weights by the policy's own names; None if the policy can write them, and in processes that
        do not write.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if not sharded and not adapted:
        return None
    found: dict[str, Tensor] = policy.state_dict()
    if sharded:
        prefix = next(name for name, module in model.named_modules() if module is policy) + "."
        whole = accelerator.get_state_dict(model)  # gathered from all, for the main process
        found = {
            name.removeprefix(prefix): w for name, w in whole.items() if name.startswith(prefix)
        }
    if not accelerator.is_main_process:
        return None
    return (
        plain_weights(found, scale_of(policy), keep_adapters=bool(policy.referenced))
        if adapted
        else found
    )


def keep_in_states(accelerator: Accelerator, adapted: bool) -> None:
    """Register hooks that store weights under their names in a single process.

    So any number of processes can resume from a state. With adapters (`adapted`), states hold only
    the weights that learn, which are few next to a large frozen base.
    """

    def save(models: list[nn.Module], state_dicts: list[dict[str, Tensor]], _: str) -> None:
        for model, state in zip(models, state_dicts, strict=True):
            plain = accelerator.unwrap_model(model)
            learns = {
                name for name, parameter in plain.named_parameters() if parameter.requires_grad
            }
            prefix = "" if plain is model else "module."
            found = {name.removeprefix(prefix): weight for name, weight in state.items()}
            state.clear()
            state.update({name: w for name, w in found.items() if not adapted or name in learns})

    def load(models: list[nn.Module], folder: str) -> None:
        while models:  # accelerate would load the models that remain in the list
            plain = accelerator.unwrap_model(models.pop())
            file = Path(folder) / "model.safetensors"
            own = plain.state_dict()
            for name, weight in load_file(file).items():
                if name in own and (
                    weight.dtype != own[name].dtype or not torch.isfinite(weight).all()
                ):
                    raise ValueError(f"{name} in {file} is {weight.dtype}, or not finite")
            missing, unknown = load_model(plain, file, strict=not adapted)
            learns = {
                name for name, parameter in plain.named_parameters() if parameter.requires_grad
            }
            if unknown or learns & set(missing):
                raise KeyError(
                    f"{file} has other weights: {sorted(set(unknown) | learns & set(missing))[0]}"
                )

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


# ---- checks that accelerate lacks ----------------------------------------------------------------


def check_random_state(folder: Path, process: int) -> None:
    """Raise unless the random state was restored from a state's folder; accelerate only logs it."""
    file = folder / f"random_states_{process}.pkl"
    saved = load_numbers(file)
    numpy_state: Any = np.random.get_state()
    same = torch.equal(torch.get_rng_state(), saved["torch_manual_seed"])
    same &= random.getstate() == saved["random_state"]
    same &= all(
        np.array_equal(a, b) for a, b in zip(numpy_state, saved["numpy_random_seed"], strict=True)
    )
    # a run may move to the CPU and back
    if torch.cuda.is_available() and "torch_cuda_manual_seed" in saved:
        pairs = zip(torch.cuda.get_rng_state_all(), saved["torch_cuda_manual_seed"], strict=False)
        same &= all(torch.equal(a, b) for a, b in pairs)
    if not same:
        raise ValueError(f"the random state in {file} was not restored")


def optimizer_settings(optimizers: Iterable[Any]) -> list[dict[str, Any]]:
    """Settings of all parameter groups, except the learning rate, which every step sets."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [
        {name: group[name] for name in group if name not in ("params", "lr")} for group in groups
    ]


def check_optimizers(
    optimizers: Sequence[Any], settings: Sequence[dict[str, Any]], step: int
) -> None:
    """Raise unless optimisers have their `settings`, and valid state of their weights at `step`."""
    remembered_steps = [int(m["step"]) for o in optimizers for m in o.state.values() if "step" in m]
    if remembered_steps and max(remembered_steps) != step:
        raise ValueError(f"the optimiser's step is {max(remembered_steps)}, not {step}")
    for now, own in zip(optimizer_settings(optimizers), settings, strict=True):
        if changed := [name for name, value in own.items() if now.get(name) != value]:
            raise ValueError(
                f"the optimiser's {changed[0]} is {now.get(changed[0])}, not {own[changed[0]]}"
            )
    for optimizer in optimizers:
        for parameter, remembered in optimizer.state.items():
            for name, value in remembered.items():
                if not isinstance(value, Tensor) or not torch.isfinite(value).all():
                    raise ValueError(f"the optimiser's {name} is not finite")
                if name in ("step", "exp_avg_sq") and (value < 0).any():
                    raise ValueError(f"the optimiser's {name} is negative")
                if value.ndim and value.shape != parameter.shape:
                    raise ValueError(
                        f"the optimiser's {name} is {tuple(value.shape)}, not "
                        f"{tuple(parameter.shape)}"
                    )


_PLAIN = {
    "collections": "OrderedDict",
    "pathlib": "PosixPath",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
}


class _Metadata(pickle.Unpickler):
    """Unpickles only the classes that torch uses to describe sharded weights."""

    def find_class(self, module: str, name: str) -> Any:
        known = module in (metadata.__name__, *_PLAIN)
        found = super().find_class(module, name) if known else None
        own = module == metadata.__name__ and getattr(found, "__module__", None) == module
        if own or (known and name == _PLAIN.get(module)) or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} does not describe sharded weights")


def check_metadata(folder: Path) -> None:
    """Raise if the description of sharded weights, which torch unpickles, has other classes."""
    for file in folder.glob("*/.metadata"):
        with file.open("rb") as opened:
            _Metadata(opened).load()
