"""Sessions of onnxruntime for the graphs of an export."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ceed_vla.edge.settings import ExportSettings, graph_names, read_part
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.scheduling import Placement

_Shapes = dict[str, list[Any] | None]  # input -> shape; None for any


def open_sessions(folder: Path, settings: ExportSettings, placement: Placement) -> dict[str, Any]:
    """Open a session for every graph of an export.

    Args:
        folder: The export.
        settings: Its settings.
        placement: Threads of a session, and their cores.

    Raises:
        CheckpointError: A graph is damaged, has operators that onnxruntime does not have, refers to
            other files, or has other inputs and outputs.
    """
    sessions = {}
    for graph in graph_names(settings):
        name = f"{graph}.onnx"
        content = read_part(folder, name, settings.files[name])
        # Stems of several cameras run beside each other.
        alone = name.startswith("stem") and len(settings.images.cameras) > 1
        options = _options(1 if alone else placement.threads, placement.cores)
        with raised_as(
            CheckpointError,
            f"{folder / name} cannot be loaded by onnxruntime {onnxruntime.__version__}",
            "export the checkpoint again.",
        ):
            session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        sessions[graph] = session
    _check_shapes(folder, settings, sessions)
    return sessions


def _options(threads: int, cores: Sequence[int]) -> Any:
    """Options of a session that has `threads` threads: the one that calls it, and others on all
    `cores` but the first.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if cores and threads > 1:
        numbers = ";".join(str(core + 1) for core in cores[1:])  # it counts cores from 1
        options.add_session_config_entry("session.intra_op_thread_affinities", numbers)
    # Threads spin while a graph runs, and stop with it, so that they leave their cores to others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A graph in memory may name files for its weights, which are looked for here: nowhere.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.devnull
    )
    options.log_severity_level = 4  # errors are raised as well
    return options


def run(session: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a session; errors of onnxruntime become `CheckpointError`."""
    with raised_as(CheckpointError, "The exported graph does not run", "export again."):
        outputs: list[np.ndarray] = session.run(None, inputs)
    return outputs


def _check_shapes(folder: Path, settings: ExportSettings, sessions: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the graphs have the inputs and outputs that the settings
    imply.
    """
    inputs, outputs = _wanted(settings)
    for name, shapes in inputs.items():
        session = sessions[name]
        found = {item.name: list(item.shape) for item in session.get_inputs()}
        wrong = {
            key: found.get(key)
            for key, shape in shapes.items()
            if key not in found or shape not in (None, found[key])
        }
        more = found.keys() - shapes
        returned = [list(item.shape) for item in session.get_outputs()]
        if wrong or more or not _as_wanted(returned, outputs[name]):
            raise CheckpointError(
                f"{folder / name}.onnx has other inputs or outputs than the settings describe "
                f"({wrong or sorted(more) or returned}); copy the whole folder again."
            )


def _as_wanted(found: list[list[Any]], wanted: list[list[Any]]) -> bool:
    """Whether shapes equal the wanted ones, in which None allows any length."""
    return len(found) == len(wanted) and all(
        len(a) == len(b) and all(y in (None, x) for x, y in zip(a, b, strict=True))
        for a, b in zip(found, wanted, strict=True)
    )


def _wanted(settings: ExportSettings) -> tuple[dict[str, _Shapes], dict[str, list[list[Any]]]]:
    """The inputs and the outputs of every graph, by its name."""
    cache, images = settings.cache, settings.images
    held = [cache.layers, cache.heads, "P", cache.width]
    state = [1, settings.state.size]
    stems: dict[str, _Shapes] = {
        f"stem_{stem}": {"image": [1, 3, *images.read_size(index)]}
        for index, stem in enumerate(images.stems)
    }
    tokens: list[Any] = [1, None, None]  # of a camera, or embeddings
    outputs = {stem: [tokens] for stem in stems}
    if settings.text.stem_vocabulary:
        words = [1, settings.text.stem_words]
        stems = {name: {**shapes, "words": words} for name, shapes in stems.items()}
    slots: list[list[Any]] = [[1, None]] * 4
    new: list[Any] = [cache.layers, cache.heads, None, cache.width]
    if settings.family == "llama":
        wanted: dict[str, _Shapes] = {
            "prefix": {"words": [1, "L"], "state": state, "features": None},
            "embed": {"read": [1, "k"]},
            "layers": {"keys": held, "values": held, "embeds": None},
        }
        outputs |= {"prefix": [tokens], "embed": [tokens], "layers": [*slots, new, new]}
        return stems | wanted, outputs
    words = [1, settings.text.longest]
    features: _Shapes = dict.fromkeys(f"camera_{i}" for i in range(len(images.cameras)))
    wanted = {
        "trunk": {"words": words, "state": state, **features},
        "block": {"keys": held, "values": held, "committed": [1], "read": [1, "k"]},
    }
    stems = {name: {**shapes, "words": words} for name, shapes in stems.items()}
    before: list[Any] = [cache.layers, cache.heads, cache.prefix, cache.width]
    outputs |= {"trunk": [*slots, before, before], "block": [*slots, new, new]}
    return stems | wanted, outputs
