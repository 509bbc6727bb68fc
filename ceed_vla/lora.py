"""Low-rank adapters (LoRA, arXiv 2106.09685) in a checkpoint: the change ``B A`` of a linear
layer's weight is stored as A and B.

A checkpoint with weights by reference (``backbone.weights=reference``) stores adapters, and what
else was trained, such as the head of the action tokens. The names of adapters are peft's,
``<layer>.lora_A.weight`` (r, in) and ``<layer>.lora_B.weight`` (out, r); B includes the scale.
Training attaches them with peft (`ceed_vla.training.adapters`). Inference needs no peft, because
the adapters are added to the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ceed_vla.errors import CheckpointError

A, B = ".lora_A.weight", ".lora_B.weight"


def is_adapter(name: str) -> bool:
    """Whether a weight of a checkpoint belongs to an adapter."""
    return name.endswith((A, B))


@torch.no_grad()
def merge(policy: Any, adapters: Mapping[str, Tensor]) -> None:
    """Add adapters to the weights of their layers, in place.

    The changed weights are no longer references to another folder.

    Args:
        policy: The policy.
        adapters: Name -> weight.

    Raises:
        CheckpointError: One of a pair is missing, or the policy does not have the layer in this
            size.
    """
    parameters = dict(policy.named_parameters())
    for layer in sorted({name.removesuffix(A).removesuffix(B) for name in adapters}):
        weight = parameters.get(f"{layer}.weight")
        a = adapters.get(layer + A)
        b = adapters.get(layer + B)
        if (
            weight is None
            or a is None
            or b is None
            or weight.shape != (len(b), a.shape[1])
            or len(a) != b.shape[1]
        ):
            found = [None if x is None else tuple(x.shape) for x in (weight, a, b)]
            raise CheckpointError(
                f"The adapter of {layer} does not fit: weight, A and B have the shapes {found}. It "
                "was trained on another base, or the base is quantised, which adapters do not "
                "support; check backbone.path and backbone.quantization."
            )
        change = b.float() @ a.float()
        weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))
        policy.referenced.discard(f"{layer}.weight")
