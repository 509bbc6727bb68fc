"""Run a model as if on a GPU: fake tensors know their device, and mixing devices raises.

No number is computed, so values that a model reads on the host are unknown; a test sets them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def claimed(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """A fake tensor like `value` on the GPU."""
    with mode:
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")


def move(mode: FakeTensorMode, module: nn.Module) -> None:
    """Make all parameters and buffers of a module fake tensors on the GPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(claimed(mode, parameter), False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = claimed(mode, buffer)


@contextmanager
def no_padding() -> Iterator[None]:
    """Make every fake tensor true within the block: no prompt is padded, and all checks pass."""
    read = FakeTensor.__bool__ if "__bool__" in vars(FakeTensor) else Tensor.__bool__
    FakeTensor.__bool__ = lambda self: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        FakeTensor.__bool__ = read  # type: ignore[method-assign]


def all_claimed(mode: FakeTensorMode, value: Any) -> Any:
    """Return `value` with all its tensors on the GPU."""
    if isinstance(value, Tensor):
        return claimed(mode, value)
    if isinstance(value, dict):
        return {name: all_claimed(mode, part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(all_claimed(mode, part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: getattr(value, item.name) for item in fields(value)}
        return replace(value, **all_claimed(mode, parts))
    return value


@torch.no_grad()
def stays_on_its_device(
    model: Any, observation: dict[str, Any], *, reads_on_host: str = ""
) -> None:
    """Assert that prefill and block forwards of a model on the GPU make no tensor elsewhere.

    Args:
        model: Model of a family; it is moved and unusable afterwards.
        observation: Its input.
        reads_on_host: Why `embed_prefix` cannot run on tensors without numbers; if set, it runs on
            the CPU, and its result is moved.
    """
    mode = FakeTensorMode()
    given = model.embed_prefix(observation) if reads_on_host else observation
    move(mode, model)
    inputs = all_claimed(mode, given)
    with mode, no_padding():
        prefix = model.prefill_embeddings(inputs) if reads_on_host else model.prefill(inputs)
        assert prefix.logits.device.type == "cuda"
        rows = len(prefix.logits)
        for k in (model.block_length - 1, 1):
            tokens = torch.zeros(rows, k, dtype=torch.int64, device="cuda")
            scores = model.block_logits(prefix, tokens)
            assert scores.device.type == "cuda"
            assert scores.shape == (rows, k, model.vocabulary_size)
