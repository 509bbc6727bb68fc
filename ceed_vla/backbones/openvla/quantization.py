"""8- and 4-bit linear layers through bitsandbytes; the weights are quantised when the model moves to a GPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ceed_vla.errors import ConfigError


def quantize(module: nn.Module, kind: str, device: str) -> None:
    """Replace the linear layers inside `module`, for `device`, by "8bit" (LLM.int8) or "4bit" (NF4) ones."""
    if not str(device).startswith("cuda"):
        raise ConfigError(f"backbone.quantization is {kind!r} and the device {device!r}; it needs a GPU (device=cuda).")
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(f"backbone.quantization {kind!r} needs bitsandbytes; install it, or set none.") from error
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _quantized(bitsandbytes, child, kind))


def _quantized(bitsandbytes: Any, linear: nn.Linear, kind: str) -> nn.Module:
    layers, bias = bitsandbytes.nn, linear.bias is not None
    weight = linear.weight.detach()
    if kind == "8bit":
        layer = layers.Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False)
        layer.weight = layers.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    else:
        layer = layers.Linear4bit(
            linear.in_features, linear.out_features, bias, compute_dtype=weight.dtype, quant_type="nf4"
        )
        layer.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return cast("nn.Module", layer)
