"""Weights of OpenVLA folders: one safetensors file or its shards, one tensor at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ceed_vla.backbones.files import read_json
from ceed_vla.errors import CheckpointError

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, one or its shards.

    Raises:
        CheckpointError: None, or a shard that the index names is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = ", ".join(sorted(file.name for pattern in PICKLED for file in folder.glob(pattern)))
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}"
            + (
                f", only {pickled}; pickled files can run code when they are read: save them as safetensors first."
                if pickled
                else "."
            )
        )
    shards = sorted(set((read_json(folder / INDEX).get("weight_map") or {}).values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing) or 'all shards'}, which {INDEX} names; copy them too."
        )
    return [folder / name for name in shards]


def read_weights(files: list[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) of every weight, one at a time.

    Raises:
        CheckpointError: A file is truncated or damaged.
    """
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (not a mapping)
                    yield file, name, weights.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); copy it again.") from error


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> list[str]:
    """Read a folder's weights into a model, converted to the model's types.

    Returns:
        The model's names of its weights.

    Raises:
        CheckpointError: Weights that are missing, damaged or of other sizes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"The weights of this policy lie in {str(folder)!r}, which is no folder (any more); correct "
            "backbone.path in the checkpoint's config.json."
        )
    own, read, unknown = model.state_dict(), set(), []
    for file, published, tensor in read_weights(weight_files(folder)):
        name = published.replace(".scale_factor", ".gamma")  # the published code renames timm's LayerScale
        if name not in own:
            if not name.endswith("rotary_emb.inv_freq"):  # older transformers saved what is computed
                unknown.append(published)
            continue
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: {published} has shape {tuple(tensor.shape)}, config.json describes "
                f"{tuple(own[name].shape)}; configuration and weights belong to different models."
            )
        own[name].copy_(tensor)
        read.add(name)
    tensors = {own[name].data_ptr() for name in read}
    missing = sorted(
        name for name in own.keys() - read if own[name].data_ptr() not in tensors
    )  # a tied head is not
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights that config.json describes (the first is {missing[0]}); a shard "
            "or a tower is missing."
        )
    if unknown:
        logger.warning("%s has %d weights that the model does not use: %s", folder, len(unknown), unknown[0])
    return sorted(own)
