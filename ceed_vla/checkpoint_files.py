"""Checkpoints as files: read and check config.json, and hash the weights."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ceed_vla.checkpoints.manifest import read_config
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import short
from ceed_vla.files import count_values, read_json
from ceed_vla.folders import WEIGHTS, resolve_checkpoint

FORMAT_VERSION = 3
MOST_VALUES = 50_000  # in config.json; that of a policy has a few hundred


def read_values(folder: Path) -> dict[str, Any]:
    """Read and check config.json.

    Raises:
        CheckpointError: It is of another policy or format, or lacks a decoding setting; defaults
            never replace decoding settings.
    """
    file = folder / "config.json"
    values = read_config(folder)
    count = count_values(values)
    if count > MOST_VALUES:
        raise CheckpointError(
            f"{file} has {count} values; a policy's settings have at most {MOST_VALUES}."
        )
    kind = values.get("type")
    tokens = values.get("action_tokens")
    if kind != "ceed_vla":
        raise CheckpointError(
            f"{folder} holds a policy of type {kind!r}; this loader reads type 'ceed_vla'."
        )
    if isinstance(tokens, dict) and tokens.get("path") and not tokens.get("symbols"):
        raise CheckpointError(
            f"{folder}: action_tokens in config.json are not fitted; copy it again."
        )
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version {short(values.get('format_version'))}, this version reads "
            f"{FORMAT_VERSION}. Make the checkpoint again, or use the version that wrote it."
        )
    _check_packages(folder, values.get("packages", []))
    found = values.get("decoding")
    decoding: dict[str, Any] = found if isinstance(found, dict) else {}
    lost = sorted({item.name for item in fields(DecodingConfig)} - decoding.keys())
    if "delta_dims" not in values:
        raise CheckpointError(
            f"{folder}: config.json lacks 'delta_dims'; copy the checkpoint again."
        )
    if lost:
        raise CheckpointError(
            f"{folder}: decoding in config.json lacks {lost[0]!r}; copy the checkpoint again."
        )
    _resolve_base(values.get("backbone"), folder)
    return values


def _resolve_base(backbone: Any, folder: Path) -> None:
    """Make the path to weights by reference absolute: it may be relative to the checkpoint."""
    path = backbone.get("path") if isinstance(backbone, dict) else None
    if isinstance(path, str) and path and backbone.get("weights") == "reference":
        backbone["path"] = str((folder / path).absolute())


def check_kinds(values: Any, read: Any, name: str = "it") -> None:
    """Raise `ConfigError` if JSON `values` were `read` as another type.

    For example true as 1, or a string as a number.
    """
    if isinstance(values, dict) and isinstance(read, dict):
        for key in values.keys() & read.keys():
            check_kinds(values[key], read[key], key)
    elif isinstance(values, list) and isinstance(read, list | tuple):
        for value, own in zip(values, read, strict=False):
            check_kinds(value, own, name)
    elif None not in (values, read) and any(
        isinstance(values, k) != isinstance(read, k) for k in (bool, str)
    ):
        raise ConfigError(f"{name} is {short(values)}, which is read as {short(read)}")


def _check_packages(folder: Path, packages: object) -> None:
    """Refuse a checkpoint that needs packages which are not imported.

    Loading a checkpoint never imports packages by itself.
    """
    names = packages if isinstance(packages, list) else [packages]
    missing = [
        str(name)[:60] for name in names if not isinstance(name, str) or name not in sys.modules
    ]
    if missing:
        raise CheckpointError(
            f"{folder} needs a package that is not imported: {short(', '.join(missing))}. If you "
            f"trust it, name it: --discover_packages_path={','.join(missing)} (policy_node: "
            "discover_packages), or import it first."
        )


def weights_hash(path: str | Path) -> str:
    """First 12 hex digits of the SHA-256 of the weights.

    They identify a checkpoint in reports and trajectories. If the weights are stored elsewhere, the
    configured reference is hashed instead of them.
    """
    folder = resolve_checkpoint(path)
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    backbone = read_json(folder / "config.json").get("backbone")
    if isinstance(backbone, dict) and backbone.get("weights") == "reference":
        digest.update(json.dumps(backbone, sort_keys=True).encode())
    return digest.hexdigest()[:12]
