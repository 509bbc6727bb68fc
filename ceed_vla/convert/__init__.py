"""`ceed-vla convert`: make a checkpoint of this project from a model as it was published; a file a kind."""

from __future__ import annotations

import importlib
from pathlib import Path

from ceed_vla.convert.config import ConvertConfig as ConvertConfig
from ceed_vla.errors import ConfigError


def convert(config: ConvertConfig) -> str:
    """Convert a model, and return a line about what was written."""
    if not config.output_dir:
        raise ConfigError("No --output_dir; name the folder for the checkpoint.")
    output = Path(config.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is no empty folder; choose another --output_dir.")
    line: str = importlib.import_module(f"{__name__}.{config.from_}").write(config)
    return line
