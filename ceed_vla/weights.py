"""Weights in safetensors files, validated against file and model before they are used."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ceed_vla.errors import CheckpointError, root_cause
from ceed_vla.files import plain_name, read_json
from ceed_vla.folders import WEIGHTS
from ceed_vla.lora import is_adapter

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SAMPLES = 256  # blocks of a file in its sample
_BLOCK = 4096  # [bytes]
HEADS = ("head", "lm_head")  # modules that compute the logits
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file, whose header is validated against the file's size.

    Raises:
        CheckpointError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The weights {file} do not load ({root_cause(error)}); copy them again."
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Find the safetensors file of a folder, or its shards.

    Raises:
        CheckpointError: There is none, or a shard is missing.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"The weights of this policy are in {str(folder)!r}, but there is no such folder; "
            "correct backbone.path in the checkpoint's config.json, and run `ceed-vla seal` on "
            "the checkpoint."
        )
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = ", ".join(
            sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        )
        only = (
            f", only {pickled}; pickled files can run code when they are read, so save them as "
            "safetensors first"
        )
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}{only if pickled else ''}."
        )
    found = read_json(folder / INDEX).get("weight_map")
    named = found.values() if isinstance(found, dict) else ()
    shards = sorted({plain_name(name, f"{folder / INDEX}: a shard") for name in named})
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing) or 'all shards'}, which {INDEX} names; copy it "
            "too."
        )
    return [folder / name for name in shards]


def sample_hash(files: Sequence[Path]) -> str:
    """Hash of the files' sizes and of evenly spaced blocks of them.

    It distinguishes models whose weights differ, and reads about a megabyte.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as content:
            for block in range(_SAMPLES):
                content.seek(max(0, size - _BLOCK) * block // (_SAMPLES - 1))
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()[:16]


def check_sizes(files: Sequence[Path], layers: int, numbers: int) -> None:
    """Raise `CheckpointError` if a configuration describes a larger model than the weights.

    Args:
        files: The file of the weights, or all shards.
        layers: Layers of the configuration, which must not exceed the number of tensors.
        numbers: Fewest weights of the configuration, which must not exceed those in the files.
    """
    shapes = []
    for file in files:
        with opened(file) as tensors:
            names = tensors.keys()
            shapes += [tensors.get_slice(name).get_shape() for name in names]
    held = sum(math.prod(shape) for shape in shapes)
    if layers > len(shapes) or numbers > held:
        raise CheckpointError(
            f"{files[0]}: the configuration describes {layers:,} layers with at least {numbers:,} "
            f"weights, but the file has {len(shapes):,} tensors with {held:,}; they belong to "
            "different models. Copy both from the same checkpoint."
        )


@torch.no_grad()
def copy_weights(
    module: nn.Module,
    files: Sequence[Path],
    rename: Callable[[str], str] = str,
    skip: Callable[[str], bool] = lambda name: False,
) -> tuple[list[str], list[str]]:
    """Copy weights from files into a module, one tensor at a time, converted to the module's
    dtypes.

    Args:
        module: The module.
        files: Safetensors files.
        rename: Maps a name in a file to the module's name.
        skip: Whether a name in a file is ignored.

    Returns:
        The module's weights that are missing in the files, unless they are tied to one that is not;
        and the names in the files that the module lacks.

    Raises:
        CheckpointError: A tensor has another shape or kind or is not finite, tied weights differ,
            or a head is all zeros.
    """
    own = module.state_dict()
    read = set()
    unknown = []
    matrices = 0
    zeros = []
    written: dict[int, str] = {}  # address of a copied tensor -> its name; tied weights share it
    for file in files:
        with opened(file) as tensors:
            for published in tensors.keys():  # noqa: SIM118  (not a mapping)
                name = rename(published)
                if skip(published):
                    continue
                if name not in own:
                    unknown.append(published)
                    continue
                place = own[name]
                _check_entry(file, published, tensors.get_slice(published), place)
                tensor = tensors.get_tensor(published)
                tied = written.setdefault(place.data_ptr(), name) != name and place.numel()
                if tied and not torch.equal(place, tensor.to(place)):
                    raise CheckpointError(
                        f"The weights {file} do not load: config.json ties {published} to "
                        f"{written[place.data_ptr()]}, but they differ in the file; configuration "
                        "and weights belong to different models."
                    )
                place.copy_(tensor)
                read.add(name)
                if place.is_floating_point() and place.numel():
                    empty = check_finite(file, published, place)
                    matrices += place.ndim > 1
                    zeros += [published] if empty and place.ndim > 1 else []
    scoring = [name for name in zeros if name.split(".")[-2:-1] and name.split(".")[-2] in HEADS]
    if scoring or (zeros and len(zeros) == matrices):
        raise CheckpointError(f"{files[0]}: {(scoring or zeros)[0]} is all zeros. Copy it again.")
    pointers = {own[name].data_ptr() for name in read}
    missing = sorted(name for name in own.keys() - read if own[name].data_ptr() not in pointers)
    return missing, sorted(unknown)


def _check_entry(file: Path, name: str, found: Any, place: Tensor) -> None:
    """Raise `CheckpointError` if shape or kind of a tensor differ, before it is read."""
    shape = tuple(found.get_shape())
    kind = found.get_dtype()
    if shape != tuple(place.shape):
        raise CheckpointError(
            f"The weights {file} do not load: {name} has shape {shape}, but config.json describes "
            f"{tuple(place.shape)}; configuration and weights belong to different models."
        )
    if (kind in _FLOATS) != place.is_floating_point():
        raise CheckpointError(
            f"The weights {file} do not load: {name} is of type {kind}, but the model's is "
            f"{place.dtype}; copy them again."
        )


def check_finite(file: Path | str, name: str, weight: Tensor) -> bool:
    """Whether a weight is all zeros; `CheckpointError` if it is not finite."""
    values = weight.detach()
    least, most = (
        float(end) for end in (values.float() if values.element_size() < 2 else values).aminmax()
    )
    if not (math.isfinite(least) and math.isfinite(most)):
        raise CheckpointError(
            f"The weights {file} are damaged: {name} has NaN or infinity ({weight.dtype})."
        )
    return least == most == 0.0


def check_weights(module: nn.Module, source: Path | str) -> None:
    """Raise `CheckpointError` for weights that are not finite; messages name their `source`."""
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.numel():
            check_finite(source, name, weight)


def check_floating(files: Sequence[Path]) -> None:
    """Raise `CheckpointError` for integer weights, which a loader would convert silently."""
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                if (
                    name.endswith((".weight", ".bias"))
                    and (kind := tensors.get_slice(name).get_dtype()) not in _FLOATS
                ):
                    raise CheckpointError(
                        f"The weights {file} do not load: {name} is of type {kind}; copy them "
                        "again."
                    )


def load_weights(policy: Any, folder: Path, strict: bool = True) -> None:
    """Read a checkpoint's weights into a policy that was built from its configuration.

    Args:
        policy: The policy. Weights that it refers to (`policy.referenced`) may be missing.
        folder: The checkpoint.
        strict: Whether missing and additional weights are an error; otherwise they are logged.

    Raises:
        CheckpointError: The weights do not load.
    """
    file = folder / WEIGHTS
    missing, unknown = copy_weights(policy, [file], skip=is_adapter)
    with opened(file) as tensors:
        own = set(tensors.keys())
        policy.adapters = {name: tensors.get_tensor(name) for name in own if is_adapter(name)}
    for name, weight in policy.adapters.items():
        if not weight.is_floating_point() or weight.ndim != 2 or not weight.numel():
            raise CheckpointError(
                f"The weights {file} do not load: {name} is {weight.dtype} {weight.shape}."
            )
        check_finite(file, name, weight)
    lost = set(missing) - policy.referenced
    policy.referenced -= own
    for kind, names in (("misses", lost), ("has unknown", set(unknown))):
        if names and strict:
            raise CheckpointError(
                f"The weights {file} do not load: the checkpoint {kind} "
                f"{', '.join(sorted(names)[:8])}; copy it again or rebuild it."
            )
        if names:
            logger.warning(
                "The checkpoint %s %s weights: %s", folder, kind, ", ".join(sorted(names))
            )


def save_weights(policy: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write a policy's weights, without frozen weights that it refers to.

    Args:
        policy: The policy.
        folder: The checkpoint.
        state_dict: Weights to write instead of the policy's, for example gathered over processes.
    """
    from safetensors.torch import save_file, save_model

    file = folder / WEIGHTS
    if state_dict is None and not policy.referenced:
        save_model(policy, str(file))
        return
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    referenced = policy.referenced - trained
    weights = policy.state_dict() if state_dict is None else state_dict
    own = {name: tensor for name, tensor in weights.items() if _weight(name) not in referenced}
    # Tied weights are written under the first of their names, as safetensors allows only one.
    first: dict[tuple[int, int], str] = {}
    for name, weight in own.items():
        first.setdefault((weight.data_ptr(), weight.numel()), name)
    save_file(
        {name: own[name].contiguous() for name in first.values()}, file, metadata={"format": "pt"}
    )


def _weight(name: str) -> str:
    """The weight that an entry belongs to: itself, except for the scales and states of
    bitsandbytes.
    """
    module, _, last = name.rpartition(".")
    if last in ("SCB", "weight_format"):
        return f"{module}.weight"
    return f"{name.partition('.weight.')[0]}.weight" if ".weight." in name else name
