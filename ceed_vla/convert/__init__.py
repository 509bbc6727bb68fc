"""`ceed-vla convert`: make a checkpoint from a published model; one file for each kind of model."""

from __future__ import annotations

import importlib

from ceed_vla.convert.config import ConvertConfig as ConvertConfig
from ceed_vla.outputs import claimed_folder


def convert(config: ConvertConfig) -> str:
    """Convert a model, and return a line about what was written."""
    with claimed_folder("output_dir", config.output_dir, (), ()):
        line: str = importlib.import_module(f"{__name__}.{config.from_}").write(config)
    return line
