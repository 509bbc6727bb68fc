"""Published models from local folders: their files are validated, and no code of theirs runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, PreTrainedModel

from ceed_vla.backbones.transformers.config import least_sizes, read_architecture
from ceed_vla.backbones.transformers.step_files import LOCAL
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.files import read_json
from ceed_vla.weights import check_floating, check_sizes, check_weights, weight_files


def read_published(
    kind: Any, folder: Path, *, cut: Callable[[Any], None] | None = None, **options: Any
) -> PreTrainedModel:
    """Read a published model with all its weights.

    Args:
        kind: A class of transformers with ``from_pretrained``, such as `AutoModel`.
        folder: A folder with config.json and weights.
        cut: Reduces the folder's configuration to a part of the model, in place; then the folder
            may have weights that are not used.
        options: Arguments of ``from_pretrained``.

    Raises:
        CheckpointError: Weights are damaged, missing or of other sizes, or transformers would read
            other files than those that are validated here.
    """
    files = weight_files(folder)
    config = read_json(folder / "config.json")
    renamed = str(config.get("attribute_map"))  # it gives other keys that name
    if "transformers_weights" in config or "transformers_weights" in renamed:
        raise CheckpointError(
            f"{folder / 'config.json'} names a file of weights (transformers_weights), which is "
            "not read; remove the key, and name the file model.safetensors."
        )
    if adapters := sorted(file.name for file in folder.glob("adapter_*")):
        raise CheckpointError(
            f"{folder} has adapters ({adapters[0]}), which are not loaded; merge them into the "
            "weights, and remove their files."
        )
    # code that `auto_map` names is never run
    described = json.dumps({name: value for name, value in config.items() if name != "auto_map"})
    check_sizes(files, *least_sizes(read_architecture(described)))
    check_floating(files)
    with (
        raised_as(CheckpointError, f"{folder} does not load", "copy it again."),
        _reporting(cut is None),
    ):
        if cut is not None:
            options["config"] = AutoConfig.from_pretrained(folder, **LOCAL)
            cut(options["config"])
        loaded: Any = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **LOCAL, **options
        )
    model, report = loaded
    for problem in (
        "missing_keys",
        "mismatched_keys",
        *(("unexpected_keys",) if cut is None else ()),
    ):
        if names := sorted(str(name) for name in report.get(problem, ())):
            raise CheckpointError(
                f"{folder}: {len(names)} weights are {problem.removesuffix('_keys')} (the first is "
                f"{names[0]}); the weights belong to another configuration, or a file is missing. "
                "Copy the folder again."
            )
    check_weights(model, folder)
    return cast("PreTrainedModel", model)


@contextmanager
def _reporting(on: bool) -> Iterator[None]:
    """Unless `on`, hide transformers' report of weights that are left out."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    logger.setLevel(before if on else logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
