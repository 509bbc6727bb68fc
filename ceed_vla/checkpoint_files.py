"""Checkpoints as files: read and check config.json, and hash the weights."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ceed_vla.checkpoints.manifest import SEALED, config_text, read_config, unsealed_bytes
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import short
from ceed_vla.files import count_values, read_json
from ceed_vla.folders import CONFIG, MANIFEST, WEIGHTS, base_folder, resolve_checkpoint

FORMAT_VERSION = 3
MOST_VALUES = 50_000  # in config.json; that of a policy has a few hundred


def read_values(folder: Path) -> dict[str, Any]:
    """Read and check config.json.

    Raises:
        CheckpointError: It is of another policy or format, or lacks a decoding setting; defaults
            never replace decoding settings.
    """
    file = folder / CONFIG
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
    if path := base_path(values):
        values["backbone"]["path"] = str(base_folder(folder, path))
    return values


def base_path(values: Mapping[str, Any]) -> str:
    """The path to weights by reference, as config.json has it; empty if there is none."""
    path = values["backbone"].get("path") if is_reference(values) else ""
    return path if isinstance(path, str) else ""


def is_reference(values: Mapping[str, Any]) -> bool:
    """Whether the values of config.json refer to weights in another folder."""
    backbone = values.get("backbone")
    return isinstance(backbone, dict) and backbone.get("weights") == "reference"


def placeless(values: dict[str, Any]) -> dict[str, Any]:
    """The values of config.json without the path to weights by reference."""
    if not is_reference(values):
        return values
    backbone = {name: value for name, value in values["backbone"].items() if name != "path"}
    return {**values, "backbone": backbone}


def place_base(config: Any, folder: Path) -> None:
    """Let a configuration that LeRobot read from a checkpoint refer to the checkpoint's base.

    LeRobot's reader takes a relative path as one in the working directory.
    """
    path = base_path(read_config(folder))
    if path and config.backbone.path == str(Path(path).absolute()):  # no flag names another one
        config.backbone.path = str(base_folder(folder, path))


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

    They identify a checkpoint in reports and trajectories. Of weights in another folder only the
    settings of the backbone that refers to them are hashed, without the path of that folder.
    """
    folder = resolve_checkpoint(path)
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    values = placeless(read_json(folder / CONFIG))
    if is_reference(values):
        digest.update(json.dumps(values["backbone"], sort_keys=True).encode())
    return digest.hexdigest()[:12]


def fingerprint(path: str | Path) -> str:
    """First 12 hex digits of a hash of a checkpoint: of its weights, and of all settings with them.

    As for `weights_hash`, the place of weights in another folder does not count.
    """
    digest = hashlib.sha256(weights_hash(path).encode())
    for file in sorted(resolve_checkpoint(path).glob("*")):
        if file.suffix in (".json", ".safetensors") and file.name not in (WEIGHTS, MANIFEST):
            digest.update(file.name.encode() + _identifying_bytes(file))
    return digest.hexdigest()[:12]


def _identifying_bytes(file: Path) -> bytes:
    """The content of a checkpoint's file, without what may differ between equal checkpoints."""
    if file.name == CONFIG and is_reference(values := read_json(file)):
        values.pop(SEALED, None)
        return config_text(placeless(values)).encode()
    return unsealed_bytes(file)
