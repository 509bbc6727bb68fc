"""Writes modules of torch as graphs of ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ceed_vla.edge.settings import MOST_GRAPH
from ceed_vla.errors import CheckpointError, ConfigError, raised_as

OPSET = 20


def write_graph(
    file: Path,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, dict[int, Any]] | None = None,
) -> None:
    """Write one module.

    Args:
        file: The graph's file.
        module: The module.
        inputs: Examples of its arguments, in their order.
        outputs: Names of its results.
        dynamic: Input -> its axes whose length varies.

    Raises:
        CheckpointError: torch cannot export it.
        ConfigError: Its weights do not fit into one file.
    """
    shapes = None if dynamic is None else tuple(dynamic.get(name) for name in inputs)
    with (
        raised_as(CheckpointError, f"{file.name} cannot be exported", "report the checkpoint."),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
        assert program is not None
    weights = program.model.graph.initializers.values()  # of the module, those that it uses
    size = sum(own.const_value.nbytes for own in weights if own.const_value is not None)
    if size > MOST_GRAPH:
        raise ConfigError(
            f"{file.name} would have {size / 1e9:.1f} GB of weights; exports support at most "
            f"{MOST_GRAPH / 1e9:.1f} per graph. Run it with torch."
        )
    program.save(str(file))


def quantise(file: Path) -> None:
    """Quantise the matrices of a graph to int8, in its file.

    Activations are quantised when the graph runs, each with its own range.

    Raises:
        CheckpointError: onnxruntime cannot quantise it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = file.with_name(f"float32-{file.name}")
    file.rename(whole)
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)  # it advises a preparation that these graphs do not need
    try:
        with raised_as(CheckpointError, f"{file.name} cannot be quantised", "use float32."):
            quantize_dynamic(
                str(whole),
                str(file),
                per_channel=True,
                weight_type=QuantType.QInt8,
                # Without VNNI, products of 8 bits are summed in 16 bits, and would saturate.
                reduce_range=True,
                op_types_to_quantize=["MatMul"],
            )
    finally:
        root.setLevel(before)
    whole.unlink()
