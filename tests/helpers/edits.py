"""Changes to the files of a checkpoint, as a user may make them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def unsealed(folder: Path) -> Path:
    """Make the checkpoint in `folder` one that never had a manifest; return the folder."""
    (folder / "manifest.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("sealed") is True
    (folder / "config.json").write_text(json.dumps(values, indent=4))
    return folder


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    tensors = {
        **load_file(file),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    save_file({name: value for name, value in tensors.items() if value is not None}, file)


def step(pipeline: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in pipeline["steps"] if entry["registry_name"] == name)
